"""TODO: what lives here."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib import style
from matplotlib.figure import Figure

from evals.plots import accuracy, conversion
from evals.plots.heatmap import speedup_heatmap
from evals.plots.lines import QUANTITIES, line_plot, scaling_plot
from evals.plots.max_context import max_context_plot
from evals.plots.memory import memory_split
from evals.plots.needle import needle_depth
from evals.plots.pareto import pareto
from evals.plots.save import _save
from evals.plots.style import RC, style_of
from evals.results import schema
from evals.results.formatting import format_setting
from evals.results.frames import (
    Sweep,
    check_table,
    read_fits,
    read_table,
    sweeps,
    swept_column,
)
from evals.results.settings import SETTINGS

FIGURES: dict[str, Callable[[Sweep], Figure | None]] = {
    **{quantity.name: partial(line_plot, quantity=quantity) for quantity in QUANTITIES},
    "speedup_heatmap": speedup_heatmap,
    "memory_split": memory_split,
    "scaling": partial(scaling_plot, which="latency"),
    "scaling_memory": partial(scaling_plot, which="memory"),
    "pareto": pareto,
}
"""All figures. One that has nothing to show is None, and is left out."""

ACCURACY_FIGURES = {**accuracy.FIGURES, "needle_depth": needle_depth}
"""All figures of what was learned."""


# --- drawing --------------------------------------------------------------------------------------


def sweep_figures(results: pd.DataFrame, fits: dict[str, pd.DataFrame]) -> Iterator[tuple[str, Figure]]:
    """Every figure that the tables have something to show in, with its name (latency, or latency-decode)."""
    for suffix, sweep in sweeps(results, fits):
        for name, make in FIGURES.items():
            with style.context(["default", RC]):
                picture = make(sweep)
            if picture is not None:
                yield f"{name}{suffix}", picture


def draw_sweep(
    results: pd.DataFrame, folder: Path, *, scaling: pd.DataFrame | None = None, crossovers: pd.DataFrame | None = None
) -> list[Path]:
    """Writes every figure of FIGURES as png and svg into folder, in place of those drawn there; returns the paths.

    Rows that differ in another setting than the swept one go to figures of their own, named after it
    (latency-decode.svg). Figures that need a table or a column which is not there are left out. Raises
    ValueError as `check_table`, and if one attention has two rows at one place.
    """
    results = check_table(results)
    given = {"scaling": scaling, "crossovers": crossovers}
    fits = {name: check_table(table, name) for name, table in given.items() if table is not None}
    return _save(sweep_figures(results, fits), folder, FIGURES)


def draw_max_context(results: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes max_context.{png,svg} into folder from a table of `max_context_table.build`; returns the paths.

    Rows that differ in a setting go to figures of their own, as those of `draw`. Raises ValueError if a column is missing,
    there is no row, a number is none, or one attention has two rows.
    """
    results = check_table(results, "max_context")
    chosen = style_of(results["attention"].astype(str))
    apart = [name for name in (*SETTINGS, "limit_bytes") if name in results and results[name].nunique(dropna=False) > 1]
    groups = results.groupby(apart, dropna=False, sort=True) if apart else [((), results)]
    named = []
    for values, rows in groups:
        twice = rows["attention"][rows["attention"].duplicated()]
        if len(twice):
            raise ValueError(f"{twice.iloc[0]} has more than one row: keep the one that counts")
        with style.context(["default", RC]):
            named.append((f"max_context{''.join(f'-{format_setting(value)}' for value in values)}", max_context_plot(rows, chosen)))
    return _save(named, folder, ["max_context"])


def accuracy_figures_data(results: pd.DataFrame, curves: pd.DataFrame) -> Iterator[tuple[str, accuracy.AccuracySweep]]:
    """The rows that belong in one figure of what was learned, and what tells them from the others ("" if nothing does).

    Raises ValueError if a column is missing or a number is none.
    """
    results = check_table(results, "accuracy")
    yield from accuracy.accuracy_sweeps(results, curves, swept_column(results), style_of(results["attention"].astype(str)))


def draw_accuracy(results: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes every figure of `learning` into folder from the tables of `scores`; returns the paths.

    Rows that differ in another setting than the swept one go to figures of their own. Raises ValueError as `learned`.
    """
    named = []
    for suffix, rows in accuracy_figures_data(results, curves):
        for name, make in ACCURACY_FIGURES.items():
            with style.context(["default", RC]):
                picture = make(rows)
            if picture is not None:
                named.append((f"{name}{suffix}", picture))
    return _save(named, folder, ACCURACY_FIGURES)


def conversion_tables(results: pd.DataFrame, positions: pd.DataFrame) -> Iterator[tuple[str, tuple[pd.DataFrame, pd.DataFrame]]]:
    """The rows of both tables that belong in one figure of conversions, and what tells them from the others.

    Raises ValueError if a column or every row is missing.
    """
    results = check_table(results, "conversion")
    for overlap, rows in results.groupby("chunk_overlap"):
        yield f"-overlap-{overlap}", (rows, positions[positions["chunk_overlap"] == overlap])


def draw_conversion(results: pd.DataFrame, positions: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes every figure of `conversion` into folder from the tables of `python -m evals.distill`; returns the paths.

    Raises ValueError as `conversions`.
    """
    named = []
    for suffix, tables in conversion_tables(results, positions):
        for name, make in conversion.FIGURES.items():
            with style.context(["default", RC]):
                named.append((f"{name}{suffix}", make(*tables)))
    return _save(named, folder, conversion.FIGURES)


def draw_folder(results: Path, plots: Path) -> list[Path]:
    """`draw` from the tables in a folder of results: results.csv, and scaling.csv and crossovers.csv where they are.

    `draw_contexts` where results.csv is of a search for the longest context, `draw_learned` where it is of training,
    `draw_conversions` where it is of conversions.
    """
    path = results / "results.csv"
    kind = schema.kind_of(path) if path.is_file() else ""
    if kind == "max_context":
        return draw_max_context(schema.read(path), plots)
    if kind == "conversion":
        return draw_conversion(schema.read(path), schema.read(results / "positions.csv"), plots)
    if kind == "accuracy":
        return draw_accuracy(schema.read(path), schema.read(results / "curves.csv"), plots)
    return draw_sweep(read_table(results), plots, **read_fits(results))
