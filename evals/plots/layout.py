"""What all figures share: a sweep laid out along its swept setting, units, the words above a plot, and text that fits."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from numpy.typing import NDArray

from evals.plots.style import GREY, Style
from evals.results.frames import Sweep
from evals.results.metrics import BYTES
from evals.results.settings import conditions, format_range
from evals.stats.intervals import CONFIDENCE

Numbers = NDArray[np.float64]

WIDTH, EDGE = 7.0, 0.06  # of a page, the full width of a paper, and its margin; inches, as all lengths here
LEFT = 0.65  # of a plot whose y axis has ticks with units
LINE, LEGEND = 0.12, 0.2  # heights of a line of the subtitle, and of a row of keys
NAME, SMALL = 7.5, 6.5  # points: names of attentions, and the least size of any text


# --- words -------------------------------------------------------------------------------------------


@cache
def wide(text: str, size: float, weight: str = "normal") -> float:
    """How many inches the longest line of a text takes, known before anything is drawn."""
    font = FontProperties(family="DejaVu Sans", weight=weight)
    lines = [TextPath((0, 0), line, size=size, prop=font) for line in text.split("\n") if line.strip()]
    # Hinting at the pixels of a screen widens some letters.
    return 1.02 * max((float(np.max(line.vertices[:, 0])) for line in lines), default=0.0) / 72


def wrapped(text: str, size: float, room: float) -> str:
    """The text in lines that fit into `room` inches."""
    if wide(text, size) <= room:
        return text
    return textwrap.fill(text, max(10, int(len(text) * room / wide(text, size)) - 2), break_on_hyphens=False)


def abridged(text: str, size: float, room: float, weight: str = "normal") -> str:
    """The text, without as much of its middle as does not fit into `room` inches: names differ at either end."""
    kept = text
    for length in range(len(text) - 1, 2, -1):
        if wide(kept, size, weight) <= room:
            break
        kept = text[: (length + 1) // 2] + "…" + text[len(text) - length // 2 :]
    return kept


def weight(look: Style) -> str:
    """Ours is in bold, as its line is thicker."""
    return "bold" if look.width > 2 else "normal"


def label(looks: Mapping[str, Style], name: str) -> str:
    """An attention's name, as much of it as a page has room for."""
    return abridged(name, NAME, 1.6, weight(looks[name]) if name in looks else "normal")


def subtitle(sweep: Sweep, *notes: str, sampled: bool = False, left: float = LEFT) -> str:
    """What the comparison was, in words: every setting but the swept one, where the numbers come from, what is unmatched.

    In lines that fit between `left` and the edge of the page.
    """
    lines = [conditions(sweep.rows, sweep.column)]
    if sampled and sweep.rows["samples"].notna().any():
        samples, rounds = (format_range(sweep.rows[name].dropna()) for name in ("samples", "rounds"))
        rounds += " round" if rounds == "1" else " rounds"
        lines.append(f"median of {samples} samples in {rounds}, with its {CONFIDENCE:.0%} interval")
    return lined([*lines, *notes, "; ".join(matching(sweep))], left)


def lined(lines: Iterable[str], left: float) -> str:
    """Lines of a subtitle, those that say something, as wide as the page is right of `left`."""
    return "\n".join(wrapped(line, 7, WIDTH - left - EDGE) for line in lines if line)


def matching(sweep: Sweep) -> list[str]:
    """What was made equal between the candidates, as the table says it, and whether they have as many parameters."""
    words = [str(word) for word in dict.fromkeys(sweep.rows["match"].dropna()) if str(word).strip()]
    held = sweep.rows.groupby(sweep.column, sort=False)["parameter_bytes"].agg(["min", "max"]).dropna()
    held = held[held["max"] > 1.01 * held["min"]]
    if held.empty:
        return words
    if sweep.rows.groupby("attention")["parameter_bytes"].nunique().le(1).all():
        least, most = float(held["min"].min()), float(held["max"].max())
        high = BYTES.format(most, digits=2)
        factor = next(factor for factor, suffix in BYTES.steps if high.endswith(suffix))
        # In the unit of the greatest, as long as that leaves something of the least.
        low = BYTES.format(least, digits=2) if least < 0.01 * most else f"{least / factor:.2g}"
        return [*words, f"parameters not matched: {low} to {high}"]
    apart = (held["max"] / held["min"].where(held["min"] > 0)).max()
    return [*words, f"parameters not matched: up to {apart:.2g} times as many" if apart > 0 else "parameters not matched"]


# --- drawing -----------------------------------------------------------------------------------------


def headed(title: str, words: str, body: float, left: float = LEFT) -> Figure:
    """A page with a title and a subtitle, and `body` inches free beneath them."""
    height = 0.38 + LINE * (words.count("\n") + 1) + body
    picture = Figure(figsize=(WIDTH, height))
    picture.text(left / WIDTH, 1 - 0.08 / height, title, size=9.5, weight="bold", va="top")
    picture.text(left / WIDTH, 1 - 0.29 / height, words, size=7, color=GREY, va="top")
    return picture


def placed(picture: Figure, left: float, bottom: float, width: float, height: float, **options: Any) -> Axes:
    """Axes at a place on the page, in inches from its lower left corner."""
    high = picture.get_figheight()
    return picture.add_axes((left / WIDTH, bottom / high, width / WIDTH, height / high), **options)


def keyed(axes: Axes, looks: Mapping[str, Style], names: Sequence[str], width: float) -> None:
    """The names of rows left of axes that are `width` inches wide, each with its key; rows are at y = 0, 1, …"""
    aside = axes.get_yaxis_transform()
    for row, name in enumerate(names):
        look = looks[name]
        mark = look.line(discrete=True)
        axes.add_line(Line2D([-0.1 / width], [row], transform=aside, clip_on=False, **mark))
        said = label(looks, name)
        axes.text(-0.19 / width, row, said, va="center_baseline", ha="right", size=NAME, weight=weight(look), transform=aside)


def key_room(looks: Mapping[str, Style], names: Sequence[str]) -> float:
    """Inches that `keyed` needs."""
    return max((wide(label(looks, name), NAME, weight(looks[name])) for name in names), default=0) + 0.19 + EDGE


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """The heights nearest to `wanted` (ascending, in 0 … 1) that keep `gap` between neighbours.

    Least squares under order: isotonic regression of wanted_i − i·gap, by its min-max formula.
    """
    n = len(wanted)
    level = [height - index * gap for index, height in enumerate(wanted)]
    fitted = [max(min(float(np.mean(level[j : k + 1])) for k in range(i, n)) for j in range(i + 1)) for i in range(n)]
    return [min(max(height, 0.02), max(0.98 - (n - 1) * gap, 0.02)) + index * gap for index, height in enumerate(fitted)]


def log_limits(least: float, most: float, span: float = 4.0) -> tuple[float, float]:
    """Limits of a logarithmic axis around what it shows. A span under 4 would magnify noise into a landscape."""
    span = max(1.06 * most / least, span)
    middle = math.sqrt(least * most)
    return middle / span**0.54, middle * span**0.54
