"""Figures of merged results: a metric over the swept setting, with a panel for each machine."""

import math
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from evals.plots.descriptions import backends
from evals.plots.layout import add_legend, failure_handles, mark_failures, new_figure, scale_metric, scale_settings
from evals.plots.lines import draw_line, order_of_ends
from evals.plots.style import GREY, style_of
from evals.results.formatting import shorten
from evals.results.frames import Sweep, split, suffixes, sweeps, swept_column
from evals.results.machines import MACHINE
from evals.results.metrics import LATENCY, ROOFLINE, SPEEDUP, Metric
from evals.results.settings import conditions

MACHINE_METRICS = (LATENCY, SPEEDUP, ROOFLINE)
"""The metrics that are drawn with a panel for each machine."""
ACROSS, HEIGHT = 3, 1.75
"""Panels in a row, and inches of one."""

NOTES = {
    LATENCY: "times of different machines are no comparison of attentions",
    SPEEDUP: "each panel compares within its own machine; nothing is averaged over machines",
    ROOFLINE: "roofline: the least time that the compute and memory bandwidth measured on that machine allow",
}


def machine_sweeps(results: pd.DataFrame) -> Iterator[tuple[str, list[Sweep]]]:
    """Groups the sweeps of a checked table of latencies that differ in the machine alone.

    Yields:
        A suffix of a file name, and the sweeps, one a machine; nothing if the table does not name at least two machines.
    """
    if MACHINE not in results or results[MACHINE].nunique() < 2:
        return
    groups: list[tuple[Mapping[str, object], list[Sweep]]] = []
    for (settings, _), (_, sweep) in zip(split(results, swept_column(results)), sweeps(results, {}), strict=True):
        others = {name: value for name, value in settings.items() if name != MACHINE}
        found = next((members for known, members in groups if known == others), None)
        if found is None:
            groups.append((others, [sweep]))
        else:
            found.append(sweep)
    yield from zip(suffixes(settings for settings, _ in groups), (members for _, members in groups), strict=True)


def machine_panels(members: Sequence[Sweep], metric: Metric) -> Figure | None:
    """Draws a metric with a panel for each machine, all with the same axes. Failures are marked at the top of a panel.

    Returns:
        None if no machine has a number, or one of them has a single value of the swept setting.
    """
    rows = pd.concat([sweep.rows for sweep in members], ignore_index=True)
    if any(sweep.discrete for sweep in members) or not rows[metric.column].gt(0).any():
        return None
    first, styles = members[0], style_of(members[0].attentions)
    values = sorted({value for sweep in members for value in sweep.values})
    own = [name for name in ("processor", "torch") if rows[name].nunique() > 1]
    words = [conditions(rows.drop(columns=[MACHINE, *own]), first.column), NOTES[metric], "; ".join(backends(rows))]
    across = min(ACROSS, len(members))
    down = math.ceil(len(members) / across)
    figure = new_figure(f"{metric.title(first.reference)}, by machine", words, HEIGHT * down + 0.5)
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for number, (axes, sweep) in enumerate(zip(panels.flat, members, strict=False)):
        for name, cells in sweep.by_attention.items():
            draw_line(axes, sweep.x, cells, metric, styles[name], name)
        scale_settings(axes, values, first.axis.partition(" (")[0] if number + across >= len(members) else "")
        scale_metric(axes, rows, metric)
        if metric in (SPEEDUP, ROOFLINE):
            axes.axhline(1.0, color=GREY, linewidth=0.8, zorder=1)
        low, high = axes.get_ylim()
        for row, (name, outcomes) in enumerate(sweep.failed.items()):
            mark_failures(axes, sweep.x, outcomes, high * (low / high) ** (0.06 * (row + 0.5)), styles[name], name)
        axes.tick_params(labelbottom=number + across >= len(members))
        axes.set_title(shorten(str(sweep.rows[MACHINE].iloc[0]), 28), fontsize=7.5)
    for axes in list(panels.flat)[len(members) :]:
        axes.set_axis_off()
    add_legend(panels[0, -1], styles, order_of_ends(first, metric), extra=failure_handles(rows["outcome"]))
    return figure
