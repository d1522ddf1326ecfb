"""The charts of a report, described as data: the page's script draws what it finds here."""

from collections.abc import Sequence
from typing import Any

from evals.plots.style import style_of
from evals.report.sources import CONTEXT, TIMING, TRAINING, Part
from evals.results.metrics import (
    ACCURACY,
    BITS_PER_BYTE,
    LATENCY,
    LOSS,
    MAX_CONTEXT,
    METRICS,
    PEAK_MEMORY,
    ROOFLINE,
    SENT,
    SPEEDUP,
    STATE,
    THROUGHPUT,
    Metric,
    Unit,
)
from evals.results.settings import SETTINGS, TRAINING_SETTINGS, axis_label, is_number, setting_name

CHARTS = {
    TIMING: (LATENCY, SPEEDUP, PEAK_MEMORY, THROUGHPUT, ROOFLINE, STATE, SENT),
    TRAINING: (ACCURACY, BITS_PER_BYTE, LOSS, STATE),
    CONTEXT: (MAX_CONTEXT,),
}
"""The metrics of each kind of table that have a chart, in their order on the page."""

DETAILS = (
    *("samples", "rounds", "seeds", "roofline_fraction", "bound", "verdict", "relative_to", "noise_floor", "impl"),
    *("learning_rate", "commit", "processor", "torch", "comparison", "study"),
)
"""Columns that a chart shows of the value under the pointer."""

ONLY_WHOLE = {"depth": None, "position": None, "best": True}
"""Values of columns in the rows of a training that charts show: over all targets, at the best learning rate."""


def charts(part: Part) -> list[dict[str, Any]]:
    """Descriptions of the charts that have something to show.

    Returns:
        For each chart the keys that charts.js reads:
        id, title: name and title of the metric;
        y, low, high: columns of the metric and of the ends of its interval, "" without an interval;
        unit: steps of the unit, as (factor, suffix);
        log, logBase: whether the y axis is logarithmic at first, and the ratio of its ticks;
        x, xTitle, xPhrase, ordered, logX: column of the x axis, its title, how a value is phrased ("{} tokens"), whether its
        values are numbers, and whether they can be on a logarithmic axis;
        only: values that columns must have in a row; same: two columns that must be equal.
    """
    table = part.table
    references = list(table["relative_to"].dropna().unique()) if "relative_to" in table else []
    reference = str(references[0]) if len(references) == 1 else f"each set's own reference ({', '.join(references)})"
    x = part.swept
    if part.kind == TRAINING and table["eval_seq_len"].nunique() > 1 and table[x].nunique() == 1:
        x = "eval_seq_len"
    axis = {
        "x": x,
        "xTitle": axis_label(x),
        "xPhrase": value_phrase(x),
        "ordered": is_number(table[x]) and table[x].nunique() > 1,
        "logX": is_number(table[x]) and bool((table[x] > 0).all()),
    }
    if part.kind == TRAINING:
        axis["only"] = ONLY_WHOLE
        if x != "eval_seq_len":
            axis["same"] = ["seq_len", "eval_seq_len"]
    drawn = [metric for metric in CHARTS[part.kind] if metric.column in table and table[metric.column].notna().any()]
    return [axis | _describe(metric, metric.title(reference), bool((table[metric.column].dropna() > 0).all())) for metric in drawn]


def _describe(metric: Metric, title: str, is_positive: bool) -> dict[str, Any]:
    return {
        "id": metric.name,
        "title": title,
        "y": metric.column,
        "low": metric.low or "",
        "high": metric.high or "",
        "unit": metric.unit.steps,
        "log": metric.log_scale and is_positive,
        "logBase": metric.log_base,
    }


def details() -> list[tuple[str, str, Unit | None]]:
    """The columns in `DETAILS`, each with its name and, for a metric, its unit."""
    return [
        (column, METRICS[column].label, METRICS[column].unit) if column in METRICS else (column, setting_name(column), None)
        for column in DETAILS
    ]


def value_phrase(setting: str) -> str:
    """How a value of a setting is written in a sentence: {} tokens, batch {}, {} pairs."""
    phrases = {**TRAINING_SETTINGS, **SETTINGS}
    return phrases.get("seq_len" if setting == "eval_seq_len" else setting, f"{setting_name(setting)} {{}}")


def short_axis_label(setting: str) -> str:
    """Name of a setting without its unit: sequence length."""
    return axis_label(setting).partition(" in ")[0]


# --- how attentions are drawn ---------------------------------------------------------------------

SHAPES = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "<": "triangle-left",
    ">": "triangle-right",
}
OTHER_SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right")
DARK = "#15181d"
"""Background of the dark page."""


def styles(attentions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each attention the colours on a light and on a dark page, the marker, dashes and width, as in the figures."""
    chosen = style_of(attentions)
    return {
        name: {
            "light": chosen[name].colour,
            "dark": lighten(chosen[name].colour),
            "shape": SHAPES.get(chosen[name].marker) or OTHER_SHAPES[index % len(OTHER_SHAPES)],
            "dashes": [1.5 * length for length in chosen[name].dashes] or [1, 0],
            "width": chosen[name].width + 0.4,
        }
        for index, name in enumerate(attentions)
    }


def lighten(colour: str) -> str:
    """Mixes a colour with as little white as gives it a contrast of 4.5 or more to the dark page."""
    for percent in range(0, 101, 5):
        mixed = [round(channel + (255 - channel) * percent / 100) for channel in _channels(colour)]
        if contrast(mixed, _channels(DARK)) >= 4.5:
            break
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def contrast(first: Sequence[int], second: Sequence[int]) -> float:
    """Ratio of the luminances of two colours, 1 to 21, as WCAG 2.2 defines it. Channels are 0 to 255."""
    low, high = sorted(map(_luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def _channels(colour: str) -> list[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def _luminance(channels: Sequence[int]) -> float:
    shares = [channel / 255 for channel in channels]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
