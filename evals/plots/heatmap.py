"""Figures that are no lines: who is faster where, and what the memory is made of."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from evals.plots.layout import EDGE, LEFT, LEGEND, SMALL, WIDTH, headed, key_room, keyed, placed, subtitle, wide
from evals.plots.style import FAILURES, GREY, MARK, SLOWER_TO_FASTER
from evals.results.frames import Sweep

# --- who is faster where -------------------------------------------------------------------------------

ROW, FOOT = 0.24, 0.45  # heights in inches
COLOURS = LinearSegmentedColormap.from_list("slower_to_faster", SLOWER_TO_FASTER)
SIGNS = {"faster": "▲ ", "slower": "▼ ", "same": "= ", "ambiguous": ""}


def speedup_heatmap(sweep: Sweep) -> Figure | None:
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
