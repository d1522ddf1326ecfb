"""Figures of training: accuracy, its costs, bits per byte, and losses of the best learning rate of each attention."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evals.plots.layout import BODY, add_legend, legend_height, new_figure, scale_log, scale_settings
from evals.plots.lines import draw_line
from evals.plots.pareto import draw_front
from evals.plots.style import GREY, Style, style_of
from evals.results.formatting import format_setting
from evals.results.frames import Sweep, matching, split, suffixes, swept_values
from evals.results.metrics import ACCURACY, BITS_PER_BYTE, LATENCY, LOSS, STATE, Metric
from evals.results.settings import axis_label, format_range, training_conditions, training_phrase

SIZES = ("hidden_dim", "num_heads", "num_layers", "conv_size")
"""The settings that change the model, not the task."""


class AccuracySweep(NamedTuple):
    """The data of one set of figures."""

    rows: pd.DataFrame  # of an accuracy table: outcome ok, best learning rates
    curves: pd.DataFrame  # training losses of all runs
    swept: str  # column of the swept setting
    failed: str  # attentions that failed, with their outcomes

    @property
    def styles(self) -> dict[str, Style]:
        return style_of(self.rows["attention"].astype(str))

    @property
    def whole(self) -> pd.DataFrame:
        """The rows over all targets, not over those at one depth or position."""
        return self.rows[self.rows["depth"].isna() & self.rows["position"].isna()]

    @property
    def trained(self) -> pd.DataFrame:
        """The rows over all targets at the length of training."""
        whole = self.whole
        return whole[whole["eval_seq_len"] == whole["seq_len"]]

    def at_last(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows at the greatest value of the swept setting; at the last one, if it has no order."""
        last: pd.DataFrame = rows[rows[self.swept] == swept_values(rows, self.swept)[-1]] if len(rows) else rows
        return last

    @property
    def comparable(self) -> pd.DataFrame:
        """The rows with the same task: all sizes of the models, or those at the greatest value of another swept setting."""
        return self.trained if self.swept in SIZES else self.at_last(self.trained)

    @property
    def measures_bits(self) -> bool:
        return bool(self.rows["bits_per_byte"].notna().any())

    def subtitle(self, rows: pd.DataFrame, *notes: str) -> list[str]:
        """Describes the settings that all rows share, the number of seeds, the given notes, and what failed."""
        seeds = rows["seeds"].max() if "seeds" in rows else 0
        each = f"mean of {seeds:.0f} seeds and its 95 % interval" if seeds > 1 else "one seed" if seeds else ""
        failed = f"not shown: {self.failed}" if self.failed else ""
        return [training_conditions(rows), "; ".join(filter(None, [each, *notes])), failed]


def accuracy_sweeps(results: pd.DataFrame, curves: pd.DataFrame, swept: str) -> Iterator[tuple[str, AccuracySweep]]:
    """Groups a checked accuracy table into the data of figures, and names each group ("" if there is one)."""
    ok = results[(results["outcome"] == "ok") & results["best"].astype(bool)]
    bad = results[results["outcome"] != "ok"].drop_duplicates(["attention", "outcome"])
    failed = ", ".join(f"{row['attention']} ({row['outcome']})" for _, row in bad.iterrows())
    groups = [(settings, rows) for settings, rows in split(ok, swept, "accuracy") if len(rows)]
    for suffix, (settings, rows) in zip(suffixes(settings for settings, _ in groups), groups, strict=True):
        its_curves = matching(curves, {name: value for name, value in settings.items() if name in curves})
        yield suffix, AccuracySweep(rows, its_curves, swept, failed)


# --- lines -------------------------------------------------------------------------------------------


def accuracy(sweep: AccuracySweep) -> Figure | None:
    """Draws accuracy at the length of training over the swept setting; None if nothing is swept or bits are measured."""
    rows = sweep.trained
    if rows[sweep.swept].nunique() < 2 or sweep.measures_bits:
        return None
    return _accuracy_over(sweep, rows, sweep.swept, "Accuracy, higher is better")


def accuracy_by_length(sweep: AccuracySweep) -> Figure | None:
    """Draws accuracy over the length of evaluation; None if there is one length or bits are measured."""
    rows = sweep.at_last(sweep.whole)
    if rows["eval_seq_len"].nunique() < 2 or sweep.measures_bits:
        return None
    return _accuracy_over(sweep, rows, "eval_seq_len", "Accuracy at lengths not trained at, higher is better")


def _accuracy_over(sweep: AccuracySweep, rows: pd.DataFrame, column: str, title: str) -> Figure:
    figure, axes = _draw_lines(sweep, rows, column, ACCURACY, title, describe_chance(rows))
    axes.set_ylim(-0.02, 1.04)
    chance = rows.groupby(column)["chance"].first().sort_index()
    axes.plot(chance.index, chance, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)), gid="chance", zorder=1)
    scale_settings(axes, sorted(rows[column].unique()), axis_label(column))
    return figure


def describe_chance(rows: pd.DataFrame) -> str:
    """Describes the accuracy of guessing, which is drawn as a dashed line unless the rows are by depth."""
    low, high = rows["chance"].min(), rows["chance"].max()
    dashed = "dashed: " if rows["depth"].isna().all() else ""
    return f"{dashed}chance, {low:.2g}" if low == high else f"{dashed}chance"


