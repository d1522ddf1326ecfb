"""`python -m evals.figures results/<sweep> …`: results.csv -> plots/<sweep>/, without measuring anything.

One figure a quantity, PNG and SVG: the swept setting along x, one line an attention, intervals as bands;
a cell that gave no number is a mark in its attention's row above the plot. The same table gives the same
bytes wherever the same matplotlib runs: its own fonts, and no setting of the user's.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from evals.looks import FAILURES, GREY, MARK, RC, Look, looks
from evals.statistics import CONFIDENCE

Numbers = NDArray[np.float64]

LEFT, RIGHT = 0.092, 0.8  # edges of the plot, of the figure's width; right of it stand the names

# --- units: SI in the table, human on the axes -----------------------------------------------------


def scaled(value: float, step: float, units: Sequence[str]) -> str:
    """The value in the largest unit that leaves at least 1 of it; each unit is `step` of the one before."""
    power = 0
    # A tick computed as 10 ** x can miss its decade by a rounding.
    while value >= step * (1 - 1e-9) and power < len(units) - 1:
        value, power = value / step, power + 1
    return f"{value:.4g} {units[power]}".rstrip()


def plain(value: object) -> str:
    """A setting as people write it: 8192 -> 8k, 1000 -> 1000. k is 1024 here, as sequence lengths are spoken of."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        return str(value)
    value = float(value)
    if value >= 1024 and value % 512 == 0:
        return f"{value / 1024:g}k" if value < 1024**2 else f"{value / 1024**2:g}M"
    return f"{value:g}" if value % 1 else f"{value:.0f}"


@dataclass(frozen=True)
class Quantity:
    """One figure: `column` over the swept setting, between `low` and `high` where it has an interval.

    `base` is the ratio that one step of the ticks should mean: doublings for memory and speed-ups.
    """

    name: str
    title: str
    column: str
    low: str | None = None
    high: str | None = None
    tick: Callable[[float], str] = str
    base: int = 10


SECONDS, BYTES = ("ns", "µs", "ms", "s"), ("B", "KiB", "MiB", "GiB", "TiB")
DECIMAL = ("", "k", "M", "G")
QUANTITIES = (
    Quantity(
        *("latency", "Latency, lower is better"),
        *("latency_s", "latency_low_s", "latency_high_s"),
        tick=lambda value: scaled(value * 1e9, 1000, SECONDS),
    ),
    Quantity(
        *("throughput", "Throughput in tokens/s (k = 1000), higher is better"),
        *("tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"),
        tick=lambda value: scaled(value, 1000, DECIMAL),
    ),
    Quantity(
        *("peak_memory", "Peak memory above inputs and parameters, lower is better", "peak_bytes"),
        tick=lambda value: scaled(value, 1024, BYTES),
        base=2,
    ),
    Quantity(
        *("speedup", "Speed-up over {reference}, higher is better"),
        *("speedup", "speedup_low", "speedup_high"),
        tick=lambda value: f"{value:g}×",
        base=2,
    ),
)

SETTINGS = {
    "workload": "{}",
    "scope": "one {}",
    "num_layers": "{} layers",
    "batch_size": "batch {}",
    "seq_len": "{} tokens",
    "hidden_dim": "hidden {}",
    "num_heads": "{} heads",
    "dtype": "{}",
    "device": "{}",
    "threads": "{} threads",
    "processor": "{}",
    "torch": "torch {}",
}
"""What else a comparison was measured under, and how a subtitle says it."""

AXIS_NAMES = {
    "seq_len": "sequence length in tokens (1k = 1024)",
    "batch_size": "batch size",
    "hidden_dim": "hidden size",
    "num_heads": "heads",
}

NUMBERS = (
    *("latency_s", "latency_low_s", "latency_high_s", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"),
    *("speedup", "speedup_low", "speedup_high", "peak_bytes", "samples", "rounds"),
)
COLUMNS = ("swept", "attention", "outcome", "relative_to", *SETTINGS, *NUMBERS)
OUTCOMES = ("ok", *FAILURES)
KINDS = ("png", "svg")

# --- the table ------------------------------------------------------------------------------------


def read(folder: Path) -> pd.DataFrame:
    """The table in folder/results.csv. Raises ValueError, in one sentence, if there is none or it is no such table."""
    path = folder / "results.csv"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a folder that `python -m evals.run` wrote, such as results/seq_len")
    try:
        return checked(pd.read_csv(path))
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} is empty: run `python -m evals.run` again") from None
    except (ValueError, OSError) as error:  # pandas' parser and decoder errors are ValueErrors
        raise ValueError(f"{path} is no table of results: {' '.join(str(error).split())}") from error


