"""The subtitles of figures in words: settings, machine, number of samples, backends, and what was not made equal."""

import pandas as pd

from evals.results.frames import Sweep
from evals.results.metrics import BYTES
from evals.results.settings import conditions, format_range
from evals.stats.intervals import CONFIDENCE


def subtitle(sweep: Sweep, *notes: str, sampled: bool = False) -> list[str]:
    """Describes a comparison: every setting but the swept one, samples, the given notes, and what was not made equal.

    Args:
        sweep: the comparison.
        notes: remarks on the figure.
        sampled: whether the figure shows intervals of sampled latencies.
    """
    lines = [conditions(sweep.rows, sweep.column)]
    if sampled and sweep.rows["samples"].notna().any():
        samples, rounds = (format_range(sweep.rows[name].dropna()) for name in ("samples", "rounds"))
        lines.append(
            f"median of {samples} samples in {rounds} round{'' if rounds == '1' else 's'}, with its {CONFIDENCE:.0%} interval"
        )
    return [*lines, *notes, "; ".join([*matching(sweep), *backends(sweep.rows)])]


def matching(sweep: Sweep) -> list[str]:
    """Describes what was made equal between the attentions, and how far their parameters differ if by more than 1 %."""
    words = [str(word) for word in dict.fromkeys(sweep.rows["match"].dropna()) if str(word).strip()]
    bounds = sweep.rows.groupby(sweep.column, sort=False)["parameter_bytes"].agg(["min", "max"]).dropna()
    bounds = bounds[bounds["max"] > 1.01 * bounds["min"]]
    if bounds.empty:
        return words
    if sweep.rows.groupby("attention")["parameter_bytes"].nunique().le(1).all():
        low, high = (BYTES.format(value, digits=2) for value in (bounds["min"].min(), bounds["max"].max()))
        return [*words, f"parameters not matched: {low} to {high}"]
    return [*words, f"parameters not matched: up to {(bounds['max'] / bounds['min']).max():.2g} times as many"]


def backends(rows: pd.DataFrame) -> list[str]:
    """Names the backends of the attentions if they are not all the same."""
    if "impl" not in rows or rows["impl"].nunique() < 2:
        return []
    used = rows.dropna(subset="impl").groupby("impl", sort=False)["attention"].unique()
    most = max(used.index, key=lambda backend: len(used[backend]))
    others = [f"{', '.join(names)} on {backend}" for backend, names in used.items() if backend != most]
    return [f"backends not equal: {', '.join(others)}, the others on {most}"]
