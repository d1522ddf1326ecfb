"""Line plots over the swept setting: a metric with its interval, and the power law that was fitted to it.

The intervals are columns of the table, which seaborn's line plots cannot take: they estimate intervals from raw samples.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evals.plots.descriptions import subtitle
from evals.plots.layout import (
    BODY,
    Numbers,
    add_legend,
    failure_handles,
    legend_height,
    mark_failures,
    name_rows,
    new_figure,
    scale_metric,
    scale_settings,
)
from evals.plots.style import GREY, Style, style_of
from evals.results.formatting import format_estimate
from evals.results.frames import Sweep
from evals.results.metrics import LATENCY, PEAK_MEMORY, ROOFLINE, SPEEDUP, THROUGHPUT, Metric
from evals.stats.intervals import CONFIDENCE

LINE_METRICS = (LATENCY, THROUGHPUT, PEAK_MEMORY, SPEEDUP, ROOFLINE)
"""The metrics with a line plot."""
FITTED = {"latency": LATENCY, "memory": PEAK_MEMORY}
"""The metric of each quantity that scaling.csv has fits of."""
BOUNDS = {"compute": "bound by compute", "memory": "bound by memory bandwidth", "": "bound by: unknown"}
FACES = {"memory": "white", "": "#bbbbbb"}
"""Fill of markers by what bounds the roofline there; for compute it is the attention's own colour."""


# --- a metric ----------------------------------------------------------------------------------------


def line_plot(sweep: Sweep, metric: Metric) -> Figure | None:
    """Draws a metric over the swept setting, with the marks of failures above the plot.

    Returns:
        None if the metric is the roofline and the table has none.
    """
    measured = sweep.rows[metric.column].gt(0).any()
    if metric is ROOFLINE and not measured:
        return None
    styles = style_of(sweep.attentions)
    crossings = crossings_with_reference(sweep) if metric is SPEEDUP else {}
    notes = ["roofline: the least time that the measured compute and memory bandwidth of this machine allow"] * (metric is ROOFLINE)
    notes += [f"rings: where it crosses {sweep.reference}; bars and brackets: {CONFIDENCE:.0%} interval of that"] * bool(crossings)
    details = {name: f"crosses at {', '.join(map(_describe_crossing, found))}" for name, found in crossings.items()}
    figure, axes = _new_plot(
        sweep, metric.title(sweep.reference), subtitle(sweep, *notes, sampled=bool(metric.low)), styles, details
    )
    scale_settings(axes, sweep.values, sweep.axis, categories=sweep.discrete)
    for index, (name, rows) in enumerate(sweep.by_attention.items()):
        x = sweep.x + (0.7 * ((index + 0.5) / len(sweep.by_attention) - 0.5) if sweep.discrete else 0.0)
        draw_line(axes, x, rows, metric, styles[name], name, discrete=sweep.discrete)
        if metric is ROOFLINE:
            _mark_bounds(axes, x, rows, styles[name], name)
        _ring_crossings(axes, crossings.get(name, []), styles[name], name)
    if measured:
        scale_metric(axes, sweep.rows, metric)
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no cell gave a number", transform=axes.transAxes, ha="center", color=GREY)
    if metric in (SPEEDUP, ROOFLINE):
        axes.axhline(1.0, color=GREY, linewidth=0.8, zorder=1, gid="parity")
    extra = [*failure_handles(sweep.rows["outcome"]), *(_bound_handles(sweep) if metric is ROOFLINE else [])]
    add_legend(axes, styles, order_of_ends(sweep, metric), details, extra, discrete=sweep.discrete)
    return figure


def _new_plot(
    sweep: Sweep, title: str, words: Sequence[str], styles: Mapping[str, Style], details: Mapping[str, str]
) -> tuple[Figure, Axes]:
    """A figure with one plot, and above it a row of marks for each attention that failed anywhere."""
    failed = sweep.failed
    strip = 0.17 * len(failed) + 0.06
    legend = legend_height([*sweep.by_attention, *failed], 2 if details else 1)
    figure = new_figure(title, words, max(BODY, legend) + strip * bool(failed))
    if not failed:
        return figure, figure.subplots()
    grid = figure.add_gridspec(2, 1, height_ratios=[strip, BODY])
    axes = figure.add_subplot(grid[1])
    rows = figure.add_subplot(grid[0], sharex=axes, facecolor="#f5f5f5")
    for row, (name, outcomes) in enumerate(failed.items()):
        mark_failures(rows, sweep.x, outcomes, row, styles[name], name)
    name_rows(rows, list(failed), styles)
    rows.grid(visible=False)
    rows.spines[:].set_visible(False)
    rows.tick_params(labelbottom=False, length=0, labelsize=7)
    return figure, axes


