"""Findings on speed and memory over sequence length: BSBR against the reference and against every other attention."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from evals.paper.captions import typed_path
from evals.paper.crossings import crossovers_between, stretches
from evals.paper.findings.data import OURS, required_sweep, rows_of
from evals.paper.findings.text import (
    enumerate_words,
    interval,
    markdown_table,
    write_bytes,
    write_number,
    write_percent,
    write_seconds,
)
from evals.paper.radar import respects
from evals.paper.sources import find_sources
from evals.plots.heatmap import format_ratio
from evals.results.settings import conditions

VERDICTS = {
    "faster": "It is faster at {} tokens",
    "slower": "slower at {}",
    "same": "as fast at {}",
    "ambiguous": "and the verdict is ambiguous at {}",
}


def setup(results: Path) -> str:
    """Describes the attentions, the settings, the rounds and the noise of the sweep over sequence length."""
    sweep = required_sweep(results, "seq_len")
    floor = sweep.rows["noise_floor"].max() if "noise_floor" in sweep.rows else math.nan
    noise = f" The reference differs from itself by at most {floor:.1%}." if floor > 0 else ""
    rounds = sweep.rows["rounds"].dropna()
    names = enumerate_words(f"`{name}`" for name in sweep.by_attention)
    return (
        f"{names}, at {sweep.at(0)} to {sweep.at(-1)}: {conditions(sweep.rows, sweep.column)}; "
        f"{rounds.min():.0f} to {rounds.max():.0f} rounds of fresh processes each.{noise}"
    )


def speed(results: Path) -> str:
    """Describes the latency of BSBR at the greatest length, its verdicts by length, and where it crosses the reference."""
    sweep = required_sweep(results, "seq_len")
    ours, reference = rows_of(sweep, OURS), sweep.reference
    last = ours.iloc[-1]
    latency = write_seconds(last["latency_s"]) + interval(last["latency_low_s"], last["latency_high_s"], write_seconds)
    ratio = write_number(last["speedup"]) + interval(last["speedup_low"], last["speedup_high"], write_number)
    sentences = [f"At {sweep.at(-1)} `{OURS}` takes {latency}, and is {ratio} times as fast as `{reference}`."]
    verdicts = [
        words.format(enumerate_words(lengths))
        for verdict, words in VERDICTS.items()
        if (lengths := [length for length, value in zip(sweep.ticks, ours["verdict"], strict=True) if value == verdict])
    ]
    sentences += [f"{', '.join(verdicts)}."] if verdicts else []
    sentences += [
        f"They cross at {_describe_crossing(row)} tokens." for row in crossovers_between(sweep, OURS, reference) if row["at"] > 0
    ]
    return " ".join(sentences)


def pairs(results: Path) -> str:
    """Tables the lengths at which BSBR is slower and faster than each other attention."""
    sweep = required_sweep(results, "seq_len")
    rows = []
    for name in sweep.by_attention:
        if name != OURS:
            cut = stretches(sweep, OURS, name)
            states = (
                [f"{stretch.low:.0f} to {stretch.high:.0f}" for stretch in cut if stretch.state == state]
                for state in ("slower", "unclear", "faster")
            )
            rows.append([f"`{name}`", *(", ".join(state) or "–" for state in states)])
    return markdown_table(["against", f"{OURS} is slower", "unclear", f"{OURS} is faster"], rows)


def exponents(results: Path) -> str:
    """Tables the exponent of each attention's latency over length, measured and of its FLOPs."""
    sweep = required_sweep(results, "seq_len")
    if sweep.scaling is None:
        missing = f"{typed_path(results)}/seq_len/scaling.csv"
        raise ValueError(f"{missing} is not there, and the study's page needs it: run the sweep again")

    def two_decimals(value: float) -> str:
        return f"{value:.2f}"

    rows = []
    for row in sweep.scaling[sweep.scaling["quantity"] == "latency"].to_dict("records"):
        refused = isinstance(row["note"], str) and row["note"]
        measured = two_decimals(row["exponent"]) + interval(row["exponent_low"], row["exponent_high"], two_decimals)
        declared = "" if pd.isna(row["declared_exponent"]) else two_decimals(row["declared_exponent"])
        agrees = row.get("agreement")
        rows.append([f"`{row['attention']}`", refused or measured, declared, agrees if isinstance(agrees, str) else ""])
    return markdown_table(["attention", "p, measured", "p, of its FLOPs", "the two"], rows)


def memory(results: Path) -> str:
    """Describes peak memory, parameters and state of BSBR against the reference at the greatest length."""
    sweep = required_sweep(results, "seq_len")
    last = {name: rows.iloc[-1] for name, rows in sweep.by_attention.items()}
    ours, reference = last[OURS], last[sweep.reference]
    less = [f"`{name}`" for name, row in last.items() if row["peak_bytes"] < ours["peak_bytes"]]
    return (
        f"At {sweep.at(-1)} `{OURS}` needs {write_bytes(ours['peak_bytes'])} above inputs and parameters, "
        f"{format_ratio(ours['peak_bytes'] / reference['peak_bytes'])} what `{sweep.reference}` needs; "
        f"{enumerate_words(less)} need{'s' * (len(less) < 2)} less. "
        f"Its parameters are {write_bytes(ours['parameter_bytes'])}, against {write_bytes(reference['parameter_bytes'])}. "
        f"To decode behind that context it keeps {write_bytes(ours['state_bytes'])}, "
        f"{format_ratio(ours['state_bytes'] / reference['state_bytes'])} what `{sweep.reference}` keeps."
    )


def roofline(results: Path) -> str:
    """Describes the fraction of the roofline that each attention reaches at the greatest length."""
    sweep = required_sweep(results, "seq_len")
    parts = {name: float(rows["roofline_fraction"].iloc[-1]) for name, rows in sweep.by_attention.items()}
    known = sorted((name for name in parts if parts[name] > 0), key=lambda name: -parts[name])
    return f"At {sweep.at(-1)}: {enumerate_words(f'`{name}` {write_percent(parts[name])}' for name in known)}."


def disadvantages(results: Path) -> str:
    """Tables the respects of the radar chart, the best attention in each, and by how much BSBR is worse."""
    sweep = required_sweep(results, "seq_len")
    learned = [source.first for source in find_sources(results, "retrieval")]
    rows = []
    for respect in respects(sweep, learned[0] if learned else None):
        costs = respect.costs
        if OURS in costs:
            best = min(costs, key=lambda name: costs[name])
            ratio = "1×" if best == OURS else format_ratio(costs[OURS] / costs[best])
            better = sum(cost < costs[OURS] for cost in costs.values())
            rows.append([respect.meaning, f"`{best}`", ratio, f"{better} of {len(costs) - 1}"])
    return markdown_table(["", "best", f"{OURS} is worse by", "others that are better"], rows)


def _describe_crossing(row: dict[Any, Any]) -> str:
    return f"{row['at']:.0f}{interval(row['at_low'], row['at_high'], lambda value: f'{value:.0f}')}"