def checked(results: pd.DataFrame) -> pd.DataFrame:
    """The table as the figures need it: only `ok` rows carry numbers.

    Raises ValueError if a column is missing, there is no row, an outcome is unknown, a number is none, or
    an `ok` row has no latency.
    """
    missing = [column for column in COLUMNS if column not in results.columns]
    if missing:
        raise ValueError(f"column {', '.join(missing)} missing, found {', '.join(map(str, results.columns))}")
    if results.empty:
        raise ValueError("there is no row to draw")
    results = results.reset_index(drop=True)
    unknown = sorted({str(outcome) for outcome in results["outcome"]} - {*OUTCOMES})
    if unknown:
        raise ValueError(f"outcome must be one of {', '.join(OUTCOMES)}, got {', '.join(unknown)}")
    ok = results["outcome"] == "ok"
    for column in NUMBERS:
        numbers = pd.to_numeric(results[column], errors="coerce")
        words = results[column][numbers.isna() & results[column].notna()]
        if len(words):
            raise ValueError(f"{column} must hold numbers, got {words.iloc[0]!r}")
        results[column] = numbers.astype(float).where(ok)
    unmeasured = results[ok & ~results["latency_s"].between(0, math.inf, inclusive="neither")]
    if len(unmeasured):
        row = unmeasured.iloc[0]
        raise ValueError(f"an ok row needs a finite latency_s above 0, got {row['latency_s']} for {row['attention']}")
    return results


def swept_column(results: pd.DataFrame) -> str:
    """The column of the swept config key (`shape.seq_len` -> seq_len); where none is named, the setting that varies most."""
    keys = results["swept"].dropna().unique()
    if len(keys) > 1:
        raise ValueError(f"one table holds one sweep, got swept = {', '.join(map(str, keys))}")
    if not len(keys):
        return max(("seq_len", *SETTINGS), key=lambda column: results[column].nunique())  # seq_len where nothing does
    column = str(keys[0]).rsplit(".", 1)[-1]
    if column not in results.columns:
        raise ValueError(f"the swept key {keys[0]!r} needs a column {column!r}, found {', '.join(map(str, results.columns))}")
    return column


def comparable(results: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows that belong in one figure, with what tells them from the others ("" if nothing does)."""
    fixed = [column for column in SETTINGS if column != swept_column(results) and results[column].nunique(dropna=False) > 1]
    if not fixed:
        yield "", results
        return
    for values, rows in results.groupby(fixed, dropna=False, sort=True):
        yield "".join(f"-{plain(value)}" for value in values), rows


# --- drawing --------------------------------------------------------------------------------------


def draw(results: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes {latency,throughput,peak_memory,speedup}.{png,svg} into folder, in place of what was drawn there; returns the paths.

    Rows that differ in another setting than the swept one go to figures of their own, named after it
    (latency-decode.svg). Raises ValueError as `checked`, and if one attention has two rows at one place.
    """
    results = checked(results)
    folder.mkdir(parents=True, exist_ok=True)
    stale = {path for quantity in QUANTITIES for kind in KINDS for path in folder.glob(f"{quantity.name}*.{kind}")}
    paths = []
    for suffix, rows in comparable(results):
        for quantity in QUANTITIES:
            picture = figure(rows, quantity)
            for kind in KINDS:
                paths.append(folder / f"{quantity.name}{suffix}.{kind}")
                with style.context(["default", RC]):
                    # No date: unchanged data must give unchanged bytes.
                    picture.savefig(paths[-1], metadata={"Date": None} if kind == "svg" else None)
    for path in stale - {*paths}:
        path.unlink()
    return paths


def figure(results: pd.DataFrame, quantity: Quantity) -> Figure:
    """One quantity over the swept setting, at the full width of a paper (7 in), from a table that `checked` returned."""
    column = swept_column(results)
    twice = results[results.duplicated(["attention", column])]
    if len(twice):
        row = twice.iloc[0]
        raise ValueError(f"{row['attention']} has more than one row at {column} = {row[column]}: keep the one that counts")
    values = results[column]
    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    places = sorted(values.unique()) if numeric else list(values.unique())
    # One place, or places without an order between them, make no line: points side by side instead.
    discrete = not numeric or len(places) == 1
    x = np.arange(len(places), dtype=float) if discrete else np.asarray(places, dtype=float)
    cells = {str(name): rows.set_index(column).reindex(places) for name, rows in results.groupby("attention", sort=False)}
    failed = {name: rows["outcome"] for name, rows in cells.items() if rows["outcome"].isin(FAILURES).any()}
    chosen = looks(cells)

    with style.context(["default", RC]):
        words = subtitle(results, column, quantity)
        picture, axes, lanes = _frame(words.count("\n") + 1, len(failed))
        for index, (name, rows) in enumerate(cells.items()):
            aside = 0.7 * ((index + 0.5) / len(cells) - 0.5) if discrete else 0.0
            _plot(axes, x + aside, rows, quantity, name, chosen[name], discrete)
        _scale_x(axes, x, [plain(place) for place in places], discrete)
        axes.set_xlabel(AXIS_NAMES.get(column, column.replace("_", " ")))
        if results[quantity.column].gt(0).any():
            _scale_y(axes, results, quantity)
            _name_ends(axes, chosen, discrete)
        else:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "no cell gave a number", transform=axes.transAxes, ha="center", color=GREY)
        if lanes is not None:
            _mark_failures(lanes, x, failed, chosen)
        reference = ", ".join(sorted(set(results["relative_to"].dropna().astype(str)))) or "the reference"
        height = picture.get_figheight()
        title = quantity.title.format(reference=reference)
        picture.text(LEFT, 1 - 0.08 / height, title, size=9.5, weight="bold", va="top")
        picture.text(LEFT, 1 - 0.29 / height, words, size=7, color=GREY, va="top")
    return picture


