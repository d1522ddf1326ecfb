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

MAX_CONTEXT_FIGURES = {"max_context": max_context_plot}
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
    return _draw("latency", {"latency": results, **(fits or {})}, folder, records)


def draw_max_context(results: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes max_context.{png,svg} from a table of the longest contexts: one figure for each combination of settings.

    Returns the paths written.

    Raises:
        ValueError: if a column is missing, there is no row, a number is invalid, or an attention has two rows.
    """
    return _draw("max_context", {"max_context": results}, folder)


def max_context_groups(results: pd.DataFrame) -> Iterator[tuple[str, tuple[pd.DataFrame]]]:
    """Groups a table of the longest contexts by settings into the data of figures; raises ValueError as `draw_max_context`."""
    groups = list(split_searches(check_table(results, "max_context")))
    for _, rows in groups:
        twice = rows["attention"][rows["attention"].duplicated()]
        if len(twice):
            raise ValueError(f"{twice.iloc[0]} has more than one row: keep the one that counts")
    return zip(suffixes(settings for settings, _ in groups), ((rows,) for _, rows in groups), strict=True)


def checked_accuracy_sweeps(results: pd.DataFrame, curves: pd.DataFrame) -> Iterator[tuple[str, AccuracySweep]]:
    """Groups an accuracy table into the data of figures. Raises ValueError if a column is missing or a number is invalid."""
    results = check_table(results, "accuracy")
    yield from accuracy_sweeps(results, curves, swept_column(results))


def draw_accuracy(results: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes the figures of an accuracy table and its training losses; raises ValueError as `checked_accuracy_sweeps`."""
    return _draw("accuracy", {"accuracy": results, "curves": curves}, folder)


def conversion_tables(results: pd.DataFrame, positions: pd.DataFrame) -> Iterator[tuple[str, tuple[pd.DataFrame, pd.DataFrame]]]:
    """Groups the rows of both tables of a conversion by chunk overlap. Raises ValueError if a column or every row is missing."""
    for overlap, rows in check_table(results, "conversion").groupby("chunk_overlap"):
        yield f"-overlap-{overlap}", (rows, positions[positions["chunk_overlap"] == overlap])


def draw_conversion(results: pd.DataFrame, positions: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes the figures of `python -m evals.distill`'s tables; raises ValueError as `conversion_tables`."""
    return _draw("conversion", {"conversion": results, "positions": positions}, folder)


FIGURE_NAMES: dict[str, Sequence[str]] = {
    "latency": (*FIGURES, *MACHINE_FIGURES, "distribution"),
    "accuracy": tuple(ACCURACY_FIGURES),
    "max_context": tuple(MAX_CONTEXT_FIGURES),
    "conversion": tuple(CONVERSION_FIGURES),
}
"""The names of the figures that tables of each kind may have."""


def figures(kind: str, tables: Mapping[str, pd.DataFrame], records: Iterable[Record] = ()) -> Iterator[Drawing]:
    """Yields every figure of the tables of a result folder: its name, and a function that draws it.

    Args:
        kind: of the folder, and of the table of results.
        tables: by the name of their schema, as `read_tables` reads them.
        records: the records of the ledger, for the distribution of samples.

    Raises:
        ValueError: if a table lacks a required column or row, or holds an invalid value.
    """
    if kind == "max_context":
        return _drawings(MAX_CONTEXT_FIGURES, max_context_groups(tables[kind]))
    if kind == "conversion":
        return _drawings(CONVERSION_FIGURES, conversion_tables(tables[kind], tables["positions"]))
    if kind == "accuracy":
        data_sets = checked_accuracy_sweeps(tables[kind], tables["curves"])
        return _drawings(ACCURACY_FIGURES, ((suffix, (sweep,)) for suffix, sweep in data_sets))
    fits = {name: check_table(tables[name], name) for name in ("scaling", "crossovers") if name in tables}
    return sweep_figures(check_table(tables[kind]), fits, raw_samples(records))


def _draw(kind: str, tables: Mapping[str, pd.DataFrame], folder: Path, records: Iterable[Record] = ()) -> list[Path]:
    return save_all(figures(kind, tables, records), folder, FIGURE_NAMES[kind])


def read_tables(folder: Path, kind: str) -> dict[str, pd.DataFrame]:
    """Reads the tables that the figures of a result folder show, by the name of their schema."""
    results = read_table(folder) if kind == "latency" else schema.read(folder / "results.csv")
    further = {"conversion": "positions", "accuracy": "curves"}.get(kind)
    if further:
        return {kind: results, further: schema.read(folder / f"{further}.csv")}
    return {kind: results, **(read_fits(folder) if kind == "latency" else {})}


def draw_folder(results: Path, plots: Path) -> list[Path]:
    """Writes the figures of a folder of results into the folder `plots`, by the kind of its results.csv.

    Returns the paths written.

    Raises:
        ValueError: if there is no table, or it cannot be drawn; `FiguresNotDrawn` if some of its figures can.
    """
    kind = check_folder(results, "figures")
    records = Ledger(results / "samples.jsonl").read()[0] if kind == "latency" else []
    return _draw(kind, read_tables(results, kind), plots, records)
