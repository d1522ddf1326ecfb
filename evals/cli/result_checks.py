"""The checks that results must pass before they are committed: `python -m evals.tables --check`.

They find a table that does not follow from its samples, a row that should not have been published, and what nobody could repeat.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from jsonschema import Draft202012Validator

from evals.cli.outputs import build_tables
from evals.errors import one_sentence
from evals.paper.draw import STUDY
from evals.paper.recipe import step_of
from evals.results import schema
from evals.results.csv_rows import Cell, read_rows
from evals.results.ledger import Ledger, Record
from evals.results.metrics import METRICS
from evals.stats.roofline import TOLERANCE
from evals.stats.verdicts import SAME

ROUNDING = 1e-6
"""Relative difference of two numbers that count as the same: other versions of numpy and scipy round differently."""

Row = dict[str, Cell]


@dataclass(frozen=True)
class Finding:
    """What is wrong in a file of results; `line` is that of a row, 0 if the whole file is meant."""

    path: Path
    line: int
    sentence: str

    def __str__(self) -> str:
        return f"{self.path}{f', line {self.line}' if self.line else ''}: {self.sentence}"


@dataclass(frozen=True)
class Submission:
    """A folder of results, as it is checked."""

    folder: Path

    @cached_property
    def tables(self) -> dict[Path, list[Row]]:
        """The rows of each CSV file that has a schema and can be read."""
        return {path: list(read_rows(path)) for path in self.paths if not unreadable(path)}

    @property
    def paths(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("*.csv")) if schema.kind_of(path) in schema.kinds()]

    @cached_property
    def ledger(self) -> tuple[list[Record], list[str]]:
        return Ledger(self.folder / "samples.jsonl").read()

    @cached_property
    def results(self) -> list[Row]:
        """The rows of results.csv; none if it cannot be read."""
        return [] if unreadable(self.path) else list(read_rows(self.path))

    @property
    def path(self) -> Path:
        return self.folder / "results.csv"


def unreadable(path: Path) -> str:
    """Why a CSV file cannot be read; empty if it can."""
    try:
        list(read_rows(path))
    except (ValueError, OSError) as error:
        return one_sentence(error)
    return ""


# --- the checks -------------------------------------------------------------------------------------


def samples(submission: Submission) -> Iterator[Finding]:
    """The raw samples are there and whole."""
    path, (records, damaged) = submission.folder / "samples.jsonl", submission.ledger
    if not records:
        yield Finding(path, 0, "holds no record: nothing in the tables can be computed again")
    if damaged:
        yield Finding(path, 0, f"is damaged in line {', '.join(damaged)}")


def columns(submission: Submission) -> Iterator[Finding]:
    """Every row follows its JSON Schema: columns with their units, types, words, version."""
    for path in submission.paths:
        if reason := unreadable(path):
            yield Finding(path, 0, f"is no table: {reason}")
    for path, rows in submission.tables.items():
        validator = Draft202012Validator(schema.schema(schema.kind_of(path)))
        for line, row in enumerate(rows, start=2):
            if error := next(validator.iter_errors(row), None):
                where = f"{error.path[0]}: " if error.path else ""
                yield Finding(path, line, f"{where}{error.message[:200]} ({schema.schema(schema.kind_of(path))['$id']})")


def copies(submission: Submission) -> Iterator[Finding]:
    """The Parquet file of each table holds the same rows."""
    for path, rows in submission.tables.items():
        copy = path.with_suffix(".parquet")
        try:
            table = pd.read_parquet(copy).astype(object)
        except (OSError, ValueError) as error:
            yield Finding(copy, 0, f"cannot be read: {one_sentence(error)}")
            continue
        if table.where(table.notna(), None).to_dict("records") != rows:
            yield Finding(copy, 0, f"does not hold the rows of {path.name}")


def intervals(submission: Submission) -> Iterator[Finding]:
    """An interval holds its value."""
    for line, row in enumerate(submission.results, start=2):
        for metric in METRICS.values():
            value, low, high = (row.get(name) if name else None for name in (metric.column, metric.low, metric.high))
            numbers = [one for one in (low, value, high) if isinstance(one, int | float)]
            if len(numbers) == 3 and numbers != sorted(numbers):
                yield Finding(submission.path, line, f"{metric.column} {value:g} is outside its interval, {low:g} to {high:g}")


def verdicts(submission: Submission) -> Iterator[Finding]:
    """A verdict agrees with the interval of its speed-up."""
    for line, row in enumerate(submission.results, start=2):
        verdict, low, high = row.get("verdict"), row.get("speedup_low"), row.get("speedup_high")
        if verdict is None or not isinstance(low, int | float) or not isinstance(high, int | float):
            continue
        holds = {"faster": low > 1, "slower": high < 1, "same": low >= 1 / (1 + SAME) and high <= 1 + SAME}
        if not holds.get(str(verdict), True):
            yield Finding(submission.path, line, f"the verdict is {verdict}, and the speed-up lies between {low:g} and {high:g}")


def physics(submission: Submission) -> Iterator[Finding]:
    """No row is faster than its machine can be."""
    for line, row in enumerate(submission.results, start=2):
        fraction, device = row.get("roofline_fraction"), str(row.get("device"))
        if isinstance(fraction, int | float) and fraction > 1 / (1 - TOLERANCE.get(device, 0)):
            yield Finding(submission.path, line, f"it is {fraction:.3g} times as fast as the roofline of its machine: impossible")


def computed_again(submission: Submission) -> Iterator[Finding]:
    """Every table is what its samples give."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            tables = build_tables(submission.ledger[0])
            paths = [schema.write_table(rows, Path(temporary), kind) for kind, rows in tables.items()]
            again = {path.name: list(read_rows(path)) for path in paths}
        except (KeyError, ValueError, TypeError) as error:
            yield Finding(submission.folder / "samples.jsonl", 0, f"gives no table: {type(error).__name__} {one_sentence(error)}")
            return
    for name in again:
        if not (submission.folder / name).exists():
            yield Finding(submission.folder / name, 0, "is missing: `python -m evals.tables` makes it from the samples")
    for path, rows in submission.tables.items():
        computed = again.get(path.name, [])
        if len(rows) != len(computed):
            yield Finding(path, 0, f"has {len(rows)} rows, and the samples give {len(computed)}")
            continue
        for line, (row, right) in enumerate(zip(rows, computed, strict=True), start=2):
            wrong = [name for name in dict.fromkeys((*right, *row)) if not _same(row.get(name), right.get(name))]
            if wrong:
                more = f"; {len(wrong) - 1} other columns differ too" if len(wrong) > 1 else ""
                yield Finding(path, line, f"{wrong[0]} is {row.get(wrong[0])}, and the samples give {right.get(wrong[0])}{more}")


