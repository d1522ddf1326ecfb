"""Figures that are no lines: who is faster where, and what the memory is made of."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from evals.looks import FAILURES, GREY, MARK, PARTS, SLOWER_TO_FASTER
from evals.page import (
    BYTES,
    EDGE,
    LEFT,
    LEGEND,
    SMALL,
    WIDTH,
    Sweep,
    headed,
    key_room,
    keyed,
    placed,
    subtitle,
    wide,
)

# --- who is faster where -------------------------------------------------------------------------------

ROW, FOOT = 0.24, 0.45  # heights in inches
COLOURS = LinearSegmentedColormap.from_list("slower_to_faster", SLOWER_TO_FASTER)
SIGNS = {"faster": "▲ ", "slower": "▼ ", "same": "= ", "ambiguous": ""}


def heatmap(sweep: Sweep) -> Figure | None:
    """The speed-up of every attention over the reference at every place, and what may be said of it.

    None if there is no speed-up, or nothing but the reference itself.
    """
    names = [name for name in sweep.cells if name != sweep.reference]
    ratios = pd.DataFrame({name: sweep.cells[name]["speedup"] for name in names}).T
    if not ratios.gt(0).any(axis=None):
        return None
    left, bar = max(LEFT, key_room(sweep.looks, names)), 0.6
    column = min((WIDTH - left - bar - EDGE) / len(sweep.places), max(1.1, 2.4 / len(sweep.places)))
    width, height = column * len(sweep.places), ROW * len(names)
    roomy = column > 0.55  # for a sign and a number
    verdicts = {str(verdict) for name in names for verdict in sweep.cells[name]["verdict"].dropna()} & SIGNS.keys()
    short = {outcome for name in names for outcome in sweep.cells[name]["outcome"] if outcome in FAILURES}
    short = {outcome for outcome in short if wide(outcome, SMALL) > column - 0.06}
    keys: list[Any] = [_key_of(verdict, roomy) for verdict in SIGNS if verdict in verdicts]
    marks = [Line2D([], [], color="black", marker=mark, label=name, **MARK) for name, mark in FAILURES.items() if name in short]
    rows = [row for row in (keys, marks) if row]

    picture = headed(
        f"Speed-up over {sweep.reference}", subtitle(sweep, left=left), FOOT + height + LEGEND * len(rows) + 0.04, left
    )
    axes = placed(picture, left, FOOT, width, height)
    for number, handles in enumerate(reversed(rows)):
        anchor = (left / WIDTH, (FOOT + height + 0.06 + LEGEND * number) / picture.get_figheight())
        options: dict[str, Any] = {"handletextpad": 0.5, "handlelength": 1.4, "handleheight": 0.9} if handles is keys else {}
        picture.legend(handles=handles, loc="lower left", bbox_to_anchor=anchor, ncols=len(handles), borderaxespad=0, **options)
    # As far below 1 as above it; beyond 32 times, all is one colour.
    reach = min(max(math.ceil(np.nanmax(np.abs(np.log2(ratios.where(ratios > 0).to_numpy(float))))), 1), 5)
    shades = Normalize(-reach, reach)
    for row, name in enumerate(names):
        for at, (_, cell) in enumerate(sweep.cells[name].iterrows()):
            _cell(axes, row, at, cell, shades, column, roomy, short)
    axes.set(xlim=(-0.5, len(sweep.places) - 0.5), ylim=(len(names) - 0.5, -0.5), yticks=[])
    axes.set_xticks(range(len(sweep.places)), sweep.ticks)
    if max(wide(tick, 8) for tick in sweep.ticks) > column - 0.05:
        axes.set_xticks(range(0, len(sweep.places), 2), sweep.ticks[::2])
    axes.set_xlabel(sweep.axis)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    keyed(axes, sweep.looks, names, width)
    tall = max(height, 0.6)
    scale = placed(picture, left + width + 0.12, FOOT + (height - tall) / 2, 0.1, tall)
    _scale(picture, scale, shades, reach)
    return picture


def _cell(
    axes: Axes, row: int, at: int, cell: "pd.Series[Any]", shades: Normalize, width: float, roomy: bool, short: Iterable[str]
) -> None:
    """One cell: its colour, its number and its verdict; or what happened instead."""
    outcome, value, verdict = cell["outcome"], cell["speedup"], cell["verdict"]
    box: dict[str, Any] = {"xy": (at - 0.5, row - 0.5), "width": 1, "height": 1, "linewidth": 1.5, "edgecolor": "white"}
    middle: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
    if outcome in FAILURES:
        axes.add_patch(Rectangle(facecolor="#f5f5f5", **box))
        if outcome in short:
            axes.plot([at], [row], marker=FAILURES[outcome], color=GREY, **MARK)
        else:
            axes.text(at, row, str(outcome), size=SMALL, color=GREY, style="italic", **middle)
        return
    if not value > 0:  # not measured, or measured without the reference
        axes.text(at, row, "–", size=8, color=GREY, **middle)
        return
    shade = COLOURS(float(shades(math.log2(value))))
    ink = "black" if _lightness(shade) > 0.55 else "white"
    axes.add_patch(Rectangle(facecolor=shade, gid=f"cell {row} {at}", **box))
    bold = "bold" if verdict in ("faster", "slower") else "normal"
    words = SIGNS.get(verdict, "") + times(value) if roomy else times(value).removesuffix("×")
    size = 7.5 if roomy else SMALL
    if verdict == "ambiguous":
        axes.add_patch(
            Rectangle((at - 0.5, row - 0.5), 1, 1, fill=False, hatch="/////", edgecolor=(*to_rgb(ink), 0.35), linewidth=0)
        )
        # Hatching must not run through the number.
        middle["bbox"] = {"facecolor": shade, "edgecolor": "none", "pad": 1.2}
    if wide(words, size, bold) <= width - 0.02:
        axes.text(at, row, words, size=size, weight=bold, color=ink, **middle)


def times(value: float) -> str:
    """A ratio in two or three digits: 0.53×, 1.04×, 3.4×, 12×."""
    digits = 2 if value < 1.995 else 1 if value < 9.95 else 0
    return f"{value:.2g}×" if value < 0.01 else f"{value:.{digits}f}×"


def _lightness(colour: tuple[float, ...]) -> float:
    """Relative luminance (ITU-R BT.709), after the eye's response: 0.5 is as far from black as from white."""
    red, green, blue = (part**2.2 for part in colour[:3])
    return float((0.2126 * red + 0.7152 * green + 0.0722 * blue) ** 0.45)


