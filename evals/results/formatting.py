"""Numbers as text, and text in lines of at most 80 columns, for the terminal, reports and exports."""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.errors import UsageError
from evals.results.metrics import Metric
from evals.stats.intervals import mean_interval

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 80


# --- numbers --------------------------------------------------------------------------------------


def format_value(row: "pd.Series[Any] | dict[str, Any] | None", metric: Metric) -> str:
    """Writes a metric of one row for a table, in its display unit with half of the interval; a failed row's outcome.

    Returns:
        '12.3±4%', '0.981±0.02', '12.3', 'oom', '?' for an unknown number, or '' without a row.
    """
    if row is None:
        return ""
    if row["outcome"] != "ok":
        return str(row["outcome"])
    value = row[metric.column]
    ends = (row[metric.low], row[metric.high]) if metric.low and metric.high else (math.nan, math.nan)
    if metric.decimals is not None:
        return format_mean(value, *ends, decimals=metric.decimals)
    if math.isnan(value):
        return "?"
    scaled = value / metric.display_scale
    digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
    text = f"{scaled:.{digits}f}" if scaled >= 0.1 else f"{scaled:.2g}"
    low, high = ends
    if not high > low:  # no interval, or none of a count such as 0 sent bytes
        return text
    percent = 50 * (high - low) / value
    return f"{text}±{'>99' if percent > 99 else f'{percent:.0f}'}%"


def format_mean(value: float, low: float, high: float, *, decimals: int = 3) -> str:
    """Writes a mean over seeds and half of its interval, '0.981±0.02'; without an interval (NaN) the mean alone."""
    half = (high - low) / 2
    return f"{value:.{decimals}f}" + ("" if math.isnan(half) else f"±{half:.2g}")


def format_mean_share(shares: "pd.Series[float]") -> str:
    """Writes the mean of shares in percent, and half of its 95 % interval if there are several."""
    mean = mean_interval(list(shares))
    return f"{mean.value:.0%}" if math.isnan(mean.low) else f"{mean.value:.0%} ± {(mean.high - mean.low) / 2:.0%}"


def format_setting(value: object) -> str:
    """Writes the value of a setting: 8192 -> '8k', 1000 -> '1000'. k is 1024, as is usual for sequence lengths."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        return str(value)
    value = float(value)
    if value >= 1024 and value % 512 == 0:
        return f"{value / 1024:g}k" if value < 1024**2 else f"{value / 1024**2:g}M"
    return f"{value:g}" if value % 1 else f"{value:.0f}"


def format_estimate(value: float) -> str:
    """Writes an estimated setting with two significant digits: 1189 -> '1.2k'."""
    for power, unit in ((2, "M"), (1, "k")):
        if value >= 1024**power:
            return f"{float(f'{value / 1024**power:.2g}'):g}{unit}"
    return f"{float(f'{value:.2g}'):g}"


def parse_fraction(text: str, option: str) -> float:
    """Parses a fraction, written as '5%' or '0.05'.

    Raises:
        UsageError: naming the option, if it is not a number of at least 0 and below 1.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise UsageError(f"{option} must be a fraction such as 5% or 0.05, got '{text}'")
    return value


# --- text -----------------------------------------------------------------------------------------


def align_columns(heads: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
    """Aligns columns of text to the right beside a column of heads.

    A block is at most 80 characters wide; further columns follow in further blocks, each with the heads. Heads that leave
    no room for the widest column lose their middle; results.csv has them in full.
    """
    columns = [[shorten(text, WIDTH // 2) for text in column] for column in columns]
    widest = max((len(text) for column in columns for text in column), default=0)
    heads = [shorten(head, WIDTH - 1 - widest) for head in heads]
    left = max(map(len, heads))
    blocks: list[list[str]] = []
    for column in columns:
        width = max(map(len, column)) + 1
        if not blocks or len(blocks[-1][0]) + width > WIDTH:
            blocks.append([f"{head:<{left}}" for head in heads])
        blocks[-1] = [line + f"{text:>{width}}" for line, text in zip(blocks[-1], column, strict=True)]
    return "\n\n".join("\n".join(block) for block in blocks)


def shorten(text: str, length: int) -> str:
    """Replaces the middle of a text of more than `length` characters by an ellipsis."""
    return text if len(text) <= length else f"{text[: (length - 1) // 2]}…{text[len(text) - length // 2 :]}"


def wrap(text: str) -> str:
    """Breaks a text into lines of at most 80 columns and indents all but the first; longer words stay whole."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
