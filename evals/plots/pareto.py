"""Latency against peak memory, and the Pareto front: the attentions that no other beats in both."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evals.plots.descriptions import subtitle
from evals.plots.layout import Numbers, add_legend, log_limits, new_figure, scale_log
from evals.plots.style import FAILURES, Style, style_of
from evals.results.frames import Sweep
from evals.results.metrics import BYTES, LATENCY, PEAK_MEMORY
from evals.stats.pareto import pareto_front

X, Y = LATENCY.column, PEAK_MEMORY.column


def pareto(sweep: Sweep, *, parameters: bool = False) -> Figure | None:
    """Draws latency and peak memory at the greatest setting, or at each of the first three if settings have no order.

    If `parameters` is true, a disc around each point has an area proportional to the parameters.

    Returns:
        None if no setting has two attentions to choose from, or if the parameters to draw are unknown.
    """
    points = sweep.rows[(sweep.rows[X] > 0) & (sweep.rows[Y] > 0)]
    choices = points[sweep.column].value_counts()
    comparable = [value for value in sweep.values if choices.get(value, 0) > 1]
    values = comparable[-1:] if sweep.ordered else comparable[:3]
    most = points["parameter_bytes"].max()
    if not values or (parameters and not most > 0):
        return None
    points = points[points[sweep.column].isin(values)]
    names = [sweep.at(sweep.values.index(value)) for value in values]
    title = f"Latency and peak memory{f' at {names[0]}' if len(values) == 1 else ''}, lower left is better"
    front = "line: the Pareto front; no other attention beats one on it in both"
    disc = f"area of a disc: parameters, at most {BYTES.format(most, digits=2)}" if parameters else ""
    absent = "; ".join(_describe_absent(sweep, value) for value in values)
    note = "; ".join(filter(None, (front, disc, absent)))
    figure = new_figure(title, subtitle(sweep, note))
    panels = figure.subplots(1, len(values), sharex=True, sharey=True, squeeze=False)[0]
    panels[0].set(xlim=log_limits(points[X].min(), points[X].max()), ylim=log_limits(points[Y].min(), points[Y].max()))
    scale_log(panels[0].xaxis, 10, LATENCY.unit.format, ticks=9 // len(values))
    scale_log(panels[0].yaxis, 2, PEAK_MEMORY.unit.format)
    styles = style_of(sweep.attentions)
    for axes, value, name in zip(panels, values, names, strict=True):
        _draw_points(axes, points[points[sweep.column] == value], styles, parameters=parameters)
        axes.set(xlabel=LATENCY.label, ylabel=PEAK_MEMORY.label, title=name if len(values) > 1 else "")
        axes.label_outer()
    add_legend(panels[-1], styles, [name for name in sweep.by_attention if name in set(points["attention"])], discrete=True)
    return figure


def _draw_points(axes: Axes, rows: pd.DataFrame, styles: Mapping[str, Style], *, parameters: bool) -> None:
    """Draws the attentions of one setting with the intervals of their latencies, and their front."""
    names = list(styles)
    colours = {name: style.colour for name, style in styles.items()}
    markers = {name: style.marker for name, style in styles.items()}
    if parameters:
        area = 550 * rows["parameter_bytes"] / rows["parameter_bytes"].max()
        axes.scatter(rows[X], rows[Y], area, rows["attention"].map(colours), alpha=0.25, zorder=1.8, gid="parameters")
    axes.hlines(
        rows[Y],
        rows[LATENCY.low],
        rows[LATENCY.high],
        colors=[colours[name] for name in rows["attention"]],
        linewidth=1.2,
        alpha=0.6,
    )
    by_name = {"hue": "attention", "style": "attention", "hue_order": names, "style_order": names}
    sns.scatterplot(rows, x=X, y=Y, **by_name, palette=colours, markers=markers, s=45, zorder=3, legend=False, ax=axes)
    draw_front(axes, rows[X].to_numpy(float), rows[Y].to_numpy(float))


def draw_front(axes: Axes, x: Numbers, y: Numbers, *, higher_is_better: bool = False) -> None:
    """Draws the Pareto front as steps from the upper or lower edge to the right one: less x is better, and less or more y."""
    on_front = pareto_front(np.column_stack([x, y]).tolist(), (False, higher_is_better))
    best = sorted(np.flatnonzero(on_front), key=lambda index: x[index])
    edge = axes.get_ylim()[0 if higher_is_better else 1]
    steps_x, steps_y = [x[best[0]], *x[best], axes.get_xlim()[1]], [edge, *y[best], y[best[-1]]]
    axes.step(steps_x, steps_y, where="post", color="#9a9a9a", linewidth=1.6, zorder=1.5, gid="front")


def _describe_absent(sweep: Sweep, value: Any) -> str:
    """Names the attentions without a point at a setting, and the reasons."""
    reasons = []
    for name, rows in sweep.by_attention.items():
        row = rows.loc[value]
        if row["outcome"] in FAILURES:
            reasons.append(f"{name} ({row['outcome']})")
        elif not (row[X] > 0 and row[Y] > 0):
            reasons.append(f"{name} (not measured)")
    at = f" at {sweep.at(sweep.values.index(value))}" if not sweep.ordered else ""
    return f"not shown{at}: {', '.join(reasons)}" if reasons else ""
