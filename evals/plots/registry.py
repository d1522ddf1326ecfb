"""The registry of figures: which figures each kind of results table has, and how a folder of results is drawn."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from evals.plots import accuracy, conversion
from evals.plots.accuracy import AccuracySweep, accuracy_sweeps
from evals.plots.distribution import distribution, raw_samples
from evals.plots.heatmap import speedup_heatmap
from evals.plots.lines import LINE_METRICS, line_plot, scaling_plot
from evals.plots.machines import MACHINE_METRICS, machine_panels, machine_sweeps
from evals.plots.max_context import max_context_plot
from evals.plots.memory import memory_split
from evals.plots.needle import needle_depth
from evals.plots.pareto import pareto
from evals.plots.save import Drawing, save_all
from evals.plots.style import render
from evals.results import schema
from evals.results.folder_kinds import check_folder
from evals.results.frames import Sweep, check_table, read_fits, read_table, suffixes, sweeps, swept_column
from evals.results.ledger import Ledger, Record
from evals.results.max_context_table import split_searches

FIGURES: dict[str, Callable[[Sweep], Figure | None]] = {
    **{metric.name: partial(line_plot, metric=metric) for metric in LINE_METRICS},
    "speedup_heatmap": speedup_heatmap,
    "memory_split": memory_split,
    "scaling": partial(scaling_plot, quantity="latency"),
    "scaling_memory": partial(scaling_plot, quantity="memory"),
    "pareto": pareto,
}
"""The figures of a table of timings, without `distribution`, which needs raw samples; a figure without data is None."""

MACHINE_FIGURES: dict[str, Callable[[Sequence[Sweep]], Figure | None]] = {
    f"machines_{metric.name}": partial(machine_panels, metric=metric) for metric in MACHINE_METRICS
}
"""The figures of merged results, with a panel for each machine."""

ACCURACY_FIGURES: dict[str, Callable[[AccuracySweep], Figure | None]] = {
    "accuracy": accuracy.accuracy,
    "by_length": accuracy.accuracy_by_length,
    "recall_front": accuracy.recall_front,
    "bits_by_position": accuracy.bits_by_position,
    "loss": accuracy.loss,
    "needle_depth": needle_depth,
}
"""The figures of an accuracy table; a figure without data is None."""

CONVERSION_FIGURES = {"perplexity": conversion.perplexity, "agreement": conversion.agreement}


def _drawings(
    figures: Mapping[str, Callable[..., Figure | None]], data_sets: Iterable[tuple[str, tuple[object, ...]]]
) -> Iterator[Drawing]:
    """Yields, for every figure of every data set, its name with the suffix of the data set, and a function that draws it."""
    for suffix, data in data_sets:
        for name, draw in figures.items():
            yield f"{name}{suffix}", partial(render, draw, *data)


def sweep_figures(
    results: pd.DataFrame, fits: Mapping[str, pd.DataFrame], samples: pd.DataFrame | None = None
) -> Iterator[Drawing]:
    """Yields every figure of a checked table of timings: its name (latency, latency-decode), and a function that draws it."""
    figures: dict[str, Callable[[Sweep], Figure | None]] = {**FIGURES, "distribution": partial(distribution, samples=samples)}
    yield from _drawings(figures, ((suffix, (sweep,)) for suffix, sweep in sweeps(results, fits)))
    yield from _drawings(MACHINE_FIGURES, ((suffix, (members,)) for suffix, members in machine_sweeps(results)))


def draw_sweep(
    results: pd.DataFrame,
    folder: Path,
    fits: Mapping[str, pd.DataFrame] | None = None,
    records: Iterable[Record] = (),
) -> list[Path]:
    """Writes the figures of a table of timings as PNG and SVG, and deletes earlier ones.

    Rows that differ in another setting than the swept one get separate figures, named after it (latency-decode.svg).
    Figures whose table or column is missing are left out.

    Args:
        results: a latency table.
        folder: made if it does not exist.
        fits: the tables scaling and crossovers, if there are any.
        records: the records of the ledger, for the distribution of samples.

    Returns:
        The paths written.

    Raises:
        ValueError: if a table lacks a required column or holds an invalid value, or an attention has two rows at one setting.
    """
    fits = {kind: check_table(fit, kind) for kind, fit in (fits or {}).items()}
    figures = sweep_figures(check_table(results), fits, raw_samples(records))
    return save_all(figures, folder, [*FIGURES, *MACHINE_FIGURES, "distribution"])


def draw_max_context(results: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes max_context.{png,svg} from a table of the longest contexts: one figure for each combination of settings.

    Returns the paths written.

    Raises:
        ValueError: if a column is missing, there is no row, a number is invalid, or an attention has two rows.
    """
    results = check_table(results, "max_context")
    groups = list(split_searches(results))
    for _, rows in groups:
        twice = rows["attention"][rows["attention"].duplicated()]
        if len(twice):
            raise ValueError(f"{twice.iloc[0]} has more than one row: keep the one that counts")
    data_sets = zip(suffixes(settings for settings, _ in groups), ((rows,) for _, rows in groups), strict=True)
    figures = {"max_context": max_context_plot}
    return save_all(_drawings(figures, data_sets), folder, figures)


def checked_accuracy_sweeps(results: pd.DataFrame, curves: pd.DataFrame) -> Iterator[tuple[str, AccuracySweep]]:
    """Groups an accuracy table into the data of figures. Raises ValueError if a column is missing or a number is invalid."""
    results = check_table(results, "accuracy")
    yield from accuracy_sweeps(results, curves, swept_column(results))


def draw_accuracy(results: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes the figures of an accuracy table and its training losses; raises ValueError as `checked_accuracy_sweeps`."""
    data_sets = ((suffix, (sweep,)) for suffix, sweep in checked_accuracy_sweeps(results, curves))
    return save_all(_drawings(ACCURACY_FIGURES, data_sets), folder, ACCURACY_FIGURES)


def conversion_tables(results: pd.DataFrame, positions: pd.DataFrame) -> Iterator[tuple[str, tuple[pd.DataFrame, pd.DataFrame]]]:
    """Groups the rows of both tables of a conversion by chunk overlap. Raises ValueError if a column or every row is missing."""
    for overlap, rows in check_table(results, "conversion").groupby("chunk_overlap"):
        yield f"-overlap-{overlap}", (rows, positions[positions["chunk_overlap"] == overlap])


def draw_conversion(results: pd.DataFrame, positions: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes the figures of `python -m evals.distill`'s tables; raises ValueError as `conversion_tables`."""
    return save_all(_drawings(CONVERSION_FIGURES, conversion_tables(results, positions)), folder, CONVERSION_FIGURES)


def draw_folder(results: Path, plots: Path) -> list[Path]:
    """Writes the figures of a folder of results into the folder `plots`, by the kind of its results.csv.

    Returns the paths written.

    Raises:
        ValueError: if there is no table, or it cannot be drawn; `FiguresNotDrawn` if some of its figures can.
    """
    path, kind = results / "results.csv", check_folder(results, "figures")
    if kind == "max_context":
        return draw_max_context(schema.read(path), plots)
    if kind == "conversion":
        return draw_conversion(schema.read(path), schema.read(results / "positions.csv"), plots)
    if kind == "accuracy":
        return draw_accuracy(schema.read(path), schema.read(results / "curves.csv"), plots)
    return draw_sweep(read_table(results), plots, read_fits(results), Ledger(results / "samples.jsonl").read()[0])
