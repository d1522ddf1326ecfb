"""The similarity of a conversion to its original model, before and after distilling, run by run."""

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evals.plots.conversion import describe_conversion
from evals.plots.layout import BESIDE, new_figure

MEASURES = {"cosine": "Cosine of hidden states", "mse": "Relative MSE of hidden states", "kl": "KL of next tokens, nats"}
"""Title of each measure, by its column."""


def similarity(results: pd.DataFrame, positions: pd.DataFrame) -> Figure:
    """Draws a panel a measure, and in it a line a run from before distilling to after it."""
    rows = results[results["stage"].isin(["converted", "distilled"])].copy()
    # One row a run and stage: settings that a seed was tried under are runs of their own.
    rows["run"] = rows.groupby(["model", "stage"]).cumcount()
    means = "means over held-out tokens, of the last hidden states and the next token's distribution; a line: one run"
    title = "Similarity to the original: first panel higher, the others lower is better"
    figure = new_figure(title, [describe_conversion(results), means], 2.2)
    panels = figure.subplots(1, len(MEASURES))
    models = sorted(rows["model"].unique())
    for axes, (column, name) in zip(panels, MEASURES.items(), strict=True):
        sns.lineplot(
            rows,
            x="stage",
            y=column,
            hue="model",
            style="model",
            hue_order=models,
            style_order=models,
            ax=axes,
            units="run",
            estimator=None,
            palette="colorblind",
            markers=True,
            legend=axes is panels[-1],
        )
        axes.set(title=name, xlabel="", ylabel="", xlim=(-0.3, 1.3))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    panels[-1].legend(**BESIDE)
    return figure
