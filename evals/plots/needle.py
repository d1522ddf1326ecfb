"""Where a needle is found: accuracy by depth and length."""

import math

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from evals.plots.accuracy import AccuracySweep, chance
from evals.plots.layout import LEFT, NAME, SMALL, WIDTH, headed, label, placed, weight, wide
from evals.plots.style import SLOWER_TO_FASTER
from evals.results.formatting import format_setting
from evals.results.settings import AXIS_LABELS

FOOT = 0.45  # inches
SHADES = LinearSegmentedColormap.from_list("lost_to_found", SLOWER_TO_FASTER)


def needle_depth(learned: AccuracySweep) -> Figure | None:
    """Accuracy by depth and length, a panel an attention; None where no needle was looked for."""
    rows = learned.at_last(learned.rows[learned.rows["depth"].notna()])
    if rows.empty:
        return None
    names, lengths, depths = (
        list(dict.fromkeys(rows["attention"])),
        sorted(rows["eval_seq_len"].unique()),
        sorted(rows["depth"].unique()),
    )
    across = min(len(names), 4)
    down = math.ceil(len(names) / across)
    gap, high, title = 0.12, 0.11 * len(depths), 0.2
    width = (WIDTH - LEFT - 0.75 - gap * (across - 1)) / across
    body = FOOT + down * (high + title) + (down - 1) * 0.3
    words = learned.words(rows, chance(rows))
    picture = headed("Accuracy by the needle's depth and the length, brighter is better", words, body + 0.04)
    for number, name in enumerate(names):
        row, column = divmod(number, across)
        bottom = FOOT + (down - 1 - row) * (high + title + 0.3)
        axes = placed(picture, LEFT + column * (width + gap), bottom, width, high)
        cells = rows[rows["attention"] == name].pivot_table(index="depth", columns="eval_seq_len", values="accuracy")
        shown = axes.imshow(cells.reindex(depths, columns=lengths), cmap=SHADES, vmin=0, vmax=1, aspect="auto", gid=name)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=SMALL)
        axes.set_title(label(learned.looks, name), size=NAME, weight=weight(learned.looks[name]), loc="left", pad=3)
        every = max(1, math.ceil(len(lengths) * (wide("128k", SMALL) + 0.06) / width))
        axes.set_xticks(range(0, len(lengths), every), [format_setting(one) for one in lengths[::every]])
        shown_depths = range(0, len(depths), max(1, (len(depths) - 1) // 2))
        axes.set_yticks(shown_depths, [f"{depths[one]:.0%}" for one in shown_depths] if column == 0 else [])
        if column == 0:
            axes.set_ylabel("depth", labelpad=2)
    bar = picture.colorbar(shown, cax=placed(picture, WIDTH - 0.6, FOOT, 0.1, min(high, 1.2)), ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=7)
    middle = (LEFT + WIDTH - 0.75) / 2 / WIDTH
    picture.text(middle, 0.06 / picture.get_figheight(), AXIS_LABELS["seq_len"], ha="center", va="bottom", size=8)
    return picture
