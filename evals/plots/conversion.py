"""Figures of conversions: perplexity over the context, and agreement with the original model."""

from collections.abc import Sequence

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evals.plots.layout import BESIDE, new_figure
from evals.plots.style import STYLES
from evals.results.formatting import format_mean_share

STAGES = {"original": STYLES["standard"], "converted": STYLES["sliding_window"], "distilled": STYLES["bsbr"]}
"""The stages of a conversion in order, each with the style of an attention that it resembles."""


def perplexity(results: pd.DataFrame, positions: pd.DataFrame) -> Figure:
    """Draws perplexity over the context, a panel a model: a thin line a seed, and the mean over seeds."""
    figure, panels = _model_panels(results, "Perplexity in each chunk of the context, lower is better")
    for name, axes in panels.items():
        for stage, style in STAGES.items():
            rows = positions[(positions["model"] == name) & (positions["stage"] == stage)]
            columns = {"x": "position", "y": "perplexity", "ax": axes}
            sns.lineplot(rows, **columns, units="seed", estimator=None, color=style.colour, linewidth=0.5)
            sns.lineplot(rows, **columns, errorbar=None, gid=f"{name}-{stage}", label=stage, **style.line())
        axes.set(xlabel="first token of the chunk", ylabel="")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return _with_legend(figure, list(panels.values()))


def agreement(results: pd.DataFrame, positions: pd.DataFrame) -> Figure:
    """Draws how often the original's likeliest token is among the k likeliest of the model, a panel a model, a point a seed."""
    figure, panels = _model_panels(results, "Agreement with the original, higher is better")
    long = results.melt(["model", "stage", "seed"], ["top_1", "top_5", "top_10"], "k", "share")
    stages = ["converted", "distilled"]
    for name, axes in panels.items():
        for stage in stages:
            rows = long[(long["model"] == name) & (long["stage"] == stage)]
            sns.stripplot(
                rows.assign(k=rows["k"].str.replace("_", " ")),
                x="k",
                y="share",
                hue="stage",
                hue_order=stages,
                dodge=True,
                jitter=False,
                ax=axes,
                palette={stage: STAGES[stage].colour for stage in stages},
                marker=STAGES[stage].marker,
                size=5.5,
                legend=False,
                clip_on=False,
            )
            axes.plot([], [], color=STAGES[stage].colour, marker=STAGES[stage].marker, linestyle="none", label=stage)
        axes.set(xlabel="", ylabel="", ylim=(None, 1.02))
    return _with_legend(figure, list(panels.values()))


def describe_conversion(results: pd.DataFrame) -> str:
    """The chunks, the context and the number of seeds of a conversion."""
    seeds, first = results["seed"].nunique(), results.iloc[0]
    return (
        f"chunks of {first['chunk_size']} tokens that also see {first['chunk_overlap']} before, context of {first['context']}, "
        f"{seeds} seed{'s' * (seeds > 1)}"
    )


def _model_panels(results: pd.DataFrame, title: str) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel for each model, and the part of the lost nats that distilling gives back."""
    names = sorted(set(results["model"].astype(str)))
    distilled = results[results["stage"] == "distilled"]
    closed = ", ".join(f"{name} {format_mean_share(distilled[distilled['model'] == name]['gap_closed'])}" for name in names)
    figure = new_figure(
        title, [describe_conversion(results), f"of the nats a token that converting costs, distilling gives back {closed}"], 2.4
    )
    panels = dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True))
    for name, axes in panels.items():
        axes.set_title(name)
    return figure, panels


def _with_legend(figure: Figure, panels: Sequence[Axes]) -> Figure:
    """Leaves one legend, right of the last panel."""
    for axes in panels[:-1]:
        if axes.get_legend():
            axes.get_legend().remove()  # type: ignore[union-attr]
    panels[-1].legend(**BESIDE)
    return figure
