"""Numbers as text, in tables of at most 80 columns: what a terminal, a page and an export show of results."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Quantity:
    """One quantity on the screen: its column, what it is divided by to get to its unit, and its interval's columns."""

    name: str
    title: str
    column: str
    unit: float = 1.0
    bounds: tuple[str, str] | None = None


QUANTITIES = (
    Quantity("ms", "latency in ms, lower is better", "latency_s", 1e-3, ("latency_low_s", "latency_high_s")),
    Quantity("speed-up", "speed-up over {reference}, higher is better", "speedup", 1.0, ("speedup_low", "speedup_high")),
    Quantity("peak MiB", "peak memory in MiB above inputs and parameters, lower is better", "peak_bytes", 2.0**20),
    Quantity("sent MiB", "sent by a rank in one call, MiB, lower is better", "sent_bytes", 2.0**20),
)
WIDTH = 80


def format_value(row: "pd.Series[Any] | dict[str, Any] | None", quantity: Quantity) -> str:
    """What a table says of one row: its number and interval, its outcome if it has none, nothing if there is no row."""
    if row is None:
        return ""
    if row["outcome"] != "ok":
        return str(row["outcome"])
    value = row[quantity.column] / quantity.unit
    if math.isnan(value):
        return "?"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    text = f"{value:.{digits}f}" if value >= 0.1 else f"{value:.2g}"
    if quantity.bounds is None:
        return text
    low, high = (row[bound] for bound in quantity.bounds)
    percent = 50 * (high - low) / row[quantity.column]
    return f"{text}±{'>99' if percent > 99 else f'{percent:.0f}'}%" if high > low else text


def format_mean(value: float, low: float, high: float) -> str:
    """A mean over seeds, and half of its interval where there is one."""
    half = (high - low) / 2
    return f"{value:.3f}" + ("" if math.isnan(half) else f"±{half:.2g}")


def align_columns(heads: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
    """Columns of right-aligned text beside their heads, as many in a block as 80 characters hold.

    Names that leave no room for the widest column lose their middle, which results.csv has.
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


def shorten(text: str, most: int) -> str:
    """Of more than `most` characters, the first and the last of them."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[len(text) - most // 2 :]}"


def wrap(text: str) -> str:
    """`text` in lines of at most 80 columns, of which those behind the first are indented. Only a longer word is longer."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


# --- units: SI in the table, human on the axes -----------------------------------------------------

SECONDS, BYTES = ("ns", "µs", "ms", "s"), ("B", "KiB", "MiB", "GiB", "TiB")
DECIMAL = ("", "k", "M", "G")


def scaled(value: float, step: float, units: Sequence[str], digits: int = 4) -> str:
    """The value in the largest unit that leaves at least 1 of it; each unit is `step` of the one before."""
    power = 0
    # A tick computed as 10 ** x can miss its decade by a rounding.
    while value >= step * (1 - 1e-9) and power < len(units) - 1:
        value, power = value / step, power + 1
    return f"{float(f'{value:.{digits}g}'):.4g} {units[power]}".rstrip()


def format_seconds(value: float) -> str:
    return scaled(value * 1e9, 1000, SECONDS)


def format_bytes(value: float) -> str:
    return scaled(value, 1024, BYTES)


def format_setting(value: object) -> str:
    """A setting as people write it: 8192 -> 8k, 1000 -> 1000. k is 1024 here, as sequence lengths are spoken of."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        return str(value)
    value = float(value)
    if value >= 1024 and value % 512 == 0:
        return f"{value / 1024:g}k" if value < 1024**2 else f"{value / 1024**2:g}M"
    return f"{value:g}" if value % 1 else f"{value:.0f}"


def format_estimate(value: float) -> str:
    """An estimated setting in the two digits that it is worth: 1189 -> 1.2k."""
    for power, unit in ((2, "M"), (1, "k")):
        if value >= 1024**power:
            return f"{float(f'{value / 1024**power:.2g}'):g}{unit}"
    return f"{float(f'{value:.2g}'):g}"
