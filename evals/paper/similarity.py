"""How like its original a conversion is: the spread of three measures over all runs, before and after healing."""

from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evals.plots.conversion import STAGES
from evals.plots.layout import LEFT, LEGEND, NAME, SMALL, WIDTH, headed, placed

FOOT, PLOT, GAP = 0.35, 1.6, 0.55  # inches


class Measure(NamedTuple):
    column: str
    title: str


MEASURES = (
    Measure("cosine", "Cosine of hidden states"),
    Measure("mse", "Relative MSE of hidden states"),
    Measure("kl", "KL of next tokens, nats"),
)


def similarity(results: pd.DataFrame, positions: pd.DataFrame) -> Figure:
    """A panel a measure; in it, beside each model, a point a run before healing and one after, and a line between both."""
    models = sorted(set(results["model"].astype(str)))
    first, seeds = results.iloc[0], results["seed"].nunique()
    seen = f"chunks of {first['chunk_size']} tokens that also see {first['chunk_overlap']} before, context of {first['context']}"
    means = "means over held-out tokens, of the last hidden states and the next token's distribution; a line: one run"
    words = f"{seen}, {seeds} seed{'s' * (seeds > 1)}\n{means}"
    picture = headed(
        "Likeness to the original: first panel higher, the others lower is better", words, FOOT + PLOT + 0.2 + LEGEND - 0.1
    )
    width = (WIDTH - LEFT - 0.15 - GAP * (len(MEASURES) - 1)) / len(MEASURES)
    for number, measure in enumerate(MEASURES):
        axes = placed(picture, LEFT + number * (width + GAP), FOOT, width, PLOT)
        for place, model in enumerate(models):
            own = results[results["model"] == model]
            # One row a run: settings that a seed was tried under are runs of their own.
            before, after = (own[own["stage"] == stage][measure.column].to_numpy(float) for stage in ("converted", "distilled"))
            for low, high in zip(before, after, strict=True):
                axes.plot([place - 0.15, place + 0.15], [low, high], color="#bbbbbb", linewidth=0.8, zorder=1.5)
            for offset, stage, values in ((-0.15, "converted", before), (0.15, "distilled", after)):
                label: dict[str, Any] = {"label": stage} if place == 0 else {}
                mark = {**STAGES[stage].line(discrete=True), "markersize": 5}
                axes.plot([place + offset] * len(values), values, gid=f"{model}-{stage}-{measure.column}", **label, **mark)
        axes.set_xticks(range(len(models)), models)
        axes.set_xlim(-0.6, len(models) - 0.4)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(labelsize=SMALL)
        axes.set_title(measure.title, size=NAME, loc="left", pad=4)
    keys, names = picture.axes[0].get_legend_handles_labels()
    anchor = (LEFT / WIDTH, (FOOT + PLOT + 0.2) / picture.get_figheight())
    picture.legend(keys, names, loc="lower left", bbox_to_anchor=anchor, ncols=2, borderaxespad=0, handletextpad=0.4)
    return picture
