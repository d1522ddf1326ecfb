"""Pairwise crossovers: which attention is faster than which, and at which lengths."""

import math
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from evals.plots.descriptions import subtitle
from evals.plots.layout import BESIDE, name_rows, new_figure, short_name
from evals.plots.style import GREY, style_of
from evals.results.formatting import format_estimate
from evals.results.frames import Sweep
from evals.stats.intervals import CONFIDENCE

SHADES = {"faster": "#e4ca6c", "slower": "#6a86b8", "unclear": "#f2f2f2"}


class Stretch(NamedTuple):
    """A range of lengths, and whether the first of a pair is `faster`, `slower` or `unclear` (within a crossing's interval)."""

    low: float
    high: float
    state: str


def crossings(sweep: Sweep) -> Figure | None:
    """Draws a matrix of pairs: in each cell the range of lengths, coloured by whether the row is faster than the column.

    Returns:
        None if nothing is swept, or no pair was compared.
    """
    if sweep.crossovers is None or sweep.discrete or sweep.crossovers.empty:
        return None
    names, styles = list(sweep.by_attention), style_of(sweep.attentions)
    span = f"{sweep.at(0)} to {sweep.at(-1)}".replace(" tokens to", " to")
    note = (
        f"each cell: {span}, logarithmic; line and number: where they cross; unclear: within the {CONFIDENCE:.0%} interval of that"
    )
    title = "Who is faster than whom, and from which length on"
    figure = new_figure(title, subtitle(sweep, note), 0.9 + 0.28 * len(names))
    axes = figure.subplots()
    for row, first in enumerate(names):
        for column, second in enumerate(names):
            if first != second:
                _draw_cell(axes, row, column, sweep, first, second)
    name_rows(axes, names, styles)
    axes.set_xlim(0, len(names))
    axes.set_xticks(
        np.arange(len(names)) + 0.5, [short_name(name) for name in names], rotation=35, ha="left", rotation_mode="anchor"
    )
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    labels = {"faster": "the row is faster", "slower": "the row is slower", "unclear": "unclear"}
    keys = [Patch(facecolor=shade, edgecolor=GREY, linewidth=0.3, label=labels[state]) for state, shade in SHADES.items()]
    axes.legend(handles=keys, **BESIDE)
    return figure


def _draw_cell(axes: Axes, row: int, column: int, sweep: Sweep, first: str, second: str) -> None:
    """Draws the stretches of one pair from left to right, and a line and a number for the length of each crossing."""

    def across(length: float) -> float:
        return column + 0.04 + 0.92 * math.log(length / sweep.x[0]) / math.log(sweep.x[-1] / sweep.x[0])

    for low, high, state in stretches(sweep, first, second):
        span = (across(low), across(high) - across(low))
        axes.broken_barh([span], (row - 0.42, 0.84), facecolor=SHADES[state], gid=f"{first} {second} {state}")
    crossed = [row["at"] for row in crossovers_between(sweep, first, second)]
    lengths = sorted(at for at in crossed if sweep.x[0] <= at <= sweep.x[-1])
    positions = [column, *map(across, lengths), column + 1]
    axes.vlines(positions[1:-1], row - 0.42, row + 0.42, color="black", linewidth=0.8)
    for length, before, x, after in zip(lengths, positions, positions[1:], positions[2:], strict=False):
        left, right = x - before, after - x
        if max(left, right) > 0.42:  # has room for a number
            offset, side = (0.04, "left") if right > left else (-0.04, "right")
            axes.text(x + offset, row, format_estimate(length), size=6.5, ha=side, va="center")


def crossovers_between(sweep: Sweep, first: str, second: str) -> list[dict[Any, Any]]:
    """The rows of crossovers.csv on a pair of attentions, in either order."""
    if sweep.crossovers is None:
        return []
    names = sweep.crossovers[["first", "second"]]
    return sweep.crossovers[names.isin([first]).any(axis=1) & names.isin([second]).any(axis=1)].to_dict("records")


def stretches(sweep: Sweep, first: str, second: str) -> list[Stretch]:
    """Cuts the range of the sweep at the intervals of the crossings of a pair.

    Returns:
        The stretches in ascending order; empty if the pair was not compared.
    """
    rows = crossovers_between(sweep, first, second)
    # Speed-ups were measured paired; latencies decide where there is no common reference.
    paired = (sweep.by_attention[first]["speedup"] / sweep.by_attention[second]["speedup"]).to_numpy(float)
    unpaired = (sweep.by_attention[second]["latency_s"] / sweep.by_attention[first]["latency_s"]).to_numpy(float)
    ratio = np.where(np.isfinite(paired), paired, unpaired)
    known = np.isfinite(ratio) & (ratio > 0)
    if not rows or not known.any():
        return []
    least, most = float(sweep.x[known][0]), float(sweep.x[known][-1])
    doubtful = []
    for row in rows:
        ends = [row["at"] if math.isnan(row[end]) else row[end] for end in ("at_low", "at_high")]
        if not any(math.isnan(end) for end in ends):
            doubtful.append((min(max(ends[0], least), most), min(max(ends[1], least), most)))
    cut, at = [], least
    for low, high in [*sorted(doubtful), (most, most)]:
        if low > at:
            middle = math.log(math.sqrt(at * low))
            better = np.interp(middle, np.log(sweep.x[known]), np.log(ratio[known])) > 0
            cut.append(Stretch(at, low, "faster" if better else "slower"))
        if high > low:
            cut.append(Stretch(low, high, "unclear"))
        at = max(at, high)
    return cut