def bits_by_position(sweep: AccuracySweep) -> Figure | None:
    """Draws bits per byte over bytes of context at the greatest length; None if they were not measured by position."""
    rows = sweep.rows[sweep.rows["position"].notna() & sweep.rows["bits_per_byte"].notna()]
    if rows.empty:
        return None
    rows = sweep.at_last(rows)
    rows = rows[rows["eval_seq_len"] == rows["eval_seq_len"].max()]
    length = format_setting(rows["eval_seq_len"].iloc[0])
    note = f"evaluated at {length} bytes; a point: all bytes with that context or up to twice as much; dashed: length of training"
    figure, axes = _draw_lines(sweep, rows, "position", BITS_PER_BYTE, BITS_PER_BYTE.title(), note)
    scale_settings(axes, sorted(rows["position"].unique()), "bytes of context (1k = 1024)")
    axes.axvline(float(rows["seq_len"].iloc[0]), color=GREY, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    return figure


def loss(sweep: AccuracySweep) -> Figure | None:
    """Draws the training loss of the first seed over steps, at the greatest value of the swept setting."""
    curves = sweep.at_last(sweep.curves) if sweep.swept in sweep.curves else sweep.curves
    curves = curves[curves["best"] & (curves["seed"] == 0)]
    if curves.empty:
        return None
    smooth = curves.groupby("attention", sort=False)[LOSS.column].transform(lambda losses: losses.rolling(5, min_periods=1).mean())
    curves = curves.assign(**{LOSS.column: smooth})
    rows = sweep.at_last(sweep.trained).drop(columns="seeds")
    notes = "seed 0; means over five points, of which a run has up to 200"
    title = "Training loss in nats, lower is better"
    figure, axes = _draw_lines(sweep, curves, "step", LOSS, title, notes, described=rows, markers=False)
    scale_log(axes.yaxis, 10, lambda value: f"{value:g}")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step")
    return figure


def _draw_lines(
    sweep: AccuracySweep,
    rows: pd.DataFrame,
    x: str,
    metric: Metric,
    title: str,
    *notes: str,
    described: pd.DataFrame | None = None,
    markers: bool = True,
) -> tuple[Figure, Axes]:
    """A figure with a line an attention, and a legend in the order in which they end; the caller scales the axes."""
    names = [str(name) for name in rows["attention"].unique()]
    subtitle = sweep.subtitle(rows if described is None else described, *notes)
    figure = new_figure(title, subtitle, max(BODY, legend_height(names)))
    axes, ends = figure.subplots(), {}
    absent = dict.fromkeys((column for column in (metric.low, metric.high) if column and column not in rows), math.nan)
    for name, part in rows.assign(**absent).groupby("attention", sort=False):
        part = part.sort_values(x, kind="stable")
        draw_line(axes, part[x].to_numpy(float), part, metric, sweep.styles[str(name)], str(name))
        axes.lines[-1].set(clip_on=not markers, **{} if markers else {"marker": "none"})
        ends[str(name)] = part[metric.column].iloc[-1]
    add_legend(axes, sweep.styles, sorted(names, key=lambda name: -ends[name]))
    return figure, axes


# --- accuracy against its cost -----------------------------------------------------------------------


def recall_front(sweep: AccuracySweep) -> Figure | None:
    """Draws accuracy against the bytes of decoding state at the length of training; None if bits are measured."""
    return _front(sweep, sweep.comparable, STATE, "state after the sequence, all layers", base=2)


def recall_latency(sweep: AccuracySweep, decoded: Sweep) -> Figure | None:
    """Draws accuracy against the time of the next token after a context of the length of training.

    Args:
        sweep: the accuracies.
        decoded: timings of decoding with the same models; an attention that is not in both is left out.

    Returns:
        None if bits are measured, or nothing is in both.
    """
    rows = sweep.comparable
    if rows.empty:
        return None
    model = ["attention", *([sweep.swept] if sweep.swept in SIZES else [])]
    times = decoded.rows[decoded.rows["seq_len"] == rows["seq_len"].iloc[0]].set_index(model)[LATENCY.column].dropna()
    rows = rows.join(times, on=model).dropna(subset=LATENCY.column)
    return _front(sweep, rows, LATENCY, "median time of the next token", base=10)


def _front(sweep: AccuracySweep, rows: pd.DataFrame, cost: Metric, label: str, base: int) -> Figure | None:
    """Draws accuracy against a cost: a point a model, a line through the sizes of one attention, and the Pareto front."""
    if rows.empty or sweep.measures_bits:
        return None
    setting = training_phrase(sweep.swept, format_range(rows[sweep.swept]))
    title = f"Accuracy against {'state' if cost is STATE else 'latency'}, {setting}: upper left is better"
    note = "grey: the Pareto front; no other model remembers more than one on it with less"
    figure, axes = _draw_lines(sweep, rows, cost.column, ACCURACY, title, note)
    x = rows[cost.column].to_numpy(float)
    margin = max(1.5, (x.max() / x.min()) ** 0.08)
    axes.set(xlim=(x.min() / margin, x.max() * margin), ylim=(-0.02, 1.04), xlabel=label)
    scale_log(axes.xaxis, base, cost.unit.format)
    draw_front(axes, x, rows["accuracy"].to_numpy(float), higher_is_better=True)
    return figure
