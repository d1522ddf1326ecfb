"""Figures of several metrics: all attentions at a few lengths, decoding over the context, and the dashboard of the study."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from evals.plots.accuracy import AccuracySweep
from evals.plots.descriptions import subtitle
from evals.plots.layout import BESIDE, add_legend, name_rows, new_figure, scale_log, scale_metric, scale_settings
from evals.plots.lines import draw_line
from evals.plots.memory import representatives
from evals.plots.style import FAILURES, GREY, style_of
from evals.results.formatting import format_setting
from evals.results.frames import Sweep
from evals.results.metrics import LATENCY, PEAK_MEMORY, ROOFLINE, SPEEDUP, STATE, Metric
from evals.results.settings import training_phrase

TITLES = {PEAK_MEMORY: "Peak memory", ROOFLINE: "Fraction of roofline"}
"""Short panel titles of metrics with long labels."""


# --- all attentions at a few lengths -----------------------------------------------------------------


def comparison(sweep: Sweep) -> Figure | None:
    """Draws latency and peak memory of all attentions at the least, the middle and the greatest length.

    Returns:
        None if nothing was measured at one of them.
    """
    indices = representatives(sweep)
    if any(sweep.rows.loc[sweep.rows[sweep.column] == sweep.values[index], "latency_s"].isna().all() for index in indices):
        return None
    last = {name: rows["latency_s"].iloc[-1] for name, rows in sweep.by_attention.items()}
    names, styles = sorted(last, key=lambda name: (np.isnan(last[name]), last[name])), style_of(last)
    failed = [
        f"{name} at {sweep.at(index)} ({outcome})"
        for index in indices
        for name in names
        if (outcome := sweep.by_attention[name]["outcome"].iloc[index]) in FAILURES
    ]
    words = subtitle(sweep, f"not shown: {', '.join(failed)}" if failed else "", sampled=True)
    figure = new_figure("All attentions compared, left is better", words, 0.7 + 0.24 * len(names))
    panels = figure.subplots(1, 2, sharey=True)
    sizes = np.linspace(3.5, 7.0, len(indices)).tolist()
    for axes, metric in zip(panels, (LATENCY, PEAK_MEMORY), strict=True):
        for row, name in enumerate(names):
            rows, line = sweep.by_attention[name].iloc[indices], styles[name].line(discrete=True)
            values = rows[metric.column].to_numpy(float)
            axes.plot(values, [row] * len(values), color=styles[name].colour, linewidth=0.8, alpha=0.6)
            for value, size in zip(values, sizes, strict=True):
                axes.plot([value], [row], gid=name, zorder=3, **line | {"markersize": size})
            if metric.low and metric.high:
                axes.hlines([row] * len(rows), rows[metric.low], rows[metric.high], styles[name].colour, linewidth=3, alpha=0.25)
        axes.set(xscale="log", xlabel=metric.label)
        axes.margins(x=0.08)
        scale_log(axes.xaxis, 10 if metric is LATENCY else 4, metric.unit.format)
    name_rows(panels[0], names, styles)
    dots = [
        Line2D([], [], marker="o", linestyle="none", color=GREY, markersize=size, label=sweep.at(index))
        for index, size in zip(indices, sizes, strict=True)
    ]
    panels[-1].legend(handles=dots, **BESIDE)
    return figure


# --- panels over the swept setting -------------------------------------------------------------------


def decode(sweep: Sweep) -> Figure | None:
    """Draws the latency of the next token and the decoding state over the context; None if one was not measured."""
    metrics = (LATENCY, STATE)
    if sweep.discrete or any(not sweep.rows[metric.column].gt(0).any() for metric in metrics):
        return None
    figure = new_figure("Decoding one token behind a context, lower is better", subtitle(sweep, sampled=True), 2.6)
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_metric(axes, sweep, metric)
    add_legend(panels[-1], style_of(sweep.attentions), list(sweep.by_attention))
    return figure


def _draw_metric(axes: Axes, sweep: Sweep, metric: Metric) -> None:
    """Draws one metric over the swept setting in a panel that is named after it."""
    styles = style_of(sweep.attentions)
    for name, rows in sweep.by_attention.items():
        draw_line(axes, sweep.x, rows, metric, styles[name], name)
    scale_settings(axes, sweep.values, sweep.axis.partition(" (")[0])
    scale_metric(axes, sweep.rows, metric)
    if metric in (SPEEDUP, ROOFLINE):
        axes.axhline(1.0, color=GREY, linewidth=0.8, zorder=1)
    axes.set_title(TITLES.get(metric) or metric.title(sweep.reference).partition(",")[0])


# --- the dashboard -----------------------------------------------------------------------------------


def dashboard(sweep: Sweep, learned: AccuracySweep | None = None) -> Figure | None:
    """Draws latency, speed-up, memory, fraction of the roofline, exponents, and accuracy against state, a panel each.

    Returns:
        None if nothing is swept or nothing was measured.
    """
    if sweep.discrete or not sweep.rows["latency_s"].gt(0).any():
        return None
    draws: list[Callable[[Axes], None]] = [
        partial(_draw_metric, sweep=sweep, metric=metric)
        for metric in (LATENCY, SPEEDUP, PEAK_MEMORY, ROOFLINE)
        if sweep.rows[metric.column].gt(0).any()
    ]
    notes = []
    if sweep.scaling is not None and len(sweep.scaling):
        draws.append(partial(_draw_exponents, sweep=sweep))
        notes.append("exponents: p of the power law a + b·nᵖ fitted to latency, with its interval; hollow: p of the declared FLOPs")
    rows = learned.at_last(learned.trained) if learned else pd.DataFrame(columns=["attention"])
    rows = rows[rows["attention"].isin(list(sweep.by_attention))]
    if len(rows):
        draws.append(partial(_draw_recall, rows=rows))
        task = [
            training_phrase(name, format_setting(rows[name].iloc[0])) for name in ("task", "num_pairs", "seq_len") if name in rows
        ]
        notes.append(f"recall: {', '.join(task)}")
    down = math.ceil(len(draws) / 3)
    figure = new_figure("The study at a glance", subtitle(sweep, *notes), 1.95 * down)
    panels = figure.subplots(down, 3, squeeze=False)
    for axes, draw in zip(panels.flat, draws, strict=False):
        draw(axes)
        axes.tick_params(labelsize=6.5)
        axes.xaxis.label.set_size(7)
    for axes in list(panels.flat)[len(draws) :]:
        axes.set_axis_off()
    add_legend(panels[0, -1], style_of(sweep.attentions), list(sweep.by_attention))
    return figure


def _draw_exponents(axes: Axes, sweep: Sweep) -> None:
    """Draws the exponent of each attention's latency with its interval, and the declared one, a row an attention."""
    assert sweep.scaling is not None
    fits = sweep.scaling[sweep.scaling["quantity"] == "latency"].set_index("attention")
    styles = style_of(sweep.attentions)
    for row, name in enumerate(sweep.by_attention):
        if name in fits.index:
            style, fit = styles[name], fits.loc[name]
            line = style.line(discrete=True)
            axes.hlines(row, fit["exponent_low"], fit["exponent_high"], color=style.colour, linewidth=1.2)
            axes.plot([fit["exponent"]], [row], gid=name, **line)
            hollow = {"markerfacecolor": "none", "markeredgecolor": style.colour, "markeredgewidth": 0.9, "markersize": 6.5}
            axes.plot([fit["declared_exponent"]], [row], gid=f"{name} declared", **line | hollow)
    axes.set(ylim=(len(sweep.by_attention) - 0.5, -0.5), yticks=[], title="Exponent of latency", xlabel="p")
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _draw_recall(axes: Axes, rows: pd.DataFrame) -> None:
    """Draws accuracy against decoding state, a point an attention."""
    styles = style_of(rows["attention"])
    for _, row in rows.iterrows():
        style = styles[row["attention"]]
        axes.vlines(row["state_bytes"], row["accuracy_low"], row["accuracy_high"], color=style.colour, linewidth=1.2, alpha=0.6)
        axes.plot([row["state_bytes"]], [row["accuracy"]], gid=f"{row['attention']} recall", **style.line(discrete=True))
    axes.margins(x=0.15)
    axes.set(ylim=(-0.02, 1.04), title="Accuracy of recall", xlabel=STATE.label)
    scale_log(axes.xaxis, 4, STATE.unit.format, ticks=4)
