"""The style of every figure: colour, marker and dashes of each attention, marks of failures, and the matplotlib settings."""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ParamSpec

import seaborn as sns
from matplotlib import style
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.path import Path as Shape
from matplotlib.textpath import TextPath

P = ParamSpec("P")


@dataclass(frozen=True)
class Style:
    """The style of one attention in every figure. Marker and dashes distinguish it without colour."""

    colour: str
    marker: str
    dashes: tuple[float, ...] = ()
    width: float = 1.2

    def line(self, discrete: bool = False) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot`; markers without a line if `discrete`."""
        dashes = "none" if discrete else (0, self.dashes) if self.dashes else "solid"
        size = 3.5 + self.width / 2
        return {"color": self.colour, "marker": self.marker, "linestyle": dashes, "linewidth": self.width, "markersize": size}

    @property
    def weight(self) -> str:
        """Font weight of the name: bold for the attention whose line is thicker."""
        return "bold" if self.width > 2 else "normal"


# After Okabe & Ito 2008 and Tol 2021, distinguishable under protanopia and deuteranopia (tests/evals/plots/test_style.py).
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
GLYPH = TextPath((0, 0), "?")
QUESTION = Shape(GLYPH.vertices - GLYPH.get_extents().get_points().mean(axis=0), GLYPH.codes)
UNEQUAL = Shape([(-1, 0.4), (1, 0.4), (-1, -0.4), (1, -0.4), (-0.6, -1), (0.6, 1)], [1, 2] * 3)
FAILURES: dict[str, str | Shape] = {
    "oom": "x",
    "timeout": HOURGLASS,
    "crash": "*",
    "unsupported": "_",
    "uncertified": QUESTION,
    "impossible": UNEQUAL,
    "lost": "1",
}
"""The marker of each outcome that gives no number."""
MARK: dict[str, Any] = {"markersize": 5, "markeredgewidth": 1.1, "markeredgecolor": "auto", "linestyle": "none", "clip_on": False}

GREY = "#555555"
DARK_TO_LIGHT = LinearSegmentedColormap.from_list("dark_to_light", ("#12306a", "#6a86b8", "#b0b0b0", "#e4ca6c", "#fff6c8"))
"""The colour map of heatmaps: blue over grey to yellow, distinct in every colour vision and ascending in grey."""
PARTS = {"parameters": "#26384a", "activations": "#8ba0b4", "state": "#dfe7ee"}
"""Colours of the parts of memory: none is an attention's, and they are as far apart in grey as in colour."""

RC: dict[str, Any] = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper", font_scale=0.83),
    "text.parse_math": False,  # the name of an attention may hold dollar signs
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib's own: figures must not depend on installed fonts
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.titlelocation": "left",
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
    "legend.title_fontsize": 7,
    "savefig.dpi": 200,
    # Ids in an SVG are random without it, and redrawing would change every file.
    "svg.hashsalt": "bsbr",
}


def style_of(attentions: Iterable[str]) -> dict[str, Style]:
    """Chooses a style for each name: fixed for the built-in attentions, by a stable hash for others.

    No two of the names share a style, and no two of up to 8 other names share a colour.
    """
    names = set(attentions)
    chosen = {name: style for name, style in STYLES.items() if name in names}
    for name in sorted(names - chosen.keys()):
        start, attempt = zlib.crc32(name.encode()), 0
        while (style := _spare(start, attempt)) in chosen.values():
            attempt += 1
        chosen[name] = style
    return chosen


def _spare(start: int, attempt: int) -> Style:
    # All colours at the first dashes come before any colour again; marker follows colour, so each pair is fixed.
    lap, step = divmod(attempt, len(SPARE_COLOURS))
    index = (start + step) % len(SPARE_COLOURS)
    return Style(SPARE_COLOURS[index], SPARE_MARKERS[(index + lap) % len(SPARE_MARKERS)], (2 + 1.5 * lap, 1))


def render(draw: Callable[P, Figure | None], *arguments: P.args, **options: P.kwargs) -> Figure | None:
    """Calls a function that draws a figure under the settings of all figures, and fixes its layout.

    Without it, each file format would lay out the same figure differently.
    """
    with style.context(["default", RC]):
        figure = draw(*arguments, **options)
        if figure is not None:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        return figure
