"""Lines over the swept setting: a quantity with its interval, the law that was fitted to it, where two attentions cross.

Above the plot are lanes, one an attention: marks of the cells that failed, and the crossings with the
reference. They cover no data, and no data covers them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from evals.plots.layout import (
    EDGE,
    LEFT,
    LEGEND,
    NAME,
    SMALL,
    WIDTH,
    Numbers,
    headed,
    label,
    log_limits,
    placed,
    spread,
    subtitle,
    weight,
    wide,
)
from evals.plots.style import FAILURES, GREY, MARK
from evals.results.formatting import format_bytes, format_estimate, format_seconds
from evals.results.frames import Sweep
from evals.results.metrics import COUNT
from evals.stats.intervals import CONFIDENCE

PLOT, FOOT, LANE, GAP = 2.9, 0.45, 0.15, 0.07  # heights in inches
KEY = (1.02, 1.045, 1.07)  # of a line's key beside the plot, and where its name begins, in widths of the plot
WORD = 1.082
BENEATH = 0.115  # inches from the middle of a name to that of its detail


def _pitch(details: Mapping[str, str]) -> float:
    """Inches from a name to the next."""
    return 0.27 if any(details.values()) else 0.151


@dataclass(frozen=True)
class Quantity:
    """One figure: `column` over the swept setting, between `low` and `high` where it has an interval.

    `base` is the ratio that one step of the ticks should mean: doublings for memory and speed-ups. An
    `optional` quantity is left out of a sweep that has no number of it.
    """

    name: str
    title: str
    column: str
    low: str | None = None
    high: str | None = None
    tick: Callable[[float], str] = str
    base: int = 10
    optional: bool = False


LATENCY = Quantity(
    *("latency", "Latency, lower is better"),
    *("latency_s", "latency_low_s", "latency_high_s"),
    tick=format_seconds,
)
MEMORY = Quantity(
    *("peak_memory", "Peak memory above inputs and parameters, lower is better", "peak_bytes"),
    tick=format_bytes,
    base=2,
)
THROUGHPUT = Quantity(
    *("throughput", "Throughput in tokens/s (k = 1000), higher is better"),
    *("tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"),
    tick=COUNT.format,
)
SPEEDUP = Quantity(
    *("speedup", "Speed-up over {reference}, higher is better"),
    *("speedup", "speedup_low", "speedup_high"),
    tick=lambda value: f"{value:g}×",
    base=2,
)
CEILING = Quantity(
    *("ceiling", "Percent of this machine's ceiling, higher is better", "roofline_fraction"),
    tick=lambda value: f"{100 * value:g} %",
    optional=True,
)
QUANTITIES = (LATENCY, THROUGHPUT, MEMORY, SPEEDUP, CEILING)
LIMITS = {"compute": "bound by compute", "memory": "bound by memory bandwidth", "": "bound by: unknown"}
FACES = {"memory": "white", "": "#bbbbbb"}  # of markers, where it is not the attention's own colour


def line_plot(sweep: Sweep, quantity: Quantity) -> Figure | None:
    """One quantity over the swept setting, or None if it may be left out and there is no number of it."""
    shown = sweep.rows[quantity.column].gt(0).any()
    if quantity.optional and not shown:
        return None
    crossings = crossed(sweep) if quantity.name == "speedup" else {}
    keys = _limit_keys(sweep) if quantity.column == "roofline_fraction" else []
    note = "ceiling: the least time that this machine's measured compute and memory bandwidth allow" if keys else ""
    words = subtitle(sweep, note, sampled=quantity.low is not None)
    details = dict.fromkeys(sweep.cells, "")
    title = quantity.title.format(reference=sweep.reference)
    axes, failures, crossing = _frame(sweep, title, words, _crossing_names(sweep, crossings), details, keys)
    for index, (name, rows) in enumerate(sweep.cells.items()):
        aside = 0.7 * ((index + 0.5) / len(sweep.cells) - 0.5) if sweep.discrete else 0.0
        plot(axes, sweep.x + aside, rows, quantity, name, sweep)
    scale_x(axes, sweep)
    if shown:
        scale_y(axes, sweep.rows, quantity)
        _name_ends(axes, sweep, details)
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no cell gave a number", transform=axes.transAxes, ha="center", color=GREY)
    if failures is not None:
        _mark_failures(failures, sweep)
    if crossing is not None:
        _mark_crossings(crossing, axes, sweep, crossings)
    return axes.get_figure()  # type: ignore[return-value]  # these axes are of no subfigure


def _frame(
    sweep: Sweep, title: str, words: str, crossings: Sequence[str], details: Mapping[str, str], keys: Sequence[Line2D]
) -> tuple[Axes, Axes | None, Axes | None]:
    """An empty plot of one height, and above it one lane an attention with failed cells, and one a crossing."""
    failed = len(sweep.failed)
    above = sum(LANE * count + LEGEND + GAP for count in (failed, len(crossings)) if count)
    plot = max(PLOT, _pitch(details) * len(sweep.cells) / 0.96)
    picture = headed(title, words, FOOT + plot + above + (LEGEND if keys else 0) + 0.02)
    # Names stand right of the plot, and the plot takes what they leave.
    room = max([0.95, *(wide(label(sweep.looks, name), NAME, weight(sweep.looks[name])) for name in sweep.cells)])
    room = max([room, *(wide(words, NAME) for words in crossings), *(wide(detail, SMALL) for detail in details.values())])
    if crossings:
        room = max(room, wide(_heading(sweep), 7) - 0.25)  # it begins further left
    right = min((WIDTH - EDGE - room + (WORD - 1) * LEFT) / WORD, 0.8 * WIDTH)
    axes = placed(picture, LEFT, FOOT, right - LEFT, plot)
    bottom = FOOT + plot + GAP
    places: list[Axes | None] = [None, None]
    for which, count in ((1, len(crossings)), (0, failed)):
        if count:
            places[which] = placed(picture, LEFT, bottom, right - LEFT, LANE * count, sharex=axes)
            bottom += LANE * count + LEGEND + GAP
    if keys:
        anchor = (LEFT / WIDTH, (bottom - GAP + 0.05) / picture.get_figheight())
        picture.legend(handles=list(keys), loc="lower left", bbox_to_anchor=anchor, ncols=len(keys), borderaxespad=0)
    return axes, places[0], places[1]


def plot(axes: Axes, x: Numbers, rows: pd.DataFrame, quantity: Quantity, name: str, sweep: Sweep) -> None:
    """One attention, with a gap wherever there is no number."""
    look = sweep.looks[name]
    y = rows[quantity.column].to_numpy(float)
    axes.plot(x, y, label=name, gid=name, zorder=2 + look.width, **look.line(sweep.discrete))
    if quantity.column == "roofline_fraction":
        limits = rows["bound"].fillna("").to_numpy(str)
        for limit, face in FACES.items():
            marked = (limits == limit) & np.isfinite(y)
            if marked.any():
                edge = {"markerfacecolor": face, "markeredgecolor": look.colour, "markeredgewidth": 1.0}
                mark = look.line(discrete=True) | edge
                axes.plot(x[marked], y[marked], gid=f"{name} {limit or 'unknown'}", zorder=2.1 + look.width, **mark)
    if quantity.low is None or quantity.high is None:
        return
    low, high = rows[quantity.low].to_numpy(float), rows[quantity.high].to_numpy(float)
    known = np.isfinite(y) & np.isfinite(low) & np.isfinite(high)
    # A band needs two neighbours; a point that stands alone gets a bar.
    beside = (np.append(known[1:], False) | np.append(False, known[:-1])) & (not sweep.discrete)
    axes.fill_between(x, low, high, where=(known & beside).tolist(), color=look.colour, alpha=0.16, linewidth=0)
    bars = known & ~beside
    axes.vlines(x[bars], low[bars], high[bars], color=look.colour, linewidth=1.2, zorder=2)


def _limit_keys(sweep: Sweep) -> list[Line2D]:
    """What the fill of a marker says, as far as any says it."""
    rows = sweep.rows[sweep.rows["roofline_fraction"].notna()]
    found = set(rows["bound"].fillna("").astype(str))
    mark: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 4.5, "markeredgecolor": "black", "markeredgewidth": 1}
    keys = ((words, FACES.get(limit, "black")) for limit, words in LIMITS.items() if limit in found)
    return [Line2D([], [], markerfacecolor=face, label=words, **mark) for words, face in keys]


def scale_x(axes: Axes, sweep: Sweep) -> None:
    """Scales and names the axis of the swept setting; ticks that have no room are left out."""
    x, names = sweep.x, sweep.ticks
    if sweep.discrete:
        axes.set_xlim(x[0] - 0.5, x[-1] + 0.5)
        axes.grid(False, axis="x")
    elif x[0] > 0:
        axes.set_xscale("log", base=2)
        margin = (x[-1] / x[0]) ** 0.03
        axes.set_xlim(x[0] / margin, x[-1] * margin)
    else:
        axes.set_xlim(x[0] - 0.03 * (x[-1] - x[0]), x[-1] + 0.03 * (x[-1] - x[0]))
    # In inches, each name needs its place; the last of them comes first, since the most is claimed of it.
    middle = np.asarray(axes.transScale.transform(np.column_stack([x, np.ones_like(x)])))[:, 0]
    left, right = (axes.transScale.transform((limit, 1))[0] for limit in axes.get_xlim())
    middle = (middle - left) / (right - left) * axes.get_position().width * WIDTH
    kept: list[int] = []
    for at in reversed(range(len(x))):
        if not kept or middle[at] + wide(names[at], 8) / 2 + 0.06 <= middle[kept[-1]] - wide(names[kept[-1]], 8) / 2:
            kept.append(at)
    axes.set_xticks(x[kept[::-1]], [names[at] for at in kept[::-1]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(sweep.axis)


def scale_y(axes: Axes, results: pd.DataFrame, quantity: Quantity) -> None:
    """Scales the axis of a quantity around what rows hold of it, of which one at least is above 0."""
    y = results[quantity.column][results[quantity.column] > 0]
    least, most = y.min(), y.max()
    if quantity.low and quantity.high:
        # An interval may be so wide that it would flatten every line: beyond a factor of 3 it leaves the plot.
        least = max(results[quantity.low].min(), least / 3) if results[quantity.low].notna().any() else least
        most = min(results[quantity.high].max(), most * 3) if results[quantity.high].notna().any() else most
    if quantity.column == "roofline_fraction":
        most = max(most, 1.0)  # how far away the ceiling is, is what the figure shows
    bottom, top = log_limits(least, most)
    decades = math.log10(top / bottom) / 1.08
    steps = (1.0, 2.0, 5.0) if quantity.base == 10 and decades < 2.5 else (1.0,)
    axes.set_yscale("log", base=quantity.base)
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(LogLocator(base=quantity.base, subs=steps, numticks=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity.tick(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    if quantity.column in ("speedup", "roofline_fraction"):
        axes.axhline(1.0, color=GREY, linewidth=0.8, zorder=1, gid="parity")


def _name_ends(axes: Axes, sweep: Sweep, details: Mapping[str, str]) -> None:
    """Writes each name beside the end of its line, in the order of the ends, with a key that reads without colour.

    A detail stands under its name.
    """
    ends = []
    for line in axes.lines:
        points = np.column_stack([np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)])
        points = points[points[:, 1] > 0]
        if line.get_label() in sweep.cells and len(points):
            # From data to fractions of the axes.
            at_x, at_y = (axes.transScale + axes.transLimits).transform(points[-1])
            ends.append((float(at_y), float(at_x), str(line.get_label())))
    ends.sort()
    last_x = max(at_x for _, at_x, _ in ends)
    in_axes: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    tall = axes.bbox.height / axes.figure.dpi  # in inches
    for height, (at_y, at_x, name) in zip(spread([end[0] for end in ends], _pitch(details) / tall), ends, strict=True):
        look = sweep.looks[name]
        if at_x == last_x and not sweep.discrete:
            axes.add_line(Line2D([at_x, KEY[0]], [at_y, height], color=look.colour, linewidth=0.5, alpha=0.6, **in_axes))
        axes.add_line(Line2D(KEY, [height] * 3, markevery=[1], **look.line(sweep.discrete), **in_axes))
        words = label(sweep.looks, name)
        axes.text(WORD, height, words, va="center_baseline", size=NAME, weight=weight(look), transform=axes.transAxes)
        if details[name]:
            below = height - BENEATH / tall
            axes.text(WORD, below, details[name], va="center_baseline", size=SMALL, color=GREY, transform=axes.transAxes)


# --- lanes ---------------------------------------------------------------------------------------------


def _lanes(axes: Axes, heading: str, names: Sequence[str]) -> None:
    """Grey lanes with a name each, and what they are right above the names."""
    axes.set_facecolor("#f5f5f5")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    aside: dict[str, Any] = {"va": "center_baseline", "transform": axes.get_yaxis_transform()}
    for lane, name in enumerate(names):
        axes.text(WORD, lane, name, size=NAME, **aside)
    axes.text(KEY[0], -1.2, heading, size=7, color=GREY, **aside)


def _mark_failures(lanes: Axes, sweep: Sweep) -> None:
    """One lane an attention, one mark a failed cell, and what the marks mean."""
    _lanes(lanes, "failed", [label(sweep.looks, name) for name in sweep.failed])
    legend: dict[str, Line2D] = {}
    for outcome, mark in FAILURES.items():
        for lane, (name, outcomes) in enumerate(sweep.failed.items()):
            at = sweep.x[(outcomes == outcome).to_numpy()]
            if len(at):
                colour = sweep.looks[name].colour
                lanes.plot(at, np.full(len(at), lane), marker=mark, color=colour, gid=f"{name} {outcome}", **MARK)
                legend[outcome] = Line2D([], [], marker=mark, color="black", label=outcome, **MARK)
    lanes.legend(handles=list(legend.values()), loc="lower left", bbox_to_anchor=(0, 1), ncols=len(legend), columnspacing=0.5)


Crossing = tuple[float, float, float]


def crossed(sweep: Sweep) -> dict[str, list[Crossing]]:
    """Where each attention crosses the reference within the range, as (at, low, high), the first to cross first."""
    found: dict[str, list[Crossing]] = {}
    if sweep.crossovers is None or sweep.discrete:
        return found
    for row in sweep.crossovers.sort_values("at", kind="stable").to_dict("records"):
        pair = [str(row["first"]), str(row["second"])]
        if sweep.reference not in pair or not sweep.x[0] <= row["at"] <= sweep.x[-1]:
            continue
        pair.remove(sweep.reference)
        if pair[0] in sweep.cells:
            low, high = (row["at"] if math.isnan(row[end]) else row[end] for end in ("at_low", "at_high"))
            found.setdefault(pair[0], []).append((row["at"], low, high))
    return found


def _heading(sweep: Sweep) -> str:
    return f"crosses {label(sweep.looks, sweep.reference)} at"


def _crossing_names(sweep: Sweep, crossings: Mapping[str, Sequence[Crossing]]) -> list[str]:
    return [
        f"{label(sweep.looks, name)} {', '.join(format_estimate(at) for at, _, _ in places)}" for name, places in crossings.items()
    ]


def _mark_crossings(lanes: Axes, axes: Axes, sweep: Sweep, crossings: Mapping[str, Sequence[Crossing]]) -> None:
    """One lane an attention: a bar as long as the interval, and in the plot a ring on the line that is crossed."""
    _lanes(lanes, _heading(sweep), _crossing_names(sweep, crossings))
    note = f"where it crosses, with its {CONFIDENCE:.0%} interval"
    lanes.text(0, -1.2, note, size=7, color=GREY, va="center_baseline", transform=lanes.get_yaxis_transform())
    left, right = axes.get_xlim()
    for lane, (name, places) in enumerate(crossings.items()):
        look = sweep.looks[name]
        mark = look.line(discrete=True)
        for at, low, high in places:
            bar = np.clip([low, high], left, right)
            lanes.plot(bar, [lane] * 2, color=look.colour, linewidth=2.2, alpha=0.45, solid_capstyle="butt", gid=f"{name} interval")
            lanes.plot([at], [lane], gid=f"{name} crossing", **mark)
            ring: dict[str, Any] = {"marker": "o", "markersize": 7, "markerfacecolor": "none", "markeredgewidth": 0.9}
            axes.plot([at], [1.0], gid=f"{name} crossing", color=look.colour, markeredgecolor=look.colour, zorder=6, **ring)


# --- scaling -------------------------------------------------------------------------------------------

LAWS = {
    "latency": ("Latency over length n, with the law a + b·nᵖ that fits it", LATENCY),
    "memory": ("Peak memory over length n, with the law a + b·nᵖ that fits it", MEMORY),
}


def scaling_plot(sweep: Sweep, which: str) -> Figure | None:
    """`which` (latency or memory) as points, through them the fitted law, its exponent beside its name.

    None where the swept setting is no length, or nothing was fitted to what is shown.
    """
    if sweep.scaling is None or sweep.column != "seq_len" or sweep.discrete:
        return None
    title, quantity = LAWS[which]
    rows = sweep.scaling[sweep.scaling["quantity"] == which].drop_duplicates("attention", keep="last")
    laws: dict[str, Any] = {str(row["attention"]): row for row in rows.to_dict("records") if row["attention"] in sweep.cells}
    if not laws or not sweep.rows[quantity.column].gt(0).any():
        return None
    details = {name: _exponent(laws.get(name, {})) for name in sweep.cells}
    declared = ", and the p that the attention declares" if rows["declared_exponent"].notna().any() else ""
    words = subtitle(sweep, f"below each name: p with its {CONFIDENCE:.0%} interval{declared}")
    axes, failures, _ = _frame(sweep, title, words, [], details, [])
    for name, cells in sweep.cells.items():
        look = sweep.looks[name]
        y = cells[quantity.column].to_numpy(float)
        axes.plot(sweep.x, y, label=name, gid=name, zorder=3 + look.width, **look.line(discrete=True))
        if quantity.low is not None and quantity.high is not None:
            low, high = cells[quantity.low].to_numpy(float), cells[quantity.high].to_numpy(float)
            known = np.isfinite(y) & np.isfinite(low) & np.isfinite(high)
            axes.vlines(sweep.x[known], low[known], high[known], color=look.colour, linewidth=1, alpha=0.6, zorder=2)
        law, reached = laws.get(name, {}), sweep.x[np.isfinite(y)]
        if _fitted(law) and len(reached):
            n = np.geomspace(max(reached[0], 1), reached[-1], 200)
            fit = law["overhead"] + law["factor"] * n ** law["exponent"]
            style = look.line(discrete=False) | {"marker": "none"}
            axes.plot(n, np.where(fit > 0, fit, np.nan), gid=f"{name} fit", zorder=2 + look.width, **style)
    scale_x(axes, sweep)
    scale_y(axes, sweep.rows, quantity)
    _name_ends(axes, sweep, details)
    if failures is not None:
        _mark_failures(failures, sweep)
    return axes.get_figure()  # type: ignore[return-value]  # these axes are of no subfigure


def _fitted(law: Mapping[str, Any]) -> bool:
    """Whether there is a law to draw: one that is dominated by its overhead still is, it only says nothing of the exponent."""
    return all(math.isfinite(law.get(part, math.nan)) for part in ("overhead", "factor", "exponent"))


def _exponent(law: Mapping[str, Any]) -> str:
    """p (its interval) and what is declared; in its place why there is none."""
    note = law.get("note")
    if isinstance(note, str) and note.strip():
        return note
    if not _fitted(law):
        return "not fitted"
    words = f"{law['exponent']:.2f}"
    if math.isfinite(law["exponent_low"]) and math.isfinite(law["exponent_high"]):
        words += f" ({law['exponent_low']:.2f} to {law['exponent_high']:.2f})"
    declared = law.get("declared_exponent", math.nan)
    return words if pd.isna(declared) else f"{words}, declared {declared:.3g}"
