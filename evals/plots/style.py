"""How an attention is drawn: the same colour, marker and dashes in every figure there is, and the style around them."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.path import Path as Shape


@dataclass(frozen=True)
class Style:
    """How an attention is drawn, everywhere. Marker and dashes tell it apart where colour cannot."""

    colour: str
    marker: str
    dashes: tuple[float, ...] = ()
    width: float = 1.2

    def line(self, discrete: bool) -> dict[str, Any]:
        """As matplotlib's properties of a line; points alone where `discrete`."""
        style = "none" if discrete else (0, self.dashes) if self.dashes else "solid"
        size = 3.5 + self.width / 2
        return {"color": self.colour, "marker": self.marker, "linestyle": style, "linewidth": self.width, "markersize": size}


# After Okabe & Ito 2008 and Tol 2021, told apart under protanopia and deuteranopia (tests/evals/test_figures.py).
STYLES = {
    "bsbr": Style("#d55e00", "o", width=2.6),
    "standard": Style("#000000", "s"),
    "linear": Style("#0072b2", "^", (5, 1.5)),
    "sliding_window": Style("#56b4e9", "D", (1.2, 1.2)),
    "sparse": Style("#009e73", "v", (5, 1.2, 1.2, 1.2)),
    "hopfield": Style("#cc79a7", "P", (3, 1.5)),
    "delta_net": Style("#e69f00", "<", (7, 1.2, 1.2, 1.2, 1.2, 1.2)),
    "gau": Style("#882255", ">", (1.2, 2.4)),
}
SPARE_COLOURS = ("#332288", "#999933", "#44aa99", "#aa4499", "#777777", "#661100", "#6699cc", "#117733")
SPARE_MARKERS = ("h", "p", "X", "d", "H", "8", "*")

HOURGLASS = Shape([(-0.8, -1), (0.8, -1), (-0.8, 1), (0.8, 1), (-0.8, -1)])
UNEQUAL = Shape([(-1, 0.4), (1, 0.4), (-1, -0.4), (1, -0.4), (-0.6, -1), (0.6, 1)], [1, 2] * 3)
FAILURES: dict[str, str | Shape] = {
    "oom": "x",
    "timeout": HOURGLASS,
    "crash": "*",
    "unsupported": "_",
    "uncertified": "$?$",
    "impossible": UNEQUAL,
    "lost": "1",
}
MARK: dict[str, Any] = {"markersize": 5, "markeredgewidth": 1.1, "markeredgecolor": "auto", "linestyle": "none", "clip_on": False}

GREY = "#555555"

# Dark to light, so that the order survives in print, and from blue to yellow, which no colour-blindness confuses.
SLOWER_TO_FASTER = ("#12306a", "#6a86b8", "#b0b0b0", "#e4ca6c", "#fff6c8")
# Three that are no attention's, and that are as far apart in grey as in colour.
PARTS = {"parameters": "#26384a", "activations": "#8ba0b4", "state": "#dfe7ee"}
RC = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "lines.markeredgewidth": 0.4,
    "lines.markeredgecolor": "white",
    "legend.frameon": False,
    "legend.fontsize": 7,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0.4,
    "legend.handletextpad": 0.1,
    "legend.columnspacing": 1.2,
    "hatch.linewidth": 0.6,
    "savefig.dpi": 200,
    # Ids in an SVG are random without it, and redrawing would change every file.
    "svg.hashsalt": "bsbr",
}


def style_of(attentions: Iterable[str]) -> dict[str, Style]:
    """A look for each name: fixed for the built-in, by a stable hash for others, the next one free where two hashes meet.

    No two are alike. With up to 8 of other names, no two share a colour.
    """
    names = set(attentions)
    chosen = {name: look for name, look in STYLES.items() if name in names}
    for name in sorted(names - chosen.keys()):
        start, attempt = zlib.crc32(name.encode()), 0
        while (look := _spare(start, attempt)) in chosen.values():
            attempt += 1
        chosen[name] = look
    return chosen


def _spare(start: int, attempt: int) -> Style:
    # All colours at the first dashes come before any colour again; marker follows colour, so each pair is fixed.
    turn, step = divmod(attempt, len(SPARE_COLOURS))
    index = (start + step) % len(SPARE_COLOURS)
    return Style(SPARE_COLOURS[index], SPARE_MARKERS[(index + turn) % len(SPARE_MARKERS)], (2 + 1.5 * turn, 1))
