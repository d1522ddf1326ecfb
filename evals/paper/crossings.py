"""Who is faster than whom, at which length: every pair of attentions, with the crossings that were found."""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from evals.plots.layout import (
    EDGE,
    LEFT,
    LEGEND,
    NAME,
    SMALL,
    WIDTH,
    headed,
    key_room,
    keyed,
    label,
    placed,
    subtitle,
    weight,
    wide,
)
from evals.plots.style import GREY
from evals.results.formatting import format_estimate
from evals.results.frames import Sweep
from evals.stats.intervals import CONFIDENCE

SHADES = {"faster": "#e4ca6c", "slower": "#6a86b8", "unclear": "#f2f2f2"}
ROW, FOOT = 0.27, 0.12  # inches


class Stretch(NamedTuple):
    """Lengths from low to high at which the first of a pair is `faster`, `slower`, or by its interval may be either."""

    low: float
    high: float
    state: str


def crossings(sweep: Sweep) -> Figure | None:
    """A matrix of pairs: in each cell the range of lengths, coloured by whether the row is faster than the column there.

    None where nothing is swept, or no pair was looked at.
    """
    if sweep.crossovers is None or sweep.discrete or sweep.crossovers.empty:
        return None
    names = list(sweep.cells)
    left, heads = max(LEFT, key_room(sweep.looks, names)), max(wide(label(sweep.looks, name), NAME) for name in names) * 0.64 + 0.1
    width, height = WIDTH - left - EDGE - 0.35, ROW * len(names)
    span = f"{sweep.at(0)} to {sweep.at(-1)}".replace(" tokens to", " to")
    note = f"each cell: {span}, logarithmic; line: where they cross; unclear: within the {CONFIDENCE:.0%} interval of that"
    words = subtitle(sweep, note, left=left)
    picture = headed("Who is faster than whom, and from which length on", words, FOOT + height + heads + LEGEND - 0.1, left)
    axes = placed(picture, left, FOOT, width, height)
    for row, first in enumerate(names):
        for column, second in enumerate(names):
            _cell(axes, row, column, sweep, first, second, width / len(names))
    axes.set(xlim=(0, len(names)), ylim=(len(names) - 0.5, -0.5), xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    keyed(axes, sweep.looks, names, width)
    for column, name in enumerate(names):
        style: dict[str, Any] = {"size": NAME, "weight": weight(sweep.looks[name]), "rotation": 40, "rotation_mode": "anchor"}
        axes.text(column + 0.35, -0.62, label(sweep.looks, name), ha="left", va="bottom", **style)
    told = {"faster": "the row is faster", "slower": "the row is slower"}
    keys = [Patch(facecolor=shade, edgecolor=GREY, linewidth=0.3, label=told.get(state, state)) for state, shade in SHADES.items()]
    anchor = (left / WIDTH, (FOOT + height + heads + 0.02) / picture.get_figheight())
    shape: dict[str, Any] = {"handletextpad": 0.5, "handlelength": 1.4, "handleheight": 0.9}
    picture.legend(handles=keys, loc="lower left", bbox_to_anchor=anchor, ncols=3, borderaxespad=0, **shape)
    return picture


def _cell(axes: Axes, row: int, column: int, sweep: Sweep, first: str, second: str, width: float) -> None:
    if first == second:
        return
    low, high = math.log(sweep.x[0]), math.log(sweep.x[-1])

    def across(n: float) -> float:
        return column + 0.04 + 0.92 * (math.log(n) - low) / (high - low)

    for stretch in stretches(sweep, first, second):
        corner = across(stretch.low), row - 0.42
        box = Rectangle(corner, across(stretch.high) - corner[0], 0.84, linewidth=0, facecolor=SHADES[stretch.state])
        box.set_gid(f"{first} {second} {stretch.state}")
        axes.add_patch(box)
    found = sorted(across(at) for at in _pair(sweep, first, second)["at"] if sweep.x[0] <= at <= sweep.x[-1])
    for before, at, after in zip([column, *found], found, [*found[1:], column + 1.0], strict=False):
        axes.vlines(at, row - 0.42, row + 0.42, color="black", linewidth=0.8)
        n = format_estimate(math.exp(low + (at - column - 0.04) / 0.92 * (high - low)))
        room = (wide(n, SMALL) + 0.07) / width
        # Right of its line, or left of it, or nowhere.
        side = "left" if after - at > room else "right" if at - before > room else ""
        if side:
            axes.text(at + (0.04 if side == "left" else -0.04) / width, row, n, size=SMALL, ha=side, va="center_baseline")


def _pair(sweep: Sweep, first: str, second: str) -> pd.DataFrame:
    """The rows of the table of crossings that are of both, whichever comes first."""
    assert sweep.crossovers is not None
    names = sweep.crossovers[["first", "second"]]
    found: pd.DataFrame = sweep.crossovers[names.isin([first]).any(axis=1) & names.isin([second]).any(axis=1)]
    return found


def stretches(sweep: Sweep, first: str, second: str) -> list[Stretch]:
    """The range of the sweep, cut where it is doubtful who is faster. Empty where nothing is known of the pair."""
    found = _pair(sweep, first, second)
    ratio = (sweep.cells[first]["speedup"] / sweep.cells[second]["speedup"]).to_numpy(float)
    # Without a common reference, latencies tell it; beside one, speed-ups do, which were taken in turns.
    ratio = np.where(
        np.isfinite(ratio), ratio, (sweep.cells[second]["latency_s"] / sweep.cells[first]["latency_s"]).to_numpy(float)
    )
    known = np.isfinite(ratio) & (ratio > 0)
    if found.empty or not known.any():
        return []
    least, most = float(sweep.x[known][0]), float(sweep.x[known][-1])
    doubtful = []
    for row in found.to_dict("records"):
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
