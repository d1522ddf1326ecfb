"""Words, numbers and tables of findings in Markdown."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from evals.results.metrics import BYTES, SECONDS

write_seconds = partial(SECONDS.format, digits=3)
write_bytes = partial(BYTES.format, digits=3)


def write_number(value: float) -> str:
    """Writes a number in three digits."""
    return f"{value:.3g}"


def write_percent(value: float) -> str:
    """Writes a fraction in percent."""
    return f"{value:.0%}".replace("%", " %")


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is aligned left and the others right."""
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    return "\n".join([lines[0], f"|:--{'|--:' * (len(heads) - 1)}|", *lines[1:]])


def enumerate_words(words: Iterable[str]) -> str:
    """a, b and c; "none" without words."""
    *first, last = list(words) or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def interval(low: float, high: float, write: Callable[[float], str]) -> str:
    """An interval in brackets after a space; empty if it is unknown."""
    return f" [{write(low)}, {write(high)}]" if math.isfinite(low) and math.isfinite(high) else ""
