"""Figures of conversions: the perplexity over the context, and how often a model agrees with its original."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evals.plots.layout import EDGE, LEFT, LEGEND, NAME, WIDTH, headed, placed
from evals.plots.style import STYLES, Style
from evals.stats.intervals import mean_interval

STAGES: Mapping[str, Style] = {
    "original": STYLES["standard"],
    "converted": STYLES["sliding_window"],
    "distilled": STYLES["bsbr"],
}
"""In order; each drawn as the attention that it comes closest to."""

AGREEMENTS = ("top_1", "top_5", "top_10")
FOOT, PLOT, GAP = 0.4, 1.7, 0.55  # inches


def perplexity(results: pd.DataFrame, positions: pd.DataFrame) -> Figure:
    """Over the context, a panel a model; a thin line a seed, the mean over seeds thick."""
    panels, picture = _panels(results, "Perplexity in each chunk of the context, lower is better")
    for name, axes in panels.items():
        own = positions[positions["model"] == name]
        for stage, look in STAGES.items():
            lines = own[own["stage"] == stage].pivot_table(index="position", columns="seed", values="perplexity")
            mark: dict[str, Any] = look.line(discrete=False)
            if lines.shape[1] > 1:
                axes.plot(lines.index, lines, **{**mark, "marker": "none", "linewidth": 0.5})
            axes.plot(lines.index, lines.mean(axis=1), gid=f"{name}-{stage}", label=stage, **mark)
        axes.set_xlabel("first token of the chunk", size=NAME)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return _keyed(picture, panels)


def agreement(results: pd.DataFrame, positions: pd.DataFrame) -> Figure:
    """How often the original's likeliest token is among the k likeliest of the model, a panel a model; points are seeds."""
    panels, picture = _panels(results, "Agreement with the original, higher is better")
    for name, axes in panels.items():
        own = results[results["model"] == name]
        for offset, stage in ((-0.08, "converted"), (0.08, "distilled")):
            rows = own[own["stage"] == stage]
            mark = {**STAGES[stage].line(discrete=True), "markersize": 5}
            for k, column in enumerate(AGREEMENTS):
                label: dict[str, Any] = {"label": stage, "gid": f"{name}-{stage}"} if k == 0 else {}
                axes.plot([k + offset] * len(rows), rows[column], **mark, **label)
        axes.set_xticks(range(3), [f"top {column.removeprefix('top_')}" for column in AGREEMENTS])
        axes.set_xlim(-0.5, 2.5)
        axes.set_ylim(None, 1.02)
    return _keyed(picture, panels)


FIGURES = {"perplexity": perplexity, "agreement": agreement}


def _panels(results: pd.DataFrame, title: str) -> tuple[dict[str, Axes], Figure]:
    """Axes side by side, one for each model, under what they were measured under."""
    names = sorted(set(results["model"].astype(str)))
    distilled = results[results["stage"] == "distilled"]
    closed = ", ".join(f"{name} {_share(distilled[distilled['model'] == name]['gap_closed'])}" for name in names)
    seeds, first = results["seed"].nunique(), results.iloc[0]
    words = (
        f"chunks of {first['chunk_size']} tokens that also see {first['chunk_overlap']} before, context of {first['context']}, "
        f"{seeds} seed{'s' * (seeds > 1)}\nof the nats a token that converting costs, healing gives back {closed}"
    )
    picture = headed(title, words, FOOT + PLOT + LEGEND + 0.2)
    width = (WIDTH - LEFT - EDGE - GAP * (len(names) - 1)) / len(names)
    panels = {}
    for number, name in enumerate(names):
        axes = panels[name] = placed(picture, LEFT + number * (width + GAP), FOOT, width, PLOT)
        axes.set_title(name, size=NAME, loc="left", pad=3)
    return panels, picture


def _share(values: pd.Series) -> str:
    """The mean over seeds in percent, and half of its 95 % interval."""
    mean = mean_interval(list(values))
    return f"{mean.value:.0%}" if math.isnan(mean.low) else f"{mean.value:.0%} ± {(mean.high - mean.low) / 2:.0%}"


def _keyed(picture: Figure, panels: Mapping[str, Axes]) -> Figure:
    keys: Sequence[Any]
    keys, names = next(iter(panels.values())).get_legend_handles_labels()
    high = picture.get_figheight()
    place = ((WIDTH - EDGE) / WIDTH, (FOOT + PLOT + 0.1) / high)
    picture.legend(keys, names, loc="lower right", bbox_to_anchor=place, ncols=len(names), handletextpad=0.5)
    return picture
