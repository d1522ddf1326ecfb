"""Radar charts: how near each attention comes to the best of all in several respects."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from evals.plots.accuracy import AccuracySweep
from evals.plots.descriptions import subtitle
from evals.plots.layout import new_figure, short_name
from evals.plots.style import GREY, style_of
from evals.results.frames import Sweep

RINGS = 5
"""The centre is 2^5 times worse than the best, or more."""


class Respect(NamedTuple):
    """One axis of the chart: its name, its definition, and the cost of each attention, of which less is better."""

    key: str
    meaning: str
    costs: Mapping[str, float]

    def level(self, name: str) -> float:
        """The distance from the centre: RINGS for the best, one less for each time twice as bad, NaN without a number."""
        if name not in self.costs:
            return math.nan
        return max(0.0, RINGS - math.log2(self.costs[name] / min(self.costs.values())))


def radar(sweep: Sweep, learned: AccuracySweep | None = None) -> Figure | None:
    """Draws a chart an attention; the definitions of the axes are in the subtitle.

    Returns:
        None if fewer than three axes have a number.
    """
    axes = respects(sweep, learned)
    if len(axes) < 3:
        return None
    styles, names = style_of(sweep.attentions), list(sweep.by_attention)
    note = "each axis: the best of all over the attention's own; rim: the best; each ring further in: twice as bad"
    rest = f"centre: {2**RINGS} times worse than the best, or more; no corner: no number"
    meanings = "; ".join(f"{axis.key}: {axis.meaning}" for axis in axes)
    down = math.ceil(len(names) / 4)
    title = "How near each attention comes to the best, larger is better"
    figure = new_figure(title, subtitle(sweep, f"{note}; {rest}", meanings), 1.75 * down)
    angles = np.linspace(0, 2 * math.pi, len(axes), endpoint=False)
    corners = [*range(len(axes)), 0]  # back to the first
    for number, name in enumerate(names, start=1):
        style = styles[name]
        chart = figure.add_subplot(down, 4, number, projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
        levels = np.array([axis.level(name) for axis in axes])
        chart.plot(angles[corners], levels[corners], gid=name, **style.line() | {"markersize": 3.5})
        chart.fill(angles[corners], np.nan_to_num(levels)[corners], color=style.colour, alpha=0.15, linewidth=0)
        chart.set(ylim=(0, RINGS), yticks=range(1, RINGS + 1), yticklabels=[])
        chart.set_xticks(angles, [axis.key for axis in axes], size=6.5)
        chart.tick_params(pad=3)
        chart.spines["polar"].set(visible=True, color=GREY)
        chart.set_title(short_name(name), weight=style.weight, loc="center")
    return figure


def respects(sweep: Sweep, learned: AccuracySweep | None = None) -> list[Respect]:
    """The axes with numbers: latency, its growth, memory, parameters, state, and accuracy of recall."""
    first, last = sweep.at(0), sweep.at(-1)

    def cost(column: str, at: int) -> dict[str, float]:
        return {name: float(rows[column].iloc[at]) for name, rows in sweep.by_attention.items()}

    short, long = cost("latency_s", 0), cost("latency_s", -1)
    axes = [
        Respect("latency", f"latency at {last}", long),
        Respect("short", f"latency at {first}", short),
        Respect("growth", f"latency at {last} over that at {first}", {name: long[name] / short[name] for name in long}),
        Respect("memory", f"peak memory above inputs and parameters at {last}", cost("peak_bytes", -1)),
        Respect("weights", "bytes of parameters", cost("parameter_bytes", -1)),
        Respect("state", f"bytes that decoding keeps behind {last}", cost("state_bytes", -1)),
    ]
    if learned is not None:
        rows = learned.at_last(learned.trained)
        # More accuracy is better, so the cost is its inverse.
        costs = {str(row["attention"]): 1 / row["accuracy"] for _, row in rows.iterrows() if row["accuracy"] > 0}
        task = f"{rows['task'].iloc[0]} at {rows['seq_len'].iloc[0]:.0f} tokens" if len(rows) else ""
        axes.append(Respect("recall", f"accuracy on {task}, more is better", costs))
    known = (
        axis._replace(costs={name: cost for name, cost in axis.costs.items() if cost > 0 and name in sweep.by_attention})
        for axis in axes
    )
    return [axis for axis in known if axis.costs]
