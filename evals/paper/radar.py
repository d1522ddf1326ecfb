"""Each attention as a shape: how near it comes to the best in several respects, every one of which the figure defines."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from evals.plots.accuracy import AccuracySweep
from evals.plots.layout import LEFT, LINE, NAME, SMALL, WIDTH, headed, label, lined, subtitle, weight
from evals.plots.style import GREY
from evals.results.frames import Sweep

WORST = 5
"""The centre is 2^5 times worse than the best, or more."""

COLUMNS, PANEL, GAP, FOOT = 4, 0.95, 0.62, 0.1  # how many side by side; inches


class Axis(NamedTuple):
    """One respect: its key on the page, what it is in words, and what each attention has of it; the least is best."""

    key: str
    words: str
    costs: Mapping[str, float]


def radar(sweep: Sweep, learned: AccuracySweep | None = None) -> Figure | None:
    """A panel an attention, with the axes' definitions beneath. None where fewer than three axes have a number.

    On every axis an attention stands at the best of all over its own: the rim is the best, and each ring further in is
    twice as bad. What has no number on an axis has no corner there.
    """
    axes = respects(sweep, learned)
    if len(axes) < 3:
        return None
    names = list(sweep.cells)
    rows = -(-len(names) // COLUMNS)
    key = [f"{axis.key}: {axis.words}" for axis in axes]
    told = lined([*key, f"Centre: {2**WORST} times worse than the best, or more. No corner: no number."], LEFT).split("\n")
    high = rows * PANEL + (rows - 1) * GAP
    below = FOOT + LINE * len(told) + 0.3
    note = "on each axis: the best of all over one's own; rim: the best, each ring further in: twice as bad"
    picture = headed("How near each attention comes to the best, larger is better", subtitle(sweep, note), below + high + 0.36)
    tall = picture.get_figheight()
    picture.text(LEFT / WIDTH, FOOT / tall, "\n".join(told), size=7, color=GREY, va="bottom", linespacing=1.25)
    angles = np.linspace(0, 2 * math.pi, len(axes), endpoint=False)
    pitch = WIDTH / COLUMNS
    for number, name in enumerate(names):
        row, column = divmod(number, COLUMNS)
        left, bottom = column * pitch + (pitch - PANEL) / 2, below + (rows - 1 - row) * (PANEL + GAP)
        panel = picture.add_axes((left / WIDTH, bottom / tall, PANEL / WIDTH, PANEL / tall), projection="polar")
        look, levels = sweep.looks[name], [_level(axis, name) for axis in axes]
        round_trip = [*range(len(axes)), 0]
        panel.plot(angles[round_trip], np.array(levels)[round_trip], gid=name, **look.line(discrete=False) | {"markersize": 3.5})
        panel.fill(angles[round_trip], np.nan_to_num(np.array(levels))[round_trip], color=look.colour, alpha=0.15, linewidth=0)
        panel.set_theta_zero_location("N")  # type: ignore[attr-defined]  # of a polar projection
        panel.set_theta_direction(-1)  # type: ignore[attr-defined]
        panel.set_ylim(0, WORST)
        panel.set_yticks(range(1, WORST + 1), [""] * WORST)
        panel.set_xticks(angles, [""] * len(axes))
        for axis, angle in zip(axes, angles, strict=True):
            # Away from the rim: beside it left and right, above and below it in the middle.
            across, up = math.sin(angle), math.cos(angle)
            place: dict[str, Any] = {"ha": "center" if abs(across) < 0.2 else "left" if across > 0 else "right"}
            place["va"] = "bottom" if up > 0.8 else "top" if up < -0.8 else "center"
            panel.text(angle, 1.09 * WORST, axis.key, size=SMALL, **place)
        panel.spines["polar"].set_visible(True)
        panel.spines["polar"].set_color(GREY)
        panel.set_title(label(sweep.looks, name), size=NAME, weight=weight(look), pad=13)
    return picture


def respects(sweep: Sweep, learned: AccuracySweep | None = None) -> list[Axis]:
    """The axes of which any number is known."""
    first, last = sweep.at(0), sweep.at(-1)

    def cost(column: str, at: int) -> dict[str, float]:
        return {name: float(rows[column].iloc[at]) for name, rows in sweep.cells.items()}

    short, long = cost("latency_s", 0), cost("latency_s", -1)
    found = [
        ("latency", f"latency at {last}", long),
        ("short", f"latency at {first}", short),
        ("growth", f"latency at {last} over that at {first}", {name: long[name] / short[name] for name in long}),
        ("memory", f"peak memory above inputs and parameters at {last}", cost("peak_bytes", -1)),
        ("weights", "bytes of parameters", cost("parameter_bytes", -1)),
        ("state", f"bytes that decoding keeps behind {last}", cost("state_bytes", -1)),
    ]
    if learned is not None:
        asked: pd.DataFrame = learned.at_last(learned.trained)
        # Of accuracy more is better, so its inverse is the cost.
        costs = {str(row["attention"]): 1 / row["accuracy"] for _, row in asked.iterrows() if row["accuracy"] > 0}
        place = f"{asked['task'].iloc[0]} at {asked['seq_len'].iloc[0]:.0f} tokens" if len(asked) else ""
        found.append(("recall", f"accuracy on {place}, more is better", costs))
    known = [
        Axis(key, words, {name: one for name, one in costs.items() if one > 0 and name in sweep.cells})
        for key, words, costs in found
    ]
    return [axis for axis in known if axis.costs]


def _level(axis: Axis, name: str) -> float:
    """WORST at the rim, one less for each time that it is twice as bad; NaN where there is no number."""
    if name not in axis.costs:
        return math.nan
    return max(0.0, WORST - math.log2(axis.costs[name] / min(axis.costs.values())))
