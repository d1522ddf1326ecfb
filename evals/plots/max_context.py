"""The longest context of each attention within a memory limit."""

import math
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from evals.plots.layout import SMALL, WIDTH, headed, key_room, keyed, lined, placed, wide
from evals.plots.style import GREY, Style
from evals.results.formatting import format_bytes, format_estimate, format_setting
from evals.results.settings import conditions

ROW, FOOT, RIGHT = 0.24, 0.45, 0.2  # inches


def max_context_plot(rows: pd.DataFrame, looks: dict[str, Style]) -> Figure:
    """One point an attention, the longest first, with its length and what happened at the next one that was tried.

    rows: of `max_context_table.build`, one an attention.
    """
    rows = rows.sort_values("max_context", ascending=False, kind="stable", na_position="last")
    names = [str(name) for name in rows["attention"]]
    said = [_said(row) for _, row in rows.iterrows()]
    left = max(0.65, key_room(looks, names))
    room = max(wide(words, SMALL) for words in said) + 0.15
    width, height = WIDTH - left - RIGHT, ROW * len(names)
    limits = rows["limit_bytes"].dropna().unique()
    limit = format_bytes(float(limits[0])) if len(limits) == 1 else "the memory limit"
    note = f"everything counted: parameters, inputs, what the workload prepares, and its peak; at most {limit}"
    words = lined([conditions(rows, "seq_len"), note], left)
    picture = headed(f"Longest context within {limit}, longer is better", words, FOOT + height + 0.04, left)
    axes = placed(picture, left, FOOT, width, height)
    found = rows["max_context"].to_numpy(float)
    most = float(max((one for one in found if one > 0), default=2.0))
    least = min((one for one in found if one > 0), default=1.0)
    begin = 2.0 ** (math.floor(math.log2(least)) - 1)
    axes.set_xscale("log", base=2)
    axes.set(xlim=(begin, begin * (most / begin) ** (width / (width - room))), ylim=(len(names) - 0.5, -0.5), yticks=[])
    for row, (name, length, text) in enumerate(zip(names, found, said, strict=True)):
        at = 0.0
        if length > 0:
            mark = looks[name].line(discrete=True)
            axes.plot([length], [row], gid=name, **mark | {"markersize": mark["markersize"] + 2})
            at = math.log(length / begin) / math.log(axes.get_xlim()[1] / begin)
        aside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "bbox": {"facecolor": "white", "linewidth": 0, "pad": 1}}
        axes.text(at + (0.09 if at else 0.05) / width, row, text, size=SMALL, color=GREY, va="center_baseline", **aside)
    keyed(axes, looks, names, width)
    axes.grid(True, axis="y")
    axes.set_yticks(range(len(names)), [])
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_setting(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens (1k = 1024)")
    return picture


def _said(row: "pd.Series[Any]") -> str:
    after = f"; {row['next_outcome']} at {format_estimate(float(row['next_seq_len']))}" if row["next_seq_len"] > 0 else ""
    return format_estimate(float(row["max_context"])) + after if row["max_context"] > 0 else f"none ({row['outcome']})"
