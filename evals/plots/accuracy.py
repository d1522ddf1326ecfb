"""Figures of what attentions learned: accuracy, what it costs to remember, bits per byte, losses.

All show the best learning rate of each attention. Bands and bars are intervals over seeds.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from evals.plots.layout import EDGE, LEFT, NAME, WIDTH, Numbers, headed, label, lined, placed, spread, weight, wide
from evals.plots.style import GREY, Style
from evals.results.formatting import format_bytes, format_seconds, format_setting
from evals.results.frames import Sweep
from evals.results.settings import AXIS_LABELS, TRAINING_SETTINGS, setting_name

PLOT, FOOT = 2.6, 0.45  # heights in inches
SIZES = ("hidden_dim", "num_heads", "num_layers", "conv_size")
"""Of these settings that make another model, and leave what is asked of it as it is."""


class AccuracySweep(NamedTuple):
    """The rows of one set of figures: those of the best learning rates that are ok, and the points of their losses."""

    rows: pd.DataFrame
    curves: pd.DataFrame
    swept: str
    looks: Mapping[str, Style]
    failed: str

    @property
    def whole(self) -> pd.DataFrame:
        """Rows over all targets."""
        return self.rows[self.rows["depth"].isna() & self.rows["position"].isna()]

    @property
    def trained(self) -> pd.DataFrame:
        """Those at the length of training."""
        whole = self.whole
        return whole[whole["eval_seq_len"] == whole["seq_len"]]

    def at_last(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Where the sweep goes furthest."""
        last: pd.DataFrame = rows[rows[self.swept] == rows[self.swept].max()]
        return last

    @property
    def costed(self) -> pd.DataFrame:
        """What a front compares, as all of it is asked the same: every size of the models; or where the sweep goes furthest."""
        return self.trained if self.swept in SIZES else self.at_last(self.trained)

    def words(self, rows: pd.DataFrame, *notes: str, left: float = LEFT) -> str:
        said = (
            TRAINING_SETTINGS[name].format(format_setting(rows[name].iloc[0]))
            for name in TRAINING_SETTINGS
            if name in rows and rows[name].dropna().nunique() == 1
        )
        seeds = rows["seeds"].max() if "seeds" in rows else 0
        each = f"mean of {seeds:.0f} seeds and its 95 % interval" if seeds > 1 else "one seed" if seeds else ""
        failed = f"not shown: {self.failed}" if self.failed else ""
        return lined([", ".join(said), "; ".join(filter(None, [each, *notes])), failed], left)


class Line(NamedTuple):
    x: Numbers
    y: Numbers
    low: Numbers
    high: Numbers


def line(rows: pd.DataFrame, x: str, y: str, low: str, high: str) -> Line:
    rows = rows.sort_values(x)
    return Line(*(rows[column].to_numpy(float) for column in (x, y, low, high)))


ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")
BITS = ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high")


def accuracy(learned: AccuracySweep) -> Figure | None:
    """Over the swept setting, asked at the length of training; None where nothing is swept, or bits are the measure."""
    rows = learned.trained
    if rows[learned.swept].nunique() < 2 or rows["bits_per_byte"].notna().any():
        return None
    lines = {str(name): line(own, learned.swept, *ACCURACY) for name, own in rows.groupby("attention", sort=False)}
    axes = _lines("Accuracy, higher is better", learned.words(rows, chance(rows)), lines, learned.looks)
    _of_accuracy(axes, rows, learned.swept)
    _log_x(axes, rows[learned.swept].unique(), AXIS_LABELS.get(learned.swept, setting_name(learned.swept)))
    return _named(axes, lines, learned.looks)


def accuracy_by_length(learned: AccuracySweep) -> Figure | None:
    """Over the length at which it was asked; None where that is one, or bits are the measure."""
    rows = learned.at_last(learned.whole)
    if rows["eval_seq_len"].nunique() < 2 or rows["bits_per_byte"].notna().any():
        return None
    lines = {str(name): line(own, "eval_seq_len", *ACCURACY) for name, own in rows.groupby("attention", sort=False)}
    axes = _lines("Accuracy at lengths not trained at, higher is better", learned.words(rows, chance(rows)), lines, learned.looks)
    _of_accuracy(axes, rows, "eval_seq_len")
    _log_x(axes, rows["eval_seq_len"].unique(), AXIS_LABELS["seq_len"])
    return _named(axes, lines, learned.looks)


