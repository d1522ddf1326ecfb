"""Latency against peak memory: who is beaten by nobody in both."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from evals.plots.layout import (
    EDGE,
    LEFT,
    LEGEND,
    NAME,
    WIDTH,
    Numbers,
    headed,
    label,
    log_limits,
    placed,
    subtitle,
    weight,
    wide,
)
from evals.plots.style import FAILURES
from evals.results.formatting import format_bytes, format_seconds
from evals.results.frames import Sweep
from evals.results.metrics import BYTES
from evals.stats.pareto import pareto_front


def front(latency: Numbers, memory: Numbers) -> list[int]:
    """The points that no other beats in one and reaches in the other, by rising latency. NaN is no point."""
    best = pareto_front(np.column_stack([latency, memory]).tolist())
    return sorted((i for i, one in enumerate(best) if one), key=lambda i: (latency[i], memory[i]))


HALO = 0.16  # inches: the radius of the one that stands for the most parameters


def pareto(sweep: Sweep, *, halos: bool = False) -> Figure | None:
    """Latency and peak memory of every attention at the greatest place (or each of three without an order), and their front.

    halos: around each point is a disc whose area is as large as its parameters.
    None where no place has two attentions to choose from, or, with halos, parameters are not known.
    """
    most_parameters = float(sweep.rows["parameter_bytes"].max()) if halos else math.nan
    if halos and not most_parameters > 0:
        return None
    crowded = [
        at
        for at in range(len(sweep.places))
        if sum(bool(rows["latency_s"].iloc[at] > 0 and rows["peak_bytes"].iloc[at] > 0) for rows in sweep.cells.values()) > 1
    ]
    if not crowded:
        return None
    places = [crowded[-1]] if sweep.ordered else crowded[:3]
    plot, gap, foot = 2.9, 0.36, 0.45
    width = (WIDTH - LEFT - 0.2 - gap * (len(places) - 1)) / len(places)
    shown = sweep.rows[sweep.rows[sweep.column].isin([sweep.places[at] for at in places])]
    shown = shown[(shown["latency_s"] > 0) & (shown["peak_bytes"] > 0)]
    # More than the marks need: names stand around them.
    limits_x = log_limits(shown["latency_s"].min() / 1.15, shown["latency_s"].max() * 1.15)
    limits_y = log_limits(shown["peak_bytes"].min() / 1.15, shown["peak_bytes"].max() * 1.15)
    panels = [_Panel(sweep, at, width, plot, limits_x, limits_y, most_parameters) for at in places]
    nameless = [name for name in sweep.cells if any(name in panel.nameless for panel in panels)]

    told = [sweep.at(at) for at in places]
    title = (
        f"Latency{', ' if halos else ' and '}peak memory{' and parameters' if halos else ''}"
        + (f" at {told[0]}" if len(places) == 1 else "")
        + ", lower left is better"
    )
    absent = "; ".join(filter(None, (_absent(sweep, at, told[i] if len(places) > 1 else "") for i, at in enumerate(places))))
    note = f"; area of a disc: parameters, at most {BYTES.format(most_parameters, digits=2)}" if halos else ""
    words = subtitle(sweep, f"line: the front; nobody on it is beaten in both{note}{'; not shown: ' if absent else ''}{absent}")
    columns = max(1, int((WIDTH - LEFT) / 1.3))
    rows = math.ceil(len(nameless) / columns)
    titles = 0.2 if len(places) > 1 else 0.04
    above = titles + 0.17 + LEGEND * rows
    picture = headed(title, words, foot + plot + above)
    if nameless:
        keys = [Line2D([], [], label=label(sweep.looks, name), **sweep.looks[name].line(discrete=True)) for name in nameless]
        anchor = (LEFT / WIDTH, (foot + plot + above - LEGEND * rows) / picture.get_figheight())
        picture.legend(handles=keys, loc="lower left", bbox_to_anchor=anchor, ncols=columns, borderaxespad=0)
    for number, (panel, place) in enumerate(zip(panels, told, strict=True)):
        axes = placed(picture, LEFT + number * (width + gap), foot, width, plot)
        panel.draw(axes)
        if number:
            axes.tick_params(labelleft=False)
        if len(places) > 1:
            axes.set_title(place, size=8, loc="left", pad=4)
    over = (foot + plot + titles + 0.03) / picture.get_figheight()
    picture.text(EDGE / WIDTH, over, "peak memory above inputs and parameters", size=8)
    middle = (LEFT + WIDTH - 0.2) / 2 / WIDTH
    picture.text(middle, 0.06 / picture.get_figheight(), "latency", ha="center", va="bottom", size=8)
    return picture


def _absent(sweep: Sweep, at: int, place: str) -> str:
    """Who has no point here, and why."""
    why = []
    for name, rows in sweep.cells.items():
        cell = rows.iloc[at]
        if cell["outcome"] in FAILURES:
            why.append(f"{name} ({cell['outcome']})")
        elif not (cell["latency_s"] > 0 and cell["peak_bytes"] > 0):
            why.append(f"{name} (not measured)")
    return f"{', '.join(why)}{f' at {place}' if place else ''}" if why else ""


Box = tuple[float, float, float, float]  # left, bottom, right, top in inches


@dataclass(frozen=True)
class Name:
    """A name beside its point: where it begins, on the page of a panel in inches, and whether a line must lead to it."""

    name: str
    box: Box
    point: tuple[float, float]
    led: bool


class _Panel:
    """One place of the sweep: points, their front, and the names that find room."""

    def __init__(
        self,
        sweep: Sweep,
        at: int,
        width: float,
        height: float,
        x: tuple[float, float],
        y: tuple[float, float],
        most_parameters: float,
    ) -> None:
        self.sweep, self.size, self.limits = sweep, (width, height), (x, y)
        self.names = list(sweep.cells)
        cells = [sweep.cells[name].iloc[at] for name in self.names]
        self.latency, self.memory = (np.array([cell[of] for cell in cells], float) for of in ("latency_s", "peak_bytes"))
        self.low, self.high = (np.array([cell[of] for cell in cells], float) for of in ("latency_low_s", "latency_high_s"))
        # Without halos the most is NaN, and so is every radius.
        self.radii = [HALO * math.sqrt(cell["parameter_bytes"] / most_parameters) for cell in cells]
        self.front = front(self.latency, self.memory)
        self.placed = self._place_names()
        shown = [name for i, name in enumerate(self.names) if math.isfinite(self.latency[i] + self.memory[i])]
        self.nameless = [name for name in shown if name not in {name.name for name in self.placed}]

    def _inches(self, latency: float, memory: float) -> tuple[float, float]:
        (left, right), (bottom, top) = self.limits
        x = math.log(latency / left) / math.log(right / left) * self.size[0]
        return x, math.log(memory / bottom) / math.log(top / bottom) * self.size[1]

    def steps(self) -> tuple[list[float], list[float]]:
        """The corners of the front, from the upper edge to the right one."""
        (_, right), (_, top) = self.limits
        x, y = [float(self.latency[self.front[0]])], [top]
        for i in self.front:
            x += [float(self.latency[i])] * 2
            y += [y[-1], float(self.memory[i])]
        return [*x[1:], right], [*y[1:], y[-1]]

    def _place_names(self) -> list[Name]:
        """Each name at the nearest of some places around its point where it covers nothing; without one, it is left out."""
        taken: list[Box] = []
        points = {}
        for i, name in enumerate(self.names):
            if math.isfinite(self.latency[i] + self.memory[i]):
                x, y = points[name] = self._inches(self.latency[i], self.memory[i])
                reach = max(0.05, np.nan_to_num(self.radii[i]))
                taken.append((x - reach, y - reach, x + reach, y + reach))
                if math.isfinite(self.low[i] + self.high[i]):
                    ends = [self._inches(end, self.memory[i])[0] for end in (self.low[i], self.high[i])]
                    taken.append((ends[0] - 0.04, y - 0.01, ends[1] + 0.04, y + 0.01))
        corners = [self._inches(x, y) for x, y in zip(*self.steps(), strict=True)]
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            taken.append((min(x0, x1) - 0.015, min(y0, y1) - 0.015, max(x0, x1) + 0.015, max(y0, y1) + 0.015))
        found = []
        for name, (x, y) in points.items():
            said = wide(label(self.sweep.looks, name), NAME, weight(self.sweep.looks[name]))
            box = next((box for box in _around(x, y, said, 0.12) if self._free(box, taken)), None)
            if box is not None:
                taken.append(box)
                apart = math.hypot(max(box[0] - x, x - box[2], 0), max(box[1] - y, y - box[3], 0))
                found.append(Name(name, box, (x, y), apart > 0.13))
        return found

    def _free(self, box: Box, taken: Iterable[Box]) -> bool:
        inside = box[0] >= 0.03 and box[1] >= 0.03 and box[2] <= self.size[0] and box[3] <= self.size[1]
        return inside and all(box[2] <= o[0] or o[2] <= box[0] or box[3] <= o[1] or o[3] <= box[1] for o in taken)

    def draw(self, axes: Axes) -> None:
        axes.set(xscale="log", xlim=self.limits[0], ylim=self.limits[1])
        axes.set_yscale("log", base=2)
        decades = math.log10(self.limits[0][1] / self.limits[0][0]) * 4 / self.size[0]
        subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=10))
        axes.yaxis.set_major_locator(LogLocator(base=2, numticks=10))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        if self.front:
            x, y = self.steps()
            axes.plot(x, y, color="#9a9a9a", linewidth=1.6, zorder=1.5, gid="front")
            axes.fill_between(x, y, self.limits[1][1], color="#f5f5f5", linewidth=0, zorder=0)
        for i, name in enumerate(self.names):
            look = self.sweep.looks[name]
            axes.hlines(self.memory[i], self.low[i], self.high[i], color=look.colour, linewidth=1.2, alpha=0.6, zorder=2)
            mark = look.line(discrete=True)
            if self.radii[i] > 0:
                disc: dict[str, Any] = {
                    "marker": "o",
                    "markersize": 144 * self.radii[i],
                    "markeredgewidth": 0.6,
                    "markeredgecolor": look.colour,
                }
                axes.plot(
                    self.latency[i], self.memory[i], gid=f"{name} parameters", color=look.colour, alpha=0.25, zorder=1.8, **disc
                )
            axes.plot(
                self.latency[i], self.memory[i], gid=name, label=name, zorder=3, **mark | {"markersize": mark["markersize"] + 1.5}
            )
        for beside in self.placed:
            self._write(axes, beside)

    def _write(self, axes: Axes, name: Name) -> None:
        look = self.sweep.looks[name.name]
        left, bottom, right, top = name.box
        inch: dict[str, Any] = {"transform": axes.transAxes}
        width, height = self.size
        words, middle = label(self.sweep.looks, name.name), (bottom + top) / 2 / height
        axes.text(left / width, middle, words, size=NAME, weight=weight(look), va="center_baseline", **inch)
        if name.led:
            x, y = min(max(name.point[0], left), right), min(max(name.point[1], bottom), top)
            ends = [name.point[0] / width, x / width], [name.point[1] / height, y / height]
            axes.add_line(Line2D(*ends, color=look.colour, linewidth=0.5, alpha=0.6, **inch))


def _around(x: float, y: float, width: float, height: float) -> Iterable[Box]:
    """Places for a text of that size around a point, the nearest first; right of it before left, above before below."""
    for far in (0.1, 0.14, 0.22, 0.32, 0.45, 0.6):
        for across, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            slant = 0.75 if across and up else 1.0
            left = x + across * far * slant - (0.5 - across / 2) * width
            bottom = y + up * far * slant - (0.5 - up / 2) * height
            yield left, bottom, left + width, bottom + height
