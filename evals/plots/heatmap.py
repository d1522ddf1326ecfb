"""The heatmap of speed-ups: how much faster each attention is than the reference at each value of the swept setting."""

import math
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from seaborn.utils import relative_luminance

from evals.plots.descriptions import subtitle
from evals.plots.layout import WIDTH, failure_handles, mark_failures, name_rows, new_figure
from evals.plots.style import DARK_TO_LIGHT, FAILURES, GREY, Style, style_of
from evals.results.frames import Sweep

SIGNS = {"faster": "▲", "slower": "▼", "same": "=", "ambiguous": "?"}


def speedup_heatmap(sweep: Sweep) -> Figure | None:
    """Draws the speed-up of every attention over the reference, with the sign of its verdict, or the mark of a failure.

    Returns:
        None if there is no speed-up, or no attention but the reference.
    """
    names = [name for name in sweep.by_attention if name != sweep.reference]
    by_name = {name: sweep.by_attention[name] for name in names}
    speedups = pd.DataFrame({name: rows["speedup"] for name, rows in by_name.items()}, dtype=float).T
    if not speedups.gt(0).any(axis=None):
        return None
    narrow = len(sweep.values) > 9
    texts = pd.DataFrame({name: [_cell_text(row, narrow) for _, row in rows.iterrows()] for name, rows in by_name.items()}).T
    verdicts = {verdict for rows in by_name.values() for verdict in rows["verdict"].dropna()}
    key = ", ".join(f"{sign} {verdict}" for verdict, sign in SIGNS.items() if verdict in verdicts)
    failures = failure_handles(sweep.rows["outcome"])
    body = 0.75 + (0.34 if narrow else 0.25) * len(names) + 0.2 * -(-len(failures) // 4)
    words = subtitle(sweep, f"verdict: {key}; –: not measured" if key else "")
    figure = new_figure(f"Speed-up over {sweep.reference}", words, body)
    axes = figure.subplots()
    powers = np.log2(speedups.where(speedups > 0))
    # The scale is symmetric around 1 and ends at 32 times.
    reach = min(max(math.ceil(np.nanmax(np.abs(powers))), 1), 5)
    sns.heatmap(
        powers,
        ax=axes,
        vmin=-reach,
        vmax=reach,
        cmap=DARK_TO_LIGHT,
        linewidths=1.5,
        annot=texts,
        fmt="",
        annot_kws={"size": 6.5 if narrow else 7.5},
        cbar_kws={"ticks": [-reach, 0, reach], "pad": 0.02, "aspect": 12, "fraction": 0.06 * 7 / WIDTH},
    )
    shades = np.asarray(axes.collections[0].get_facecolor())[~np.isnan(np.ravel(powers))]
    for text, shade in zip(axes.texts, shades, strict=True):
        text.set_color("black" if relative_luminance(shade) > 0.2 else "white")
    figure.axes[1].set_yticklabels([f"1/{2**reach}×", "1×", f"{2**reach}×"], size=7)  # of the colour bar
    for row, (name, rows) in enumerate(by_name.items()):
        mark_failures(axes, np.arange(len(rows), dtype=float) + 0.5, rows["outcome"], row + 0.5, Style(GREY, ""), name)
        for column in np.flatnonzero(~(rows["speedup"] > 0) & ~rows["outcome"].isin(FAILURES)):
            axes.text(column + 0.5, row + 0.5, "–", color=GREY, ha="center", va="center")
    name_rows(axes, names, style_of(sweep.attentions), 0.5)
    axes.set_xticklabels(sweep.ticks, rotation=0)
    axes.set_xlabel(sweep.axis)
    axes.tick_params(length=0)
    if failures:
        axes.legend(handles=failures, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)
    return figure


def _cell_text(cell: "pd.Series[Any]", narrow: bool) -> str:
    sign = SIGNS.get(cell["verdict"], "")
    ratio = format_ratio(cell["speedup"]) if cell["speedup"] > 0 else ""
    return f"{sign}\n{ratio.removesuffix('×')}".strip() if narrow else f"{sign} {ratio}".strip()


def format_ratio(value: float) -> str:
    """Writes a ratio in two or three digits: 0.53×, 1.04×, 3.4×, 12×."""
    digits = 2 if value < 1.995 else 1 if value < 9.95 else 0
    return f"{value:.2g}×" if value < 0.01 else f"{value:.{digits}f}×"