def bits_by_position(learned: AccuracySweep) -> Figure | None:
    """Over bytes of context, asked at the greatest length; None where there are none."""
    rows = learned.rows[learned.rows["position"].notna() & learned.rows["bits_per_byte"].notna()]
    if rows.empty:
        return None
    rows = learned.at_last(rows)
    rows = rows[rows["eval_seq_len"] == rows["eval_seq_len"].max()]
    lines = {str(name): line(own, "position", *BITS) for name, own in rows.groupby("attention", sort=False)}
    note = f"asked at {format_setting(rows['eval_seq_len'].iloc[0])} bytes; a point is of all bytes with that context, up to twice as much"
    axes = _lines("Bits per byte, lower is better", learned.words(rows, note), lines, learned.looks)
    _log_x(axes, rows["position"].unique(), "bytes of context (1k = 1024)")
    axes.axvline(float(rows["seq_len"].iloc[0]), color=GREY, linewidth=0.8, dashes=(2, 2), zorder=1)
    return _named(axes, lines, learned.looks)


def loss(learned: AccuracySweep) -> Figure | None:
    """The training loss of the first seed over steps, where the sweep goes furthest."""
    curves = learned.curves
    if learned.swept in curves:
        curves = learned.at_last(curves)
    curves = curves[curves["best"] & (curves["seed"] == 0)]
    if curves.empty:
        return None
    rows = learned.at_last(learned.trained)
    lines = {}
    for name, own in curves.groupby("attention", sort=False):
        y = own["loss_nats"].rolling(5, min_periods=1).mean().to_numpy(float)
        lines[str(name)] = Line(own["step"].to_numpy(float), y, *np.full((2, len(y)), math.nan))
    words = learned.words(rows.drop(columns="seeds"), "seed 0; means over five points, of which a run has up to 200")
    axes = _lines("Training loss in nats, lower is better", words, lines, learned.looks, markers=False)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step")
    return _named(axes, lines, learned.looks)


def recall_front(learned: AccuracySweep) -> Figure | None:
    """Accuracy against the bytes to decode with, at the length of training; None where bits are the measure."""
    rows = learned.costed
    if rows.empty or rows["bits_per_byte"].notna().any():
        return None
    axis = "state after the sequence, all layers", format_bytes, LogLocator(base=2, numticks=8)
    return _front(learned, rows, "state_bytes", "state", axis)


def recall_latency(learned: AccuracySweep, decoded: Sweep) -> Figure | None:
    """Accuracy against the time that the next token takes behind as long a context; None where bits are the measure.

    decoded: what the same models take to decode. One that is not in both is left out.
    """
    rows = learned.costed
    if rows.empty or rows["bits_per_byte"].notna().any():
        return None
    model = ["attention", *([learned.swept] if learned.swept in SIZES else [])]
    times = decoded.rows[decoded.rows["seq_len"] == rows["seq_len"].iloc[0]].set_index(model)["latency_s"].dropna()
    rows = rows.join(times, on=model).dropna(subset="latency_s")
    if rows.empty:
        return None
    return _front(learned, rows, "latency_s", "latency", ("median time of the next token", format_seconds, MaxNLocator(5)))


def _front(
    learned: AccuracySweep, rows: pd.DataFrame, column: str, cost: str, axis: tuple[str, Callable[[float], str], Locator]
) -> Figure:
    """Accuracy against a cost: a point a model, a line through the sizes of one attention. axis: its words, how it is written, and
    where.
    """
    words, written, ticks = axis
    lines = {str(name): line(own, column, *ACCURACY) for name, own in rows.groupby("attention", sort=False)}
    note = "grey: the front; nobody on it remembers more with less"
    places = [format_setting(one) for one in sorted(rows[learned.swept].unique())]
    place = TRAINING_SETTINGS.get(learned.swept, f"{learned.swept} {{}}").format(
        " to ".join(dict.fromkeys([places[0], places[-1]]))
    )
    axes = _lines(f"Accuracy against {cost}, {place}: upper left is better", learned.words(rows, note), lines, learned.looks)
    points = [(x, y) for one in lines.values() for x, y in zip(one.x.tolist(), one.y.tolist(), strict=True)]
    points.sort(key=lambda point: (point[0], -point[1]))  # of equal cost, the best first
    best = [(x, y) for index, (x, y) in enumerate(points) if all(y > other for _, other in points[:index])]
    corners = [(x, level) for (x, y), (_, before) in zip(best, [(0.0, 0.0), *best], strict=False) for level in (before, y)]
    axes.set_xscale("log")
    span = max(1.5, (points[-1][0] / points[0][0]) ** 0.08)
    left, right = points[0][0] / span, points[-1][0] * span
    axes.plot(*zip(*corners, (right, corners[-1][1]), strict=True), color="#9a9a9a", linewidth=1.6, zorder=1.5, gid="front")
    axes.set(xlim=(left, right), ylim=(-0.02, 1.04))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(words)
    return _named(axes, lines, learned.looks)


