"""TODO: what lives here."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from evals.plots.heatmap import FOOT
from evals.plots.layout import LEFT, LEGEND, SMALL, WIDTH, headed, key_room, keyed, placed, subtitle, wide
from evals.plots.style import FAILURES, GREY, PARTS
from evals.results.frames import Sweep
from evals.results.metrics import BYTES

# --- what memory is made of ----------------------------------------------------------------------------

COLUMNS = {"parameters": "parameter_bytes", "activations": "peak_bytes", "state": "state_bytes"}


def representatives(sweep: Sweep) -> list[int]:
    """The places that stand for all: the least, the middle and the greatest; the first three where there is no order."""
    last = len(sweep.places) - 1
    return sorted({0, last // 2 if last % 2 == 0 else (last + 1) // 2, last}) if sweep.ordered else list(range(min(last + 1, 3)))


def memory_split(sweep: Sweep) -> Figure | None:
    """Parameters, activations and state of each attention, stacked, at up to three places; None if any of them is never known."""
    if any(not sweep.rows[column].gt(0).any() for column in COLUMNS.values()):
        return None
    names, places = list(sweep.cells), representatives(sweep)
    left, gap, row = max(LEFT, key_room(sweep.looks, names)), 0.2, 0.2
    width = (WIDTH - left - 0.2 - gap * (len(places) - 1)) / len(places)
    height = row * len(names)
    held = {"decode"} == set(sweep.rows["workload"])
    note = "" if held else "activations: the peak above inputs and parameters; state: what decoding would keep, not held here"
    picture = headed(
        "Memory by what holds it, lower is better", subtitle(sweep, note, left=left), FOOT + height + 0.22 + LEGEND, left
    )
    anchor = (left / WIDTH, (FOOT + height + 0.3) / picture.get_figheight())
    keys = [Patch(facecolor=colour, edgecolor=GREY, linewidth=0.4, label=part) for part, colour in PARTS.items()]
    shape: dict[str, Any] = {"handletextpad": 0.5, "handlelength": 1.4, "handleheight": 0.9}
    picture.legend(handles=keys, loc="lower left", bbox_to_anchor=anchor, ncols=3, borderaxespad=0, **shape)
    for number, at in enumerate(places):
        axes = placed(picture, left + number * (width + gap), FOOT, width, height)
        unit = _stack(axes, sweep, names, at, width)
        axes.set_title(f"{sweep.at(at)}, in {unit}", size=8, loc="left", pad=4)
        if number == 0:
            keyed(axes, sweep.looks, names, width)
    middle = (left + WIDTH - 0.2) / 2 / WIDTH
    words = "memory" if len(places) == 1 else "memory; each panel has a scale of its own"
    picture.text(middle, 0.06 / picture.get_figheight(), words, ha="center", va="bottom", size=8)
    return picture


def _unknown(cell: "pd.Series[Any]") -> str:
    """What a bar cannot show of one cell, and why: an outcome, or the parts that were not measured."""
    missing = [part for part, column in COLUMNS.items() if pd.isna(cell[column])]
    if cell["outcome"] in FAILURES:
        return str(cell["outcome"])
    return "not measured" if len(missing) == len(COLUMNS) else f"{', '.join(missing)}: unknown" if missing else ""


def _stack(axes: Axes, sweep: Sweep, names: Sequence[str], at: int, width: float) -> str:
    """The bars of one place; returns the unit of their axis."""
    parts = pd.DataFrame({name: sweep.cells[name].iloc[at][list(COLUMNS.values())] for name in names}, dtype=float).T
    ends = np.nan_to_num(parts.to_numpy(float)).cumsum(axis=1)
    begin = np.zeros(len(names))
    for number, part in enumerate(COLUMNS):
        end = ends[:, number]
        bars = axes.barh(range(len(names)), end - begin, 0.68, left=begin, color=PARTS[part], edgecolor=GREY, linewidth=0.4)
        begin = end
        for bar, name in zip(bars, names, strict=True):
            bar.set_gid(f"{name} {part}")
    most = float(ends.max()) or 1.0
    notes = [_unknown(sweep.cells[name].iloc[at]) for name in names]
    # The axis goes on until there is room for the words behind their bars.
    room = [width - wide(words, SMALL) - 0.1 if words else width / 1.04 for words in notes]
    right = max(most * 1.04, *(end * width / inches for end, inches in zip(ends[:, -1], room, strict=True)))
    axes.set(xlim=(0, right), ylim=(len(names) - 0.5, -0.5), yticks=[])
    for row, words in enumerate(notes):
        if words:
            place = float(ends[row, -1]) / right + 0.05 / width
            axes.text(place, row, words, size=SMALL, color=GREY, va="center_baseline", transform=axes.get_yaxis_transform())
    axes.grid(False, axis="y")
    axes.spines["left"].set_color(GREY)
    power = min(max(math.floor(math.log(most, 1024)), 0), len(BYTES.steps) - 1)
    # Round numbers of the unit, not of bytes.
    ticks = [
        tick for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, most / 1024**power) if tick * 1024**power <= most
    ]
    axes.set_xticks([tick * 1024**power for tick in ticks], [f"{tick:g}" for tick in ticks], size=7)
    return BYTES.steps[power][1].strip()
