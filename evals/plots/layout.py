"""The layout of figures: a page with title and subtitle, legends, axes in human units, and marks of failures."""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from evals.plots.style import FAILURES, GREY, MARK, RC, Style
from evals.results.formatting import format_setting, shorten
from evals.results.metrics import Metric

Numbers = NDArray[np.float64]

WIDTH = 7.0
"""Width of every figure in inches: that of a paper, so that points are points in print."""
BODY = 3.3
"""Height of a figure of one panel in inches, without title and subtitle."""
BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}
"""Arguments of `Axes.legend` that put a legend right of the axes."""


# --- the page ----------------------------------------------------------------------------------------


class ShownFigure(Figure):
    """A figure that a notebook shows, although pyplot did not make it."""

    def _repr_png_(self) -> bytes:
        image = BytesIO()
        with style.context(["default", RC]):
            self.savefig(image, format="png")
        return image.getvalue()


def new_figure(title: str, subtitle: Iterable[str], body: float = BODY) -> Figure:
    """Makes a figure with a title, a subtitle, and `body` inches beneath them, in which matplotlib arranges axes and legends.

    Args:
        title: what is drawn, and which direction is better.
        subtitle: machine, settings and remarks; empty ones are left out, long ones wrapped.
        body: inches.
    """
    text = "\n".join(textwrap.fill(line, 134, break_on_hyphens=False) for line in subtitle if line)
    head = 0.38 + 0.118 * (text.count("\n") + 1)
    height = head + body
    figure = ShownFigure(figsize=(WIDTH, height))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, body / height), w_pad=0.06, h_pad=0.05)
    figure.text(0.1 / WIDTH, 1 - 0.08 / height, title, size=9.5, weight="bold", va="top")
    figure.text(0.1 / WIDTH, 1 - 0.29 / height, text, size=7, color=GREY, va="top")
    return figure


def legend_height(names: Sequence[str], lines: int = 1) -> float:
    """Height in inches of a legend that has `lines` lines of text for each name."""
    return 0.3 + (0.04 + 0.115 * lines) * len(names)


def add_legend(
    axes: Axes,
    styles: Mapping[str, Style],
    names: Sequence[str],
    details: Mapping[str, str] | None = None,
    extra: Sequence[Any] = (),
    *,
    discrete: bool = False,
) -> None:
    """Adds a legend right of the axes.

    Args:
        axes: the rightmost of the figure.
        styles: of the attentions.
        names: the attentions, from top to bottom.
        details: a second line beneath a name.
        extra: more handles, such as of failures, beneath the names.
        discrete: markers without lines.
    """
    details = details or {}
    labels = {name: "\n".join(filter(None, (short_name(name), details.get(name)))) for name in names}
    handles = [Line2D([], [], label=" ", **styles[name].line(discrete)) for name in labels]
    legend = axes.legend(handles=[*handles, *extra], handlelength=1 if discrete else 2.8, **BESIDE)
    for text, name in zip(legend.get_texts(), labels, strict=False):
        text.set_text(labels[name])  # a handle whose label begins with _ would be left out
        text.set_fontweight("normal" if details.get(name) else styles[name].weight)
        text.set_gid(f"{name} legend")


def short_name(name: str) -> str:
    """The name of an attention, shortened in the middle if it is too long for a legend."""
    return shorten(name, 24)


def name_rows(axes: Axes, names: Sequence[str], styles: Mapping[str, Style], first: float = 0.0) -> None:
    """Labels the rows of axes, from top to bottom, at y = first, first + 1, …"""
    axes.set_yticks([row + first for row in range(len(names))], [short_name(name) for name in names], rotation=0)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight(styles[name].weight)
    axes.set_ylim(len(names) - 0.5 + first, first - 0.5)
    axes.set_ylabel("")


# --- axes --------------------------------------------------------------------------------------------


def scale_log(axis: XAxis | YAxis, base: int, write: Callable[[float], str], ticks: int = 7) -> None:
    """Makes an axis logarithmic, with ticks at powers of `base` that `write` labels (1, 2, 5 times a power in a short range)."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=base)
    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if base == 10 and high / low < 10**2.5 else (1.0,)
    axis.set_major_locator(LogLocator(base=base, subs=steps, numticks=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axis.set_minor_locator(NullLocator())


def log_limits(low: float, high: float, span: float = 4.0) -> tuple[float, float]:
    """Limits of a logarithmic axis around its data. A span under 4 would magnify noise."""
    span = max(1.06 * high / low, span)
    middle = math.sqrt(low * high)
    return middle / span**0.54, middle * span**0.54


def scale_metric(axes: Axes, rows: pd.DataFrame, metric: Metric) -> None:
    """Scales the y axis for a metric of which at least one row is above 0.

    An interval that would flatten every line is cut: at a factor of 3 beyond the values.
    """
    values = rows[metric.column][rows[metric.column] > 0]
    low, high = float(values.min()), float(values.max())
    if metric.low and metric.high and rows[metric.low].notna().any():
        low, high = max(float(rows[metric.low].min()), low / 3), min(float(rows[metric.high].max()), high * 3)
    if metric.column == "roofline_fraction":
        high = max(high, 1.0)  # the distance to the roofline is what the figure shows
    axes.set_ylim(log_limits(low, high))
    scale_log(axes.yaxis, metric.log_base, metric.unit.format, ticks=10)


def scale_settings(axes: Axes, values: Sequence[Any], label: str, *, categories: bool = False) -> None:
    """Scales the x axis for the values of a setting, and leaves out tick labels that have no room.

    Values are ascending numbers, or categories, which stand at 0, 1, …
    """
    x = np.arange(len(values), dtype=float) if categories else np.asarray(values, float)
    if categories:
        axes.set_xlim(-0.5, len(values) - 0.5)
        axes.grid(visible=False, axis="x")
        fraction = (x + 0.5) / len(x)
    else:
        log = x[0] > 0 and x[-1] > x[0]
        scaled = np.log2(x) if log else x
        margin = 0.03 * (scaled[-1] - scaled[0]) or 0.5
        limits = np.array([scaled[0] - margin, scaled[-1] + margin])
        if log:
            axes.set_xscale("log", base=2)
        axes.set_xlim(*(2**limits if log else limits))
        fraction = (scaled - limits[0]) / (limits[1] - limits[0])
    # Labels of small panels are as large as those of large ones.
    room = 0.42 / (axes.get_position().width * WIDTH)
    labelled: list[int] = []
    for index in reversed(range(len(x))):  # the greatest value always has a label
        if not labelled or fraction[labelled[0]] - fraction[index] >= room or categories:
            labelled.insert(0, index)
    axes.xaxis.set_major_locator(FixedLocator(x[labelled].tolist()))
    axes.set_xticks(x[labelled], [format_setting(values[index]) for index in labelled])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


# --- failures ----------------------------------------------------------------------------------------


def mark_failures(axes: Axes, x: Numbers, outcomes: "pd.Series[str]", y: float, style: Style, name: str) -> None:
    """Marks each failure of an attention at height `y`, in the attention's colour."""
    for outcome, marker in FAILURES.items():
        failed = x[(outcomes == outcome).to_numpy()]
        if len(failed):
            axes.plot(failed, [y] * len(failed), marker=marker, color=style.colour, gid=f"{name} {outcome}", **MARK)


def failure_handles(outcomes: Iterable[str]) -> list[Line2D]:
    """Legend handles of those outcomes that are failures."""
    present = set(outcomes)
    return [Line2D([], [], marker=FAILURES[name], color="black", label=name, **MARK) for name in FAILURES if name in present]