FIGURES: dict[str, Callable[[AccuracySweep], Figure | None]] = {
    "accuracy": accuracy,
    "by_length": accuracy_by_length,
    "recall_front": recall_front,
    "bits_by_position": bits_by_position,
    "loss": loss,
}
"""One that has nothing to show is None, and is left out."""


def accuracy_sweeps(
    results: pd.DataFrame, curves: pd.DataFrame, swept: str, looks: Mapping[str, Style]
) -> Iterator[tuple[str, AccuracySweep]]:
    """The rows that belong in one figure, and what tells them from the others ("" if nothing does)."""
    ok = results[(results["outcome"] == "ok") & results["best"].astype(bool)]
    bad = results[results["outcome"] != "ok"].drop_duplicates(["attention", "outcome"])
    failed = ", ".join(f"{row['attention']} ({row['outcome']})" for _, row in bad.iterrows())
    apart = [name for name in TRAINING_SETTINGS if name != swept and name in ok and ok[name].nunique(dropna=False) > 1]
    for values, rows in ok.groupby(apart, dropna=False, sort=True) if apart else [((), ok)]:
        if len(rows):
            yield "".join(f"-{format_setting(value)}" for value in values), AccuracySweep(rows, curves, swept, looks, failed)


# --- drawing --------------------------------------------------------------------------------------


def _lines(title: str, words: str, lines: Mapping[str, Line], looks: Mapping[str, Style], *, markers: bool = True) -> Axes:
    """A line an attention with its band, and the names right of them."""
    room = max(0.95, *(wide(label(looks, name), NAME, weight(looks[name])) for name in lines)) + 0.42
    picture = headed(title, words, FOOT + PLOT + 0.02)
    width = WIDTH - LEFT - room - EDGE
    axes = placed(picture, LEFT, FOOT, width, PLOT)
    for name, (x, y, low, high) in lines.items():
        look = looks[name]
        mark: dict[str, Any] = look.line(discrete=False) | ({} if markers else {"marker": "none"})
        axes.plot(x, y, label=name, gid=name, zorder=2 + look.width, clip_on=not markers, **mark)
        if len(x) > 1:
            axes.fill_between(x, low, high, color=look.colour, alpha=0.16, linewidth=0)
        else:
            axes.vlines(x, low, high, color=look.colour, linewidth=1.2, zorder=2)
    return axes


def _named(axes: Axes, lines: Mapping[str, Line], looks: Mapping[str, Style]) -> Figure:
    """The figure of these axes, whose limits are final, with the names right of them at the heights where lines end."""
    bottom, top = (axes.transScale.transform((1, limit))[1] for limit in axes.get_ylim())
    ends = sorted(((axes.transScale.transform((1, one.y[-1]))[1] - bottom) / (top - bottom), name) for name, one in lines.items())
    width = axes.get_position().width * WIDTH
    for height, (_, name) in zip(spread([end for end, _ in ends], 0.151 / PLOT), ends, strict=True):
        key = Line2D([1 + inch / width for inch in (0.1, 0.2, 0.3)], [height] * 3, markevery=[1], **looks[name].line(False))
        key.set(transform=axes.transAxes, clip_on=False)
        axes.add_line(key)
        said: dict[str, Any] = {"va": "center_baseline", "size": NAME, "weight": weight(looks[name])}
        axes.text(1 + 0.36 / width, height, label(looks, name), transform=axes.transAxes, **said)
    return axes.get_figure()  # type: ignore[return-value]  # these axes are of no subfigure


def _of_accuracy(axes: Axes, rows: pd.DataFrame, x: str) -> None:
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    chance = rows.groupby(x)["chance"].first().sort_index()
    axes.plot(
        chance.index.to_numpy(float), chance.to_numpy(float), color=GREY, linewidth=0.8, dashes=(2, 2), gid="chance", zorder=1
    )


def chance(rows: pd.DataFrame) -> str:
    """What a subtitle says of it; it is drawn where there are no depths."""
    low, high = rows["chance"].min(), rows["chance"].max()
    dashed = "dashed: " if rows["depth"].isna().all() else ""
    return f"{dashed}chance, {low:.2g}" if low == high else f"{dashed}chance"


def _log_x(axes: Axes, places: Iterable[float], name: str) -> None:
    found = sorted(float(one) for one in places)
    axes.set_xscale("log", base=2)
    margin = (found[-1] / found[0]) ** 0.03
    axes.set_xlim(found[0] / margin, found[-1] * margin)
    every = math.ceil(len(found) / 10)
    axes.set_xticks(found[::-every][::-1], [format_setting(one) for one in found[::-every][::-1]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(name)