def draw_line(
    axes: Axes, x: Numbers, rows: pd.DataFrame, metric: Metric, style: Style, name: str, *, discrete: bool = False
) -> None:
    """Draws a metric of one attention with its interval: a bar at each point, and a band between neighbours.

    Args:
        axes: the axes to draw in.
        x: the position of each row; a row without a number leaves a gap.
        rows: the rows of the attention.
        metric: the column to draw.
        style: the style of the attention.
        name: becomes the id of the line.
        discrete: draws points and bars only.
    """
    y = rows[metric.column].to_numpy(float)
    axes.plot(x, y, gid=name, zorder=2 + style.width, **style.line(discrete))
    if metric.low and metric.high:
        low, high = (np.where(np.isfinite(y), rows[column].to_numpy(float), np.nan) for column in (metric.low, metric.high))
        axes.vlines(x, low, high, color=style.colour, linewidth=1.0, alpha=0.6, zorder=2)
        if not discrete:
            axes.fill_between(x, low, high, color=style.colour, alpha=0.16, linewidth=0)


def order_of_ends(sweep: Sweep, metric: Metric) -> list[str]:
    """The attentions in the order in which their lines end, from top to bottom; those without a number come last."""
    ends = {name: cells[metric.column].dropna().iloc[-1:].sum() for name, cells in sweep.by_attention.items()}
    return sorted(ends, key=lambda name: -ends[name])


def _mark_bounds(axes: Axes, x: Numbers, cells: pd.DataFrame, style: Style, name: str) -> None:
    """Fills markers by what bounds the roofline: compute or memory bandwidth."""
    bounds, y = cells["bound"].fillna("").to_numpy(str), cells[ROOFLINE.column].to_numpy(float)
    for bound, face in FACES.items():
        chosen = (bounds == bound) & np.isfinite(y)
        if chosen.any():
            mark = {"markerfacecolor": face, "markeredgecolor": style.colour, "markeredgewidth": 1.0}
            axes.plot(x[chosen], y[chosen], gid=f"{name} {bound or 'unknown'}", zorder=2.1 + style.width, **style.line(True) | mark)


def _bound_handles(sweep: Sweep) -> list[Line2D]:
    present = set(sweep.rows.loc[sweep.rows[ROOFLINE.column].notna(), "bound"].fillna("").astype(str))
    mark: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 4.5, "markeredgecolor": "black", "markeredgewidth": 1}
    return [
        Line2D([], [], markerfacecolor=FACES.get(bound, "black"), label=words, **mark)
        for bound, words in BOUNDS.items()
        if bound in present
    ]


# --- crossings with the reference ----------------------------------------------------------------------


class Crossing(NamedTuple):
    """A setting at which an attention is as fast as the reference, with the ends of its interval (the setting if unknown)."""

    at: float
    low: float
    high: float


def crossings_with_reference(sweep: Sweep) -> dict[str, list[Crossing]]:
    """The crossings of each attention with the reference within the range of the sweep, in ascending order."""
    crossings: dict[str, list[Crossing]] = {}
    if sweep.crossovers is None or sweep.discrete:
        return crossings
    for row in sweep.crossovers.sort_values("at", kind="stable").to_dict("records"):
        others = [name for name in (str(row["first"]), str(row["second"])) if name != sweep.reference]
        if len(others) == 1 and others[0] in sweep.by_attention and sweep.x[0] <= row["at"] <= sweep.x[-1]:
            low, high = (row["at"] if math.isnan(row[end]) else row[end] for end in ("at_low", "at_high"))
            crossings.setdefault(others[0], []).append(Crossing(row["at"], low, high))
    return crossings


