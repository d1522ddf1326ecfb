"""A comparison of two result folders as text or Markdown: warnings, the table of ratios, changed memory, and regressions."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd

from evals.results.cells import MACHINE, Cell
from evals.results.formatting import WIDTH, align_columns
from evals.results.markup import MARKDOWN, Table, escape, markdown
from evals.results.metrics import LATENCY
from evals.stats.intervals import CONFIDENCE


def render(a: Sequence[Cell], b: Sequence[Cell], rows: pd.DataFrame) -> str:
    """Renders `rows`, the comparison of the cells `a` and `b` by `compare_cells`, in 80 columns."""
    ratios = [
        ["ratio", *map(_format_ratio, rows["ratio"])],
        ["low", *map(_format_ratio, rows["ratio_low"])],
        ["high", *map(_format_ratio, rows["ratio_high"])],
        ["floor", *("" if math.isnan(floor) else f"{floor:.1%}" if floor < 1 else ">99%" for floor in rows["noise_floor"])],
        ["verdict", *rows["verdict"]],
    ]
    blocks = [
        "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="   ") for line in _preamble(a, b, rows)),
        f"time of A / time of B, above 1 where B is faster; low, high: {CONFIDENCE:.0%} interval\n"
        + align_columns(_labels(rows), ratios),
    ]
    changed = rows[(rows["peak_bytes_a"] - rows["peak_bytes_b"]).abs() > 0]
    if len(changed):
        before, after = changed["peak_bytes_a"], changed["peak_bytes_b"]
        memory = [[head, *(f"{peak / 2**20:.3f}" for peak in side)] for head, side in (("MiB in A", before), ("MiB in B", after))]
        memory.append(["more", *(f"{more:+.1%}" for more in after / before - 1)])
        blocks.append("peak memory where it changed\n" + align_columns(_labels(rows, changed.index), memory))
    counts = rows["verdict"].value_counts().items()
    return "\n\n".join([*blocks, f"{len(rows)} cells: {', '.join(f'{count} {verdict}' for verdict, count in counts)}"])


def render_markdown(a: Sequence[Cell], b: Sequence[Cell], rows: pd.DataFrame, threshold: float) -> str:
    """Renders the same comparison as Markdown, for a pull request: a row per cell, and the regressions as a list above it."""
    worse = regressions(rows, threshold)
    columns = [
        *_label_columns(rows),
        ["time of A", *map(_format_seconds, rows["latency_a_s"])],
        ["time of B", *map(_format_seconds, rows["latency_b_s"])],
        ["change of time", *map(_format_change, rows["ratio"], rows["ratio_low"], rows["ratio_high"])],
        ["of memory", *(f"{more:+.1%}" if abs(more) > 0 else "" for more in rows["peak_bytes_b"] / rows["peak_bytes_a"] - 1)],
        ["verdict", *rows["verdict"]],
    ]
    meaning = (
        f"Change of time: from A to B, with its {CONFIDENCE:.0%} interval. The verdicts faster and slower are corrected for the "
        f"number of cells. Regressions: cells that are slower by more than {threshold:.3g}, hold more memory by more than "
        f"{threshold:.3g}, or have no number any more."
    )
    title = f"{len(worse) or 'No'} regression{'s' if len(worse) > 1 else ''} in {len(rows)} cells"
    table = markdown(Table(title, [list(row) for row in zip(*columns, strict=True)], conditions=meaning))
    heading, _, rest = table.partition("\n")
    remarks = [f"- {escape(line, MARKDOWN)}" for line in (*worse, *_preamble(a, b, rows))]
    return "\n".join([heading, "", *remarks, rest])


def regressions(rows: pd.DataFrame, threshold: float) -> list[str]:
    """Returns a sentence for each regression: more time or memory by more than `threshold`, or a failure."""
    sentences = []
    for label, (_, row) in zip(_labels(rows)[1:], rows.iterrows(), strict=True):
        name = " ".join(label.split())
        if row["verdict"] == "slower" and 1 / row["ratio"] > 1 + threshold:
            sentences.append(f"{name} takes {1 / row['ratio'] - 1:.1%} more time")
        if row["peak_bytes_b"] > (1 + threshold) * row["peak_bytes_a"]:
            sentences.append(f"{name} holds {row['peak_bytes_b']:.0f} bytes instead of {row['peak_bytes_a']:.0f}")
        if row["outcome_a"] == "ok" and row["outcome_b"] not in ("ok", "absent"):
            sentences.append(f"{name} was ok and is {row['outcome_b']}: {row['detail_b']}")
    return sentences


def _preamble(a: Sequence[Cell], b: Sequence[Cell], rows: pd.DataFrame) -> list[str]:
    """The origins of A and B, and warnings about their comparison."""
    lines = [
        f"{side}: {', '.join(_origins(cells, name) for name in ('folder', 'commit', *MACHINE))}"
        for side, cells in (("A", a), ("B", b))
    ]
    if _origins(a, "processor") != _origins(b, "processor"):
        lines.append("Their processors differ: the ratios compare these machines as much as the code.")
    if rows["paired"].isin([False]).any():  # None for a cell that is not timed in both
        lines.append("Rounds of A and B were not interleaved: all else that changed between the two runs is in the ratio too.")
    if (rows["ratio"].notna() & rows["noise_floor"].isna()).any():
        lines.append("Where there is no floor, nothing was measured against itself.")
    options = {cell.attention: cell.options for cell in a}
    changed = sorted({cell.attention for cell in b if options.get(cell.attention, cell.options) != cell.options})
    if changed:
        lines.append(f"Their options differ: {', '.join(changed)}.")
    return lines


def _origins(cells: Sequence[Cell], name: str) -> str:
    return " and ".join(dict.fromkeys(cell.origin[name] for cell in cells))


def _format_ratio(ratio: float) -> str:
    if not ratio < 1000:
        return "" if math.isnan(ratio) else ">999x"
    return f"{ratio:.{3 if ratio < 2 else 2 if ratio < 10 else 1}f}x"


def _format_seconds(seconds: float) -> str:
    return "" if math.isnan(seconds) else LATENCY.unit.format(seconds)


def _format_change(ratio: float, low: float, high: float) -> str:
    """Writes time of A / time of B as a change of time from A to B: 0.8x as +25.0%."""
    if math.isnan(ratio):
        return ""
    interval = "" if math.isnan(low) else f" ({1 / high - 1:+.1%} to {1 / low - 1:+.1%})"
    return f"{1 / ratio - 1:+.1%}{interval}"


def _labels(rows: pd.DataFrame, index: "pd.Index[Any] | None" = None) -> list[str]:
    """A head, and a label for each row of `index` (default: all), in columns of equal width."""
    columns = _label_columns(rows, index)
    widths = [max(map(len, column)) for column in columns]
    return [" ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)) for line in zip(*columns, strict=True)]


def _label_columns(rows: pd.DataFrame, index: "pd.Index[Any] | None" = None) -> list[list[str]]:
    """The attention, and every setting in which rows differ: a head, and the values of the rows of `index` (default: all)."""
    settings = list(rows.columns[: rows.columns.get_loc("ratio")])
    varied = [name for name in settings if name == "attention" or rows[name].nunique(dropna=False) > 1]
    chosen = rows if index is None else rows.loc[index]
    return [[name, *("" if pd.isna(value) else str(value) for value in chosen[name].astype(object))] for name in varied]
