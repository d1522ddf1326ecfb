"""`Source`: a folder of results as the study uses it, with the data of its figures and their origin."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from evals.plots import registry
from evals.results import frames, schema
from evals.results.ledger import Ledger, Record
from evals.results.metrics import BYTES

Data = Any
"""A Sweep, an AccuracySweep, or the two tables of a conversion: a data set that a figure draws."""

HASHES = {"comparison": "comparison", "study": "study", "search": "search", "conversion": "run"}
"""The kinds of record that describe how measurements were made, and their field with the hash of all settings."""


@dataclass(frozen=True)
class Source:
    """One folder of results."""

    folder: Path

    @cached_property
    def table(self) -> pd.DataFrame:
        return schema.read(self.folder / "results.csv")

    @cached_property
    def sets(self) -> dict[str, Data]:
        """The data sets by the suffix of their figures' names ("" if there is one). Raises ValueError for an invalid table."""
        kind = schema.kind_of(self.folder / "results.csv")
        if kind == "conversion":
            return dict(registry.conversion_tables(self.table, schema.read(self.folder / "positions.csv")))
        if kind == "accuracy":
            return dict(registry.checked_accuracy_sweeps(self.table, schema.read(self.folder / "curves.csv")))
        return dict(frames.sweeps(frames.read_table(self.folder), frames.read_fits(self.folder)))

    @property
    def first(self) -> Data:
        """The first data set."""
        return next(iter(self.sets.values()))

    @cached_property
    def records(self) -> list[Record]:
        return Ledger(self.folder / "samples.jsonl").read()[0]

    @cached_property
    def descriptions(self) -> list[Record]:
        """The last record that describes each row of the table; all such records if the table names none."""
        named = {kind: set(self.table[kind].dropna()) for kind in HASHES if kind in self.table}
        last: dict[str, Record] = {}
        for record in self.records:
            kind = str(record.get("kind"))
            if kind in HASHES and (kind not in named or record[HASHES[kind]] in named[kind]):
                last[str(record[HASHES[kind]])] = record
        return list(last.values())

    @property
    def hashes(self) -> list[str]:
        """The hashes of settings and code."""
        return [str(record[HASHES[record["kind"]]]) for record in self.descriptions]

    @property
    def commands(self) -> list[str]:
        """The commands as typed; older ledgers and those of `evals.distill` have none."""
        return _unique(record["command"] for record in self.records if record.get("kind") == "command")

    @property
    def commits(self) -> list[str]:
        return _unique(
            f"{facts['commit'][:12]}{', with changes' if facts.get('dirty') else ''}"
            for facts in self._provenance
            if facts.get("commit")
        )

    @property
    def processors(self) -> list[str]:
        """The processors or GPUs."""
        return _unique(str(facts.get("gpu") or facts["cpu"]) for facts in self._provenance)

    @property
    def machines(self) -> list[str]:
        """The processors or GPUs with their memory and software."""
        return _unique(
            f"{facts.get('gpu') or facts['cpu']}, {BYTES.format(facts['memory_bytes'], digits=3)} of memory, "
            f"{facts['platform']}, Python {facts['python']}, torch {facts['torch']}"
            for facts in self._provenance
        )

    @property
    def days(self) -> list[str]:
        """The first and the last day on which a measurement began."""
        days = sorted(str(record["time"])[:10] for record in self.descriptions)
        return _unique([days[0], days[-1]]) if days else []

    @property
    def _provenance(self) -> list[dict[str, Any]]:
        return [record["provenance"] for record in self.descriptions if record.get("provenance")]


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def find_sources(results: Path, pattern: str) -> Sequence[Source]:
    """The folders of this name or pattern that hold a table, in the order of their names."""
    return [Source(path.parent) for path in sorted(results.glob(f"{pattern}/results.csv"))]