def _describe_crossing(crossing: Crossing) -> str:
    at, low, high = map(format_estimate, crossing)
    return f"{at} [{low} to {high}]" if crossing.low < crossing.high else at


def _ring_crossings(axes: Axes, crossings: Sequence[Crossing], style: Style, name: str) -> None:
    """Rings each crossing on the line of the reference, with a bar as long as its interval."""
    left, right = axes.get_xlim()
    ring: dict[str, Any] = {"marker": "o", "markersize": 7, "markerfacecolor": "none", "markeredgewidth": 0.9}
    for crossing in crossings:
        axes.plot([crossing.at], [1.0], gid=f"{name} crossing", color=style.colour, markeredgecolor=style.colour, zorder=6, **ring)
        ends = np.clip([crossing.low, crossing.high], left, right)
        axes.plot(ends, [1.0, 1.0], gid=f"{name} interval", color=style.colour, linewidth=3, alpha=0.5, solid_capstyle="butt")


# --- power laws --------------------------------------------------------------------------------------


def scaling_plot(sweep: Sweep, quantity: str) -> Figure | None:
    """Draws latency or memory (`quantity`) over length as points, and through them the power law that was fitted to it.

    Returns:
        None if the swept setting is not the length, or there is no fit or no number.
    """
    if sweep.scaling is None or sweep.column != "seq_len" or sweep.discrete:
        return None
    metric = FITTED[quantity]
    rows = sweep.scaling[sweep.scaling["quantity"] == quantity].drop_duplicates("attention", keep="last")
    fits: dict[str, Any] = {str(row["attention"]): row for row in rows.to_dict("records") if row["attention"] in sweep.by_attention}
    if not fits or not sweep.rows[metric.column].gt(0).any():
        return None
    styles = style_of(sweep.attentions)
    details = {name: describe_exponent(fits.get(name, {})) for name in sweep.by_attention}
    declared = ", and the p of the FLOPs that the attention declares" if rows["declared_exponent"].notna().any() else ""
    title = f"{'Latency' if quantity == 'latency' else 'Peak memory'} over length n, with the fitted power law a + b·nᵖ"
    words = subtitle(sweep, f"below each name: p with its {CONFIDENCE:.0%} interval{declared}")
    figure, axes = _new_plot(sweep, title, words, styles, details)
    for name, cells in sweep.by_attention.items():
        draw_line(axes, sweep.x, cells, metric, styles[name], name, discrete=True)
        fit, measured = fits.get(name, {}), sweep.x[np.isfinite(cells[metric.column].to_numpy(float))]
        if _is_fitted(fit) and len(measured):
            n = np.geomspace(max(measured[0], 1), measured[-1], 200)
            law = fit["overhead"] + fit["factor"] * n ** fit["exponent"]
            line = styles[name].line() | {"marker": "none"}
            axes.plot(n, np.where(law > 0, law, np.nan), gid=f"{name} fit", zorder=2 + styles[name].width, **line)
    scale_settings(axes, sweep.values, sweep.axis)
    scale_metric(axes, sweep.rows, metric)
    add_legend(axes, styles, order_of_ends(sweep, metric), details, failure_handles(sweep.rows["outcome"]))
    return figure


def _is_fitted(fit: Mapping[str, Any]) -> bool:
    """Whether a law can be drawn; one dominated by its overhead can, although its exponent is not valid."""
    return all(math.isfinite(fit.get(part, math.nan)) for part in ("overhead", "factor", "exponent"))


def describe_exponent(fit: Mapping[str, Any]) -> str:
    """The exponent with its interval and the declared one, or the reason for its absence."""
    note = fit.get("note")
    if isinstance(note, str) and note.strip():
        return note
    if not _is_fitted(fit):
        return "not fitted"
    words = f"{fit['exponent']:.2f}"
    if math.isfinite(fit["exponent_low"]) and math.isfinite(fit["exponent_high"]):
        words += f" ({fit['exponent_low']:.2f} to {fit['exponent_high']:.2f})"
    declared = fit.get("declared_exponent", math.nan)
    return words if pd.isna(declared) else f"{words}, declared {declared:.3g}"
