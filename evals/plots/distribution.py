"""The distribution of raw latency samples: outliers and several modes, which a median and its interval hide."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from evals.plots.descriptions import subtitle
from evals.plots.layout import name_rows, new_figure, scale_log
from evals.plots.memory import representatives
from evals.plots.style import style_of
from evals.results.frames import Sweep
from evals.results.metrics import RATIO


def raw_samples(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Collects the latency samples in seconds of a ledger's records, one per row, without those of the A/A control."""
    rows = [
        (record["comparison"], record["attention"], record["round"], sample)
        for record in records
        if record.get("kind") == "latency" and record["outcome"] == "ok" and not record["is_control"]
        for time_slice in record["time_slices"]
        for sample in time_slice
    ]
    return pd.DataFrame(rows, columns=["comparison", "attention", "round", "latency_s"])


def distribution(sweep: Sweep, samples: pd.DataFrame | None) -> Figure | None:
    """Draws the samples (from `raw_samples`) of each attention, relative to their median, as violins at up to three settings.

    Returns:
        None if no row of the sweep has samples.
    """
    if samples is None or "comparison" not in sweep.rows:
        return None
    rows = sweep.rows.loc[sweep.rows["outcome"] == "ok", ["comparison", "attention", sweep.column]]
    samples = samples.merge(rows, on=["comparison", "attention"])
    if samples.empty:
        return None
    samples["ratio"] = samples["latency_s"] / samples.groupby(["attention", sweep.column])["latency_s"].transform("median")
    names, indices, styles = list(sweep.by_attention), representatives(sweep), style_of(sweep.attentions)
    note = "violin: density of all samples of all rounds, from the fastest to the slowest; lines: quartiles"
    title = "Latency samples over their median, narrow is better"
    figure = new_figure(title, subtitle(sweep, note), 0.7 + 0.3 * len(names))
    panels = figure.subplots(1, len(indices), sharex=True, sharey=True, squeeze=False)[0]
    for axes, index in zip(panels, indices, strict=True):
        chosen = samples[samples[sweep.column] == sweep.values[index]]
        axes.axvline(1.0, color="#b0b0b0", linewidth=0.8, zorder=0)
        sns.violinplot(
            chosen,
            x="ratio",
            y="attention",
            hue="attention",
            order=names,
            hue_order=names,
            ax=axes,
            palette={name: style.colour for name, style in styles.items()},
            legend=False,
            log_scale=True,
            cut=0,
            density_norm="width",
            inner="quart",
            linewidth=0.6,
            width=0.85,
            alpha=0.6,
        )
        axes.set(title=sweep.at(index), xlabel="latency / median")
        scale_log(axes.xaxis, 10, RATIO.format, ticks=4)
    name_rows(panels[0], names, styles)
    return figure
