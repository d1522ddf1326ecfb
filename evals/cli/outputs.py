"""The outputs of a sweep, all computed from its ledger: tables, figures, an HTML report, a tracker's copy."""

import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from evals import report
from evals.cli.jobs import sweep_ledger
from evals.conversion import tables as conversion_tables
from evals.errors import INCOMPLETE, OK, describe_os_error, one_sentence
from evals.plots import registry
from evals.plots.save import FiguresNotDrawn
from evals.results import accuracy_table, curves_table, latency_table, max_context_table, scaling_table
from evals.results.formatting import wrap
from evals.results.ledger import Record
from evals.results.schema import write_table


def build_tables(records: Sequence[Record]) -> dict[str, pd.DataFrame]:
    """All tables of a sweep, by the name of their schema, the table of results first; empty if there is no result."""
    kind, results = build_results(records)
    return {} if results.empty else {kind: results, **build_further(kind, results, records)}


def build_results(records: Sequence[Record]) -> tuple[str, pd.DataFrame]:
    """The name of the schema of a sweep's table of results, and this table; without a row if there is no result."""
    kinds = {record.get("kind") for record in records}
    if "conversion" in kinds:
        return "conversion", conversion_tables.build(records)["conversion"]
    if "study" in kinds:
        return "accuracy", accuracy_table.build(records)
    if "search" in kinds:
        return "max_context", max_context_table.build(records)
    return "latency", latency_table.build(records)


def build_further(kind: str, results: pd.DataFrame, records: Sequence[Record]) -> dict[str, pd.DataFrame]:
    """The tables beside the table of results: curves, positions, or fits."""
    if kind == "conversion":
        return {name: table for name, table in conversion_tables.build(records).items() if name != kind}
    if kind == "accuracy":
        return {"curves": curves_table.build(records)}
    return scaling_table.build(results, records) if kind == "latency" else {}


class Attempts:
    """Makes outputs independently of each other: what fails costs one output, and is reported."""

    def __init__(self) -> None:
        self.failed = False

    @contextmanager
    def attempt(self, output: str, repeat: str) -> Iterator[None]:
        """Makes one output. If that fails, prints a warning with the reason and the command that makes it again."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  drawing, writing and tracking can raise anything; all was measured already
            self.failed = True
            if not isinstance(error.__cause__ or error, ValueError | OSError):
                traceback.print_exc()
            if isinstance(error, FiguresNotDrawn):
                _print_figures(error.paths)
            reason = describe_os_error(error) if isinstance(error, OSError) else one_sentence(error)
            print(f"warning: {output} could not be made: {reason}; to make it again: {repeat}", file=sys.stderr)


def write_outputs(cfg: DictConfig, job_ids: Collection[str], command: str) -> int:
    """Writes all outputs of the sweep's folder, and prints the results of this command and the names of the files.

    Args:
        cfg: the config that all jobs of the command share.
        job_ids: the jobs of this command.
        command: repeats this command, in one line.

    Returns:
        The exit code: INCOMPLETE if an attention of this command has no number, or an output could not be made.
    """
    ledger = sweep_ledger(cfg)
    records, folder, plots = ledger.intact(), ledger.path.parent, Path(cfg.plots_dir) / cfg.sweep_name
    attempts = Attempts()
    again, reporting = (shlex.join(["python", "-m", f"evals.{name}", str(folder)]) for name in ("tables", "report"))
    drawing = shlex.join(["python", "-m", "evals.figures", str(folder), "--plots", cfg.plots_dir])
    kind, results, further = "", pd.DataFrame(), {}
    with attempts.attempt("the table of results", again):
        kind, results = build_results(records)
    if results.empty:
        return INCOMPLETE if attempts.failed else OK
    new = results[results["study" if kind == "accuracy" else "comparison"].isin(job_ids)] if kind != "max_context" else results
    with attempts.attempt("the table on the screen", again):
        print(RENDERERS[kind](new))
    print()
    with attempts.attempt(f"{folder / 'results.csv'}, or its Parquet file,", again):
        print(f"{write_table(results, folder, kind)}: {len(results)} rows")
    with attempts.attempt(f"fits or curves in {folder}", again):
        further = build_further(kind, results, records)
        for name, table in further.items():
            write_table(table, folder, name)
    if cfg.figures:
        with attempts.attempt(str(folder / "report.html"), reporting):
            print(report.write([folder], folder / "report.html"))
        with attempts.attempt(f"a figure in {plots}", drawing):
            _print_figures(_draw(kind, {kind: results, **further}, records, plots))
    if cfg.tracker and kind != "max_context":
        with attempts.attempt(f"the copy for {cfg.tracker._target_}", command):
            destination = instantiate(cfg.tracker, results, further.get("curves"), sweep=cfg.sweep_name, folder=folder)
            print(f"{destination}: the same results, for {cfg.tracker._target_.rpartition('.')[2]}")
    return OK if _is_complete(kind, new) and not attempts.failed else INCOMPLETE


RENDERERS: dict[str, Callable[[pd.DataFrame], str]] = {
    "latency": latency_table.render,
    "accuracy": accuracy_table.render,
    "max_context": max_context_table.render,
}


def _draw(kind: str, tables: dict[str, pd.DataFrame], records: list[Record], folder: Path) -> list[Path]:
    if kind == "accuracy":
        curves = tables.get("curves", pd.DataFrame(columns=curves_table.COLUMNS))
        return registry.draw_accuracy(tables["accuracy"], curves, folder)
    if kind == "max_context":
        return registry.draw_max_context(tables["max_context"], folder)
    fits: dict[str, pd.DataFrame] = {name: tables[name] for name in ("scaling", "crossovers") if name in tables}
    return registry.draw_sweep(tables["latency"], folder, fits, records)


def _print_figures(paths: Sequence[Path]) -> None:
    if paths:
        formats = " and ".join(sorted({path.suffix[1:].upper() for path in paths}))
        print(wrap(f"{paths[0].parent}/, as {formats}: {', '.join(sorted({path.stem for path in paths}))}"))


def _is_complete(kind: str, results: pd.DataFrame) -> bool:
    """Whether each attention has a number in each job; a training run at any learning rate suffices."""
    if kind == "accuracy":
        trained = results["best"] & (results["outcome"] == "ok")
        return bool(trained.groupby([results["study"], results["attention"]]).any().all())
    return bool((results["outcome"] == "ok").all())
