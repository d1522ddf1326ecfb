"""Several quantities of one sweep in one figure: all attentions at a few lengths, panels over length, the dashboard."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from evals.plots.accuracy import AccuracySweep
from evals.plots.layout import (
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
)
from evals.plots.lines import CEILING, LATENCY, MEMORY, SPEEDUP, Quantity, plot, scale_x, scale_y
from evals.plots.memory import representatives
from evals.plots.style import FAILURES, GREY
from evals.results.formatting import format_bytes
from evals.results.frames import Sweep

STATE = Quantity("state", "State that decoding keeps, lower is better", "state_bytes", tick=format_bytes, base=2, optional=True)
FOOT, ABOVE, GAP, RIGHT = 0.42, 0.2, 0.62, 0.15
"""Inches beneath a panel, above it for its title, between two for the ticks of the second, and right of the last."""

# --- all attentions at a few lengths --------------------------------------------------------------


def comparison(sweep: Sweep) -> Figure | None:
    """Latency and peak memory, a panel each: a row an attention, a mark a length, at up to three lengths.

    None where there is no number of either. Rows are in the order of latency at the last of these lengths.
    """
    if not sweep.rows["latency_s"].gt(0).any() or not sweep.rows["peak_bytes"].gt(0).any():
        return None
    at = representatives(sweep)
    last = {name: rows["latency_s"].iloc[at[-1]] for name, rows in sweep.cells.items()}
    names = sorted(sweep.cells, key=lambda name: (np.isnan(last[name]), last[name]))
    left, row = max(LEFT, key_room(sweep.looks, names)), 0.21
    width, height = (WIDTH - left - RIGHT - 0.25) / 2, row * len(names)
    failed = [f"{name} at {sweep.at(i)} ({cell})" for i in at for name in names if (cell := _outcome(sweep, name, i)) in FAILURES]
    words = subtitle(sweep, f"not shown: {', '.join(failed)}" if failed else "", sampled=True, left=left)
    picture = headed("All attentions compared, left is better", words, FOOT + height + LEGEND + 0.08, left)
    sizes = np.linspace(3.5, 7.0, len(at)) if len(at) > 1 else np.array([5.5])
    for number, quantity in enumerate((LATENCY, MEMORY)):
        axes = placed(picture, left + number * (width + 0.25), FOOT, width, height)
        for place, name in enumerate(names):
            _row(axes, place, sweep, name, at, sizes.tolist(), quantity)
        axes.set(xscale="log", ylim=(len(names) - 0.5, -0.5), yticks=[])
        axes.margins(x=0.06)
        # A mark every two decades of what may be 128 times as long, or every 16-fold of memory.
        axes.xaxis.set_major_locator(LogLocator(base=10 if quantity is LATENCY else 4, numticks=7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, tick=quantity.tick: tick(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("latency" if quantity is LATENCY else "peak memory above inputs and parameters")
        if number == 0:
            keyed(axes, sweep.looks, names, width)
    marks = [
        Line2D([], [], marker="o", linestyle="none", color=GREY, markersize=size, label=sweep.at(place))
        for place, size in zip(at, sizes, strict=True)
    ]
    anchor = (left / WIDTH, (FOOT + height + 0.08) / picture.get_figheight())
    picture.legend(handles=marks, loc="lower left", bbox_to_anchor=anchor, ncols=len(marks), borderaxespad=0, handletextpad=0.3)
    return picture


def _outcome(sweep: Sweep, name: str, at: int) -> str:
    return str(sweep.cells[name]["outcome"].iloc[at])


def _row(axes: Axes, place: int, sweep: Sweep, name: str, at: Sequence[int], sizes: Sequence[float], quantity: Quantity) -> None:
    """The marks of one attention, on a line from the first to the last."""
    look, cells = sweep.looks[name], sweep.cells[name].iloc[list(at)]
    values = cells[quantity.column].to_numpy(float)
    axes.plot(values, [place] * len(values), color=look.colour, linewidth=look.width / 2, alpha=0.6, gid=f"{name} line", zorder=2)
    for (_, cell), value, size in zip(cells.iterrows(), values, sizes, strict=True):
        if quantity.low and quantity.high:
            axes.hlines(place, cell[quantity.low], cell[quantity.high], color=look.colour, linewidth=3, alpha=0.25, zorder=1.9)
        axes.plot([value], [place], gid=name, zorder=3, **look.line(discrete=True) | {"markersize": size})


# --- panels over length ---------------------------------------------------------------------------


def panels(sweep: Sweep, quantities: Sequence[Quantity], title: str) -> Figure | None:
    """A panel a quantity, side by side, over the swept setting. None where a quantity has no number, or nothing is swept."""
    if sweep.discrete or any(not sweep.rows[quantity.column].gt(0).any() for quantity in quantities):
        return None
    names = list(sweep.cells)
    rows = _rows_of_keys(len(names))
    width = (WIDTH - LEFT - RIGHT - GAP * (len(quantities) - 1)) / len(quantities)
    plotted = 1.9
    picture = headed(title, subtitle(sweep, sampled=True), FOOT + plotted + ABOVE + LEGEND * rows - 0.1)
    for number, quantity in enumerate(quantities):
        _over(placed(picture, LEFT + number * (width + GAP), FOOT, width, plotted), sweep, quantity)
    _keys(picture, sweep, names, FOOT + plotted + ABOVE)
    return picture


def decode(sweep: Sweep) -> Figure | None:
    """What the next token costs behind a context: time, and the state that must be kept."""
    quantities = (replace(LATENCY, title="Latency of a token"), STATE)
    return panels(sweep, quantities, "Decoding one token behind a context, lower is better")


def _over(axes: Axes, sweep: Sweep, quantity: Quantity) -> None:
    """One quantity over the swept setting, in a panel that is named after it."""
    for name, rows in sweep.cells.items():
        plot(axes, sweep.x, rows, quantity, name, sweep)
    scale_x(axes, sweep)
    scale_y(axes, sweep.rows, quantity)
    _titled(axes, quantity.title.format(reference=sweep.reference).partition(",")[0])
    axes.set_xlabel(sweep.axis.partition(" (")[0], size=7)


def _titled(axes: Axes, title: str) -> None:
    axes.set_title(title, size=NAME, loc="left", pad=4)
    axes.tick_params(labelsize=SMALL)


def _rows_of_keys(count: int) -> int:
    return -(-count // 8)


def _keys(picture: Figure, sweep: Sweep, names: Sequence[str], bottom: float) -> None:
    """The names with their lines, right beneath the subtitle."""
    anchor = (LEFT / WIDTH, bottom / picture.get_figheight())
    lines = [Line2D([], [], label=label(sweep.looks, name), **sweep.looks[name].line(discrete=False)) for name in names]
    shape: dict[str, Any] = {"handletextpad": 0.4, "columnspacing": 0.8, "handlelength": 1.6, "fontsize": SMALL}
    legend = picture.legend(
        handles=lines, loc="lower left", bbox_to_anchor=anchor, ncols=min(len(names), 8), borderaxespad=0, **shape
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_fontweight(weight(sweep.looks[name]))


# --- the dashboard --------------------------------------------------------------------------------


def dashboard(sweep: Sweep, learned: AccuracySweep | None = None) -> Figure | None:
    """All that matters at a glance: time, speed-up, memory, part of the ceiling, exponents, and what is remembered with how much.

    The last panel is left out where nothing was learned. None where nothing is swept.
    """
    if sweep.discrete or not sweep.rows["latency_s"].gt(0).any():
        return None
    quantities = (LATENCY, SPEEDUP, replace(MEMORY, title="Peak memory"), replace(CEILING, title="Percent of the ceiling"))
    over = [one for one in quantities if sweep.rows[one.column].gt(0).any()]
    drawn: list[Any] = [lambda axes, one=one: _over(axes, sweep, one) for one in over]
    if sweep.scaling is not None and len(sweep.scaling):
        drawn.append(lambda axes: _exponents(axes, sweep))
    notes = ["exponents: p of the law a + b·nᵖ that fits latency, with its interval; hollow: of the FLOPs that are declared"]
    asked = None if learned is None else learned.at_last(learned.trained)
    if learned is not None and asked is not None and asked["attention"].isin(list(sweep.cells)).any():
        drawn.append(lambda axes: _recall(axes, sweep, asked))
        task = (
            f"{asked[name].iloc[0]:.0f} {what}" for name, what in (("num_pairs", "pairs"), ("seq_len", "tokens")) if name in asked
        )
        notes.append(f"recall: {', '.join([str(asked['task'].iloc[0]), *task])}")
    columns, plotted, below = 3, 1.35, 0.5
    rows = -(-len(drawn) // columns)
    width = (WIDTH - LEFT - RIGHT - GAP * (columns - 1)) / columns
    high = rows * (plotted + ABOVE) + (rows - 1) * below
    picture = headed("The study at a glance", subtitle(sweep, *notes), FOOT + high + LEGEND * _rows_of_keys(len(sweep.cells)) - 0.1)
    for number, draw in enumerate(drawn):
        row, column = divmod(number, columns)
        bottom = FOOT + (rows - 1 - row) * (plotted + ABOVE + below)
        draw(placed(picture, LEFT + column * (width + GAP), bottom, width, plotted))
    _keys(picture, sweep, list(sweep.cells), FOOT + high + 0.02)
    return picture


def _exponents(axes: Axes, sweep: Sweep) -> None:
    """A row an attention: the exponent of its latency with the interval, and the declared one."""
    assert sweep.scaling is not None
    fits: dict[Any, Any] = sweep.scaling[sweep.scaling["quantity"] == "latency"].set_index("attention").to_dict("index")
    for row, name in enumerate(sweep.cells):
        fit, look = fits.get(name, {}), sweep.looks[name]
        axes.hlines(row, fit.get("exponent_low", np.nan), fit.get("exponent_high", np.nan), color=look.colour, linewidth=1.2)
        axes.plot([fit.get("exponent", np.nan)], [row], gid=name, **look.line(discrete=True))
        hollow = {"markerfacecolor": "none", "markeredgecolor": look.colour, "markeredgewidth": 0.9, "markersize": 6.5}
        axes.plot([fit.get("declared_exponent", np.nan)], [row], gid=f"{name} declared", **look.line(discrete=True) | hollow)
    axes.set(ylim=(len(sweep.cells) - 0.5, -0.5), yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _titled(axes, "Exponent of latency")
    axes.set_xlabel("p", size=7)


def _recall(axes: Axes, sweep: Sweep, asked: pd.DataFrame) -> None:
    """Accuracy against state, of those that the sweep has."""
    for name, own in asked[asked["attention"].isin(list(sweep.cells))].groupby("attention", sort=False):
        look, row = sweep.looks[str(name)], own.iloc[-1]
        axes.vlines(row["state_bytes"], row["accuracy_low"], row["accuracy_high"], color=look.colour, linewidth=1.2, alpha=0.6)
        axes.plot([row["state_bytes"]], [row["accuracy"]], gid=f"{name} recall", **look.line(discrete=True))
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.04)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    _titled(axes, "Accuracy of recall")
    axes.set_xlabel("state after the sequence", size=7)
