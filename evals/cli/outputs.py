"""The outputs of a sweep, all computed from its ledger: tables, figures, an HTML report, a tracker's copy."""

from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from evals import report
from evals.cli.jobs import sweep_ledger
from evals.conversion import tables as conversion_tables
from evals.errors import INCOMPLETE, OK
from evals.plots import registry
from evals.results import accuracy_table, curves_table, latency_table, max_context_table, scaling_table
from evals.results.formatting import wrap
from evals.results.ledger import Record
from evals.results.schema import write_table


def build_tables(records: Sequence[Record]) -> dict[str, pd.DataFrame]:
    """All tables of a sweep, by the name of their schema, the table of results first; empty if there is no result."""
    kinds = {record.get("kind") for record in records}
    if "conversion" in kinds:
        return conversion_tables.build(records)
    if "study" in kinds:
        results = accuracy_table.build(records)
        return {} if results.empty else {"accuracy": results, "curves": curves_table.build(records)}
    if "search" in kinds:
        return {"max_context": max_context_table.build(records)}
    results = latency_table.build(records)
    return {} if results.empty else {"latency": results, **scaling_table.build(results, records)}


def write_outputs(cfg: DictConfig, job_ids: Collection[str]) -> int:
    """Writes all outputs of the sweep's folder, and prints the results of this command and the names of the files.

    Returns:
        The exit code: INCOMPLETE if an attention of this command has no number.
    """
    ledger = sweep_ledger(cfg)
    records = ledger.intact()
    tables = build_tables(records)
    if not tables:
        return OK
    kind, results = next(iter(tables.items()))
    new = results
    if kind == "accuracy":
        new = results[results["study"].isin(job_ids)]
        print(accuracy_table.render(new))
    elif kind == "max_context":
        print(max_context_table.render(results))
    else:
        new = results[results["comparison"].isin(job_ids)]
        print(latency_table.render(new))
    folder = ledger.path.parent
    paths = [write_table(table, folder, name) for name, table in tables.items()]
    print(f"\n{paths[0]}: {len(results)} rows")
    print(report.write([folder], folder / "report.html"))
    _print_figures(_draw(kind, tables, records, Path(cfg.plots_dir) / str(cfg.sweep_name)))
    if cfg.tracker and kind != "max_context":
        destination = instantiate(cfg.tracker, results, tables.get("curves"), sweep=str(cfg.sweep_name), folder=folder)
        print(f"{destination}: the same results, for {cfg.tracker._target_.rpartition('.')[2]}")
    return OK if _is_complete(kind, new) else INCOMPLETE


def _draw(kind: str, tables: dict[str, pd.DataFrame], records: list[Record], folder: Path) -> list[Path]:
    if kind == "accuracy":
        return registry.draw_accuracy(tables["accuracy"], tables["curves"], folder)
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