def _key_of(verdict: str, roomy: bool) -> Patch:
    bold = "" if verdict not in ("faster", "slower") else "bold: "
    words = SIGNS[verdict] + verdict if roomy else bold + verdict
    hatch = "/////" if verdict == "ambiguous" else ""
    middle = COLOURS({"faster": 0.85, "slower": 0.15}.get(verdict, 0.5))
    return Patch(facecolor=middle, edgecolor=GREY if hatch else "none", hatch=hatch, linewidth=0, label=words)


def _scale(picture: Figure, axes: Axes, shades: Normalize, reach: int) -> None:
    every = reach if axes.bbox.height / picture.dpi < 1 else 1 if reach <= 3 else 2
    powers = sorted({0, *range(0, reach + 1, every), *range(0, -reach - 1, -every)})
    bar = picture.colorbar(ScalarMappable(shades, COLOURS), cax=axes, ticks=powers)
    bar.ax.set_yticklabels([f"{2**power}×" if power >= 0 else f"1/{2**-power}×" for power in powers], size=7)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)
    bar.ax.grid(False)


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
    power = min(max(math.floor(math.log(most, 1024)), 0), len(BYTES) - 1)
    # Round numbers of the unit, not of bytes.
    ticks = [
        tick for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, most / 1024**power) if tick * 1024**power <= most
    ]
    axes.set_xticks([tick * 1024**power for tick in ticks], [f"{tick:g}" for tick in ticks], size=7)
    return BYTES[power]