def _frame(lines: int, failed: int) -> tuple[Figure, Axes, Axes | None]:
    """An empty plot of one size, and above it one lane for each attention with failed cells: marks that cover no data."""
    head, lane, plot, foot = 0.38 + 0.12 * lines + (0.2 if failed else 0), 0.15 * failed, 2.9, 0.45
    gap = 0.07 if failed else 0.0
    height = head + lane + gap + plot + foot
    picture = Figure(figsize=(7, height))
    axes = picture.add_axes((LEFT, foot / height, RIGHT - LEFT, plot / height))
    if not failed:
        return picture, axes, None
    return picture, axes, picture.add_axes((LEFT, (foot + plot + gap) / height, RIGHT - LEFT, lane / height), sharex=axes)


def _plot(axes: Axes, x: Numbers, rows: pd.DataFrame, quantity: Quantity, name: str, look: Look, discrete: bool) -> None:
    """One attention, with a gap wherever there is no number."""
    y = rows[quantity.column].to_numpy(float)
    axes.plot(x, y, label=name, gid=name, zorder=2 + look.width, **look.line(discrete))
    if quantity.low is None or quantity.high is None:
        return
    low, high = rows[quantity.low].to_numpy(float), rows[quantity.high].to_numpy(float)
    known = np.isfinite(y) & np.isfinite(low) & np.isfinite(high)
    # A band needs two neighbours; a point that stands alone gets a bar.
    beside = (np.append(known[1:], False) | np.append(False, known[:-1])) & (not discrete)
    axes.fill_between(x, low, high, where=(known & beside).tolist(), color=look.colour, alpha=0.16, linewidth=0)
    bars = known & ~beside
    axes.vlines(x[bars], low[bars], high[bars], color=look.colour, linewidth=1.2, zorder=2)


def _scale_x(axes: Axes, x: Numbers, names: list[str], discrete: bool) -> None:
    every = math.ceil(len(x) / 12)
    if discrete:
        axes.set_xlim(x[0] - 0.5, x[-1] + 0.5)
        axes.grid(False, axis="x")
        every = 1
    elif x[0] > 0:
        axes.set_xscale("log", base=2)
        margin = (x[-1] / x[0]) ** 0.03
        axes.set_xlim(x[0] / margin, x[-1] * margin)
    axes.set_xticks(x[::every], names[::every])
    axes.xaxis.set_minor_locator(NullLocator())


