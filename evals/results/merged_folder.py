"""Reading the folders that are merged, and writing the merged one."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from evals.errors import UsageError, naming
from evals.results import schema
from evals.results.folder_kinds import CONTENTS, check_folder
from evals.results.ledger import Ledger, Record
from evals.results.machines import JOBS, is_told_apart, told_apart
from evals.results.merge import Merged, Source

SAMPLES, SUPERSEDED = "samples.jsonl", "superseded.jsonl"


def read_source(folder: Path, machine: str | None = None) -> Source:
    """Reads a folder that is to be merged.

    Args:
        folder: written by evals.run or by evals.merge.
        machine: the name of its machine; None: as its records say.

    Raises:
        UsageError: if it holds no results that can be merged, or results of another version of the tables.
    """
    check_folder(folder, "merge")
    try:
        schema.read(folder / "results.csv")
    except schema.SchemaVersionError as error:
        raise UsageError(str(error)) from error
    records = Ledger(folder / SAMPLES).intact()
    if not records:
        raise UsageError(f"{folder} holds no {SAMPLES} with a record: tables cannot be merged without the samples beside them")
    if machine and any(record.get("kind") in JOBS for record in records) and is_told_apart(records):
        raise UsageError(f"{folder} is merged and names its machines already: give --machine with the folders that it was made of")
    return Source(folder, list(told_apart(records, machine)), Ledger(folder / SUPERSEDED).intact())


def read_target(folder: Path, sources: Sequence[Source]) -> list[Source]:
    """Checks that the folders can be merged into `folder`, and reads what it holds; an empty list if it is new.

    Raises:
        UsageError: if not, as for folders of different kinds, or for a folder in which evals.run measured.
    """
    target = []
    if (folder / SAMPLES).exists() or (folder / "results.csv").exists():
        ledger = Ledger(folder / SAMPLES)
        records, damaged = ledger.read()
        if damaged:
            raise UsageError(f"{ledger.path} is damaged in line {', '.join(damaged)}: remove what is left of these lines first")
        if not is_told_apart(records) or ledger.files() != [ledger.path]:
            raise UsageError(f"{folder} is no merged folder, and evals.run could not go on in it: merge it too, to a new one")
        target = [read_source(folder)]
    kinds = {one.folder: schema.kind_of(one.folder / "results.csv") for one in (*sources, *target)}
    swept = {one.folder: _swept(one.records) for one in (*sources, *target)}
    (first, kind), *others = kinds.items()
    for other, other_kind in others:
        if other_kind != kind:
            raise UsageError(f"{first} holds {CONTENTS[kind]} and {other} {CONTENTS[other_kind]}: one table cannot hold both")
        if swept[other] != swept[first]:
            raise UsageError(f"{first} sweeps {swept[first]} and {other} {swept[other]}: one table holds one sweep")
    return target


def _swept(records: Sequence[Record]) -> str:
    return " and ".join(sorted({str(record["swept"] or "nothing") for record in records if "swept" in record}))


def write_ledgers(folder: Path, merged: Merged) -> None:
    """Writes the records of a merge. Each file replaces an older one once it is whole; what is superseded is written first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in ((SUPERSEDED, merged.superseded), (SAMPLES, merged.records)):
        unfinished = folder / f".{name}.{os.getpid()}"
        if not records and not (folder / name).exists():
            continue
        try:
            with naming(unfinished), unfinished.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(folder / name)
        finally:
            unfinished.unlink(missing_ok=True)
