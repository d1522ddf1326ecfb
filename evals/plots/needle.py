"""Heatmaps of the needle task: accuracy by the depth of the needle and the length of the text."""

import seaborn as sns
from matplotlib.figure import Figure

from evals.plots.accuracy import AccuracySweep, describe_chance
from evals.plots.layout import new_figure, short_name
from evals.plots.style import DARK_TO_LIGHT
from evals.results.formatting import format_setting
from evals.results.settings import axis_label


def needle_depth(sweep: AccuracySweep) -> Figure | None:
    """Draws accuracy by depth and length, a panel an attention; None if accuracy was not measured by depth."""
    rows = sweep.at_last(sweep.rows[sweep.rows["depth"].notna()])
    if rows.empty:
        return None
    names, depths = list(dict.fromkeys(rows["attention"])), sorted(rows["depth"].unique())
    lengths = sorted(rows["eval_seq_len"].unique())
    columns = min(len(names), 4)
    down = -(-len(names) // columns)
    title = "Accuracy by the depth of the needle and the length of the text, brighter is better"
    figure = new_figure(title, sweep.subtitle(rows, describe_chance(rows)), 0.35 + (0.11 * len(depths) + 0.35) * down)
    panels = figure.subplots(down, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        cells = rows[rows["attention"] == name].pivot_table(index="depth", columns="eval_seq_len", values="accuracy")
        sns.heatmap(cells.reindex(depths, columns=lengths), vmin=0, vmax=1, cmap=DARK_TO_LIGHT, cbar=False, ax=axes, gid=name)
        axes.set_title(short_name(name), weight=sweep.styles[name].weight)
        axes.set(xlabel="", ylabel="")
        axes.tick_params(length=0, labelsize=6.5, rotation=0)
    for axes in list(panels.flat)[len(names) :]:
        axes.set_axis_off()
    every = -(-len(lengths) // 4)
    panels[0, 0].set_xticks([index + 0.5 for index in range(0, len(lengths), every)], map(format_setting, lengths[::every]))
    marked = range(0, len(depths), max(1, (len(depths) - 1) // 2))
    panels[0, 0].set_yticks([index + 0.5 for index in marked], [f"{depths[index]:.0%}" for index in marked])
    figure.supylabel("depth", size=8)
    figure.supxlabel(axis_label("seq_len"), size=8)
    bar = figure.colorbar(panels[0, 0].collections[0], ax=panels, ticks=[0, 0.5, 1], pad=0.01, fraction=0.03, aspect=12)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7)
    return figure