def _scale_y(axes: Axes, results: pd.DataFrame, quantity: Quantity) -> None:
    y = results[quantity.column][results[quantity.column] > 0]
    least, most = y.min(), y.max()
    if quantity.low and quantity.high:
        # An interval may be so wide that it would flatten every line: beyond a factor of 3 it leaves the plot.
        least = max(results[quantity.low].min(), least / 3) if results[quantity.low].notna().any() else least
        most = min(results[quantity.high].max(), most * 3) if results[quantity.high].notna().any() else most
    # A span under 4 would magnify noise into a landscape.
    span = max(1.06 * most / least, 4.0)
    middle = math.sqrt(least * most)
    margin = span**0.54
    decades = math.log10(span)
    steps = (1.0, 2.0, 5.0) if quantity.base == 10 and decades < 2.5 else (1.0,)
    axes.set_yscale("log", base=quantity.base)
    axes.set_ylim(middle / margin, middle * margin)
    axes.yaxis.set_major_locator(LogLocator(base=quantity.base, subs=steps, numticks=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity.tick(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    if quantity.name == "speedup":
        axes.axhline(1.0, color=GREY, linewidth=0.8, zorder=1, gid="parity")


def _name_ends(axes: Axes, chosen: dict[str, Look], discrete: bool) -> None:
    """Writes each name beside the end of its line, in the order of the ends, with a key that reads without colour."""
    ends = []
    for line in axes.lines:
        points = np.column_stack([np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)])
        points = points[points[:, 1] > 0]
        if line.get_label() in chosen and len(points):
            # From data to fractions of the axes.
            at_x, at_y = (axes.transScale + axes.transLimits).transform(points[-1])
            ends.append((float(at_y), float(at_x), str(line.get_label())))
    ends.sort()
    last_x = max(at_x for _, at_x, _ in ends)
    in_axes: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    for height, (at_y, at_x, name) in zip(spread([end[0] for end in ends], 0.052), ends, strict=True):
        look = chosen[name]
        if at_x == last_x and not discrete:
            axes.add_line(Line2D([at_x, 1.02], [at_y, height], color=look.colour, linewidth=0.5, alpha=0.6, **in_axes))
        axes.add_line(Line2D([1.02, 1.045, 1.07], [height] * 3, markevery=[1], **look.line(discrete), **in_axes))
        weight = "bold" if look.width > 2 else "normal"
        axes.text(1.082, height, name, va="center_baseline", size=7.5, weight=weight, transform=axes.transAxes)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """The heights nearest to `wanted` (ascending, in 0 … 1) that keep `gap` between neighbours.

    Least squares under order: isotonic regression of wanted_i − i·gap, by its min-max formula.
    """
    n = len(wanted)
    level = [height - index * gap for index, height in enumerate(wanted)]
    fitted = [max(min(float(np.mean(level[j : k + 1])) for k in range(i, n)) for j in range(i + 1)) for i in range(n)]
    return [min(max(height, 0.02), max(0.98 - (n - 1) * gap, 0.02)) + index * gap for index, height in enumerate(fitted)]


def _mark_failures(lanes: Axes, x: Numbers, failed: dict[str, pd.Series], chosen: dict[str, Look]) -> None:
    """One lane an attention, one mark a failed cell, and what the marks mean."""
    lanes.set_facecolor("#f5f5f5")
    lanes.grid(False)
    lanes.spines[:].set_visible(False)
    lanes.tick_params(length=0, labelbottom=False, labelleft=False)
    lanes.set_ylim(len(failed) - 0.5, -0.5)
    legend: dict[str, Line2D] = {}
    for outcome, mark in FAILURES.items():
        for lane, (name, outcomes) in enumerate(failed.items()):
            at = x[(outcomes == outcome).to_numpy()]
            if len(at):
                lanes.plot(at, np.full(len(at), lane), marker=mark, color=chosen[name].colour, gid=f"{name} {outcome}", **MARK)
                legend[outcome] = Line2D([], [], marker=mark, color="black", label=outcome, **MARK)
    for lane, name in enumerate(failed):
        lanes.text(1.082, lane, name, va="center_baseline", size=7.5, transform=lanes.get_yaxis_transform())
    lanes.text(1.02, -1.2, "failed", va="center_baseline", size=7, color=GREY, transform=lanes.get_yaxis_transform())
    lanes.legend(handles=list(legend.values()), loc="lower left", bbox_to_anchor=(0, 1), ncols=len(legend))


def subtitle(results: pd.DataFrame, column: str, quantity: Quantity) -> str:
    """What the comparison was, in words: every setting but the swept one, and where the numbers come from."""
    fixed = [(words, results[name].iloc[0]) for name, words in SETTINGS.items() if name != column]
    settings = ", ".join(words.format(plain(value)) for words, value in fixed if not pd.isna(value))
    if quantity.low is None or results["samples"].isna().all():
        return settings
    samples, rounds = (_range(results[name].dropna()) for name in ("samples", "rounds"))
    rounds += " round" if rounds == "1" else " rounds"
    return f"{settings}\nmedian of {samples} samples in {rounds}, with its {CONFIDENCE:.0%} interval"


def _range(numbers: pd.Series) -> str:
    low, high = plain(numbers.min()), plain(numbers.max())
    return low if low == high else f"{low} to {high}"


# --- the command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Redraws each folder given; returns 2, with one sentence on stderr, where it cannot."""
    parser = argparse.ArgumentParser(prog="python -m evals.figures", description="Redraws plots from results, without measuring.")
    parser.add_argument("results", nargs="+", type=Path, help="folders that hold a results.csv, such as results/seq_len")
    parser.add_argument("--plots", type=Path, default=Path("plots"), help="folder for the folders of plots (default: plots)")
    options = parser.parse_args(arguments)
    for folder in options.results:
        try:
            paths = draw(read(folder), options.plots / folder.resolve().name)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{folder}: {len(paths)} files in {paths[0].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