def _same(given: Cell, computed: Cell) -> bool:
    if isinstance(given, float) and isinstance(computed, int | float):
        return math.isclose(given, computed, rel_tol=ROUNDING) or given == computed
    return given == computed


def certificates(submission: Submission) -> Iterator[Finding]:
    """Every attention with a number has a certificate without a failure in certificates.jsonl of a folder above.

    One certificate serves all names of the same code and options, and has the first of them: another form of the same class in the
    folder will do for a name that has none.
    """
    records: list[Record] = []
    for folder in submission.folder.resolve().parents[:3]:
        records += [record for record in Ledger(folder / "certificates.jsonl").read()[0] if "attention" in record]
    known = {record["attention"] for record in records}
    certified = {record["attention"] for record in records if record["failure"] == ""}
    classes = _classes(submission.ledger[0])
    certified_classes = {classes[name] for name in certified if name in classes}
    missing: set[str] = set()
    for line, row in enumerate(submission.results, start=2):
        name = str(row.get("attention"))
        if row.get("outcome") != "ok" or name in certified | missing:
            continue
        if name in known or classes.get(name) not in certified_classes:
            missing.add(name)
            yield Finding(submission.path, line, f"{name} has a number, and no certificates.jsonl above holds its certificate")


def _classes(records: Sequence[Record]) -> dict[str, str]:
    """The class of each candidate of a ledger."""
    nodes = {name: node for record in records if "candidates" in record for name, node in record["candidates"].items()}
    targets = {name: node.get("node", node).get("_target_") for name, node in nodes.items()}
    return {name: target for name, target in targets.items() if target}


def origin(submission: Submission) -> Iterator[Finding]:
    """The command, the machine and the commit are recorded."""
    path, records = submission.folder / "samples.jsonl", submission.ledger[0]
    folder = submission.folder.resolve()
    study = STUDY.resolve()
    of_recipe = folder.is_relative_to(study) and step_of(folder.relative_to(study).as_posix())
    if not of_recipe and not any(record.get("kind") == "command" for record in records):
        yield Finding(path, 0, "records no command: nobody could repeat it")
    described = [record for record in records if "provenance" in record]
    if records and not described:
        yield Finding(path, 0, "records no machine")
    for name in ("host", "cpu", "commit"):
        if any(not record["provenance"].get(name) for record in described):
            yield Finding(path, 0, f"has a measurement that does not record its {name}")


CHECKS: tuple[Callable[[Submission], Iterator[Finding]], ...] = (
    samples,
    columns,
    copies,
    intervals,
    verdicts,
    physics,
    computed_again,
    certificates,
    origin,
)
"""All checks, in the order of their findings."""


def folders_below(root: Path) -> list[Path]:
    """All folders of results at or below a folder."""
    return sorted({path.parent for name in ("results.csv", "samples.jsonl") for path in root.rglob(name)})


def findings(folders: Sequence[Path]) -> Iterator[Finding]:
    """Yields what is wrong in some folders of results."""
    for folder in folders:
        for check in CHECKS:
            yield from check(Submission(folder))
