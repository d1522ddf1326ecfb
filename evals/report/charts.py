"""The charts of a report, described as data that charts.js draws."""

from collections.abc import Sequence
from typing import Any

from matplotlib.colors import to_hex, to_rgb

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
"""Columns in the tooltip of a mark."""

ONLY_WHOLE = {"depth": None, "position": None, "best": True}
"""Filter of the rows of training that charts draw: results over all targets, at the best learning rate."""


def charts(part: Part) -> list[dict[str, Any]]:
    """Descriptions of the charts that have data.

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


def details() -> list[dict[str, Any]]:
    """The columns in `DETAILS`, each with its name and, for a metric, the steps of its unit."""
    return [
        {"column": column, "name": METRICS[column].label, "unit": METRICS[column].unit.steps}
        if column in METRICS
        else {"column": column, "name": setting_name(column), "unit": None}
        for column in DETAILS
    ]


def value_phrase(setting: str) -> str:
    """How a value of a setting is written in a sentence: {} tokens, batch {}, {} pairs."""
    phrases = {**TRAINING_SETTINGS, **SETTINGS}
    return phrases.get("seq_len" if setting == "eval_seq_len" else setting, f"{setting_name(setting)} {{}}")


def short_axis_label(setting: str) -> str:
    """Name of a setting without its unit: sequence length."""
    return axis_label(setting).partition(" in ")[0]


# --- styles of attentions ------------------------------------------------------------------------

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
    """Mixes a colour with the least white, in steps of 5 %, that gives it a contrast of at least 4.5 to the dark page."""
    for percent in range(0, 101, 5):
        red, green, blue = (channel + (1 - channel) * percent / 100 for channel in to_rgb(colour))
        mixed = to_hex((red, green, blue))
        if contrast(mixed, DARK) >= 4.5:
            break
    return mixed


def contrast(first: str, second: str) -> float:
    """Ratio of the luminances of two colours, 1 to 21, as WCAG 2.2 defines it."""
    low, high = sorted(map(_luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
