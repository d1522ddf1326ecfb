"""A folder of results, as the study's figures take it: what is drawn of it, and where its numbers come from."""

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
"""A Sweep, a Learned, or the two tables of conversions: what the functions of `figures` draw."""

DESCRIPTIONS = {"comparison": "comparison", "study": "study", "search": "search", "conversion": "run"}
"""The kinds of record that say under what others were made, and the field that holds the hash of all their settings."""


@dataclass(frozen=True)
class Source:
    """One folder of results."""

    folder: Path

    @cached_property
    def table(self) -> pd.DataFrame:
        return schema.read(self.folder / "results.csv")

    @cached_property
    def sets(self) -> dict[str, Data]:
        """What belongs in one figure, by what tells it from the others ("" if nothing does). Raises ValueError as `figures`."""
        kind = schema.kind_of(self.folder / "results.csv")
        if kind == "conversion":
            return dict(registry.conversion_tables(self.table, schema.read(self.folder / "positions.csv")))
        if kind == "accuracy":
            return dict(registry.accuracy_figures_data(self.table, schema.read(self.folder / "curves.csv")))
        return dict(frames.sweeps(frames.read_table(self.folder), frames.read_fits(self.folder)))

    @cached_property
    def records(self) -> list[Record]:
        return Ledger(self.folder / "samples.jsonl").read()[0]

    @cached_property
    def descriptions(self) -> list[Record]:
        """Of what the table's rows are of; all, where the table does not name them. The last of each, in their order."""
        named = {kind: set(self.table[kind].dropna()) for kind in DESCRIPTIONS if kind in self.table}
        last: dict[str, Record] = {}
        for record in self.records:
            kind = str(record.get("kind"))
            if kind in DESCRIPTIONS and (kind not in named or record[DESCRIPTIONS[kind]] in named[kind]):
                last[str(record[DESCRIPTIONS[kind]])] = record
        return list(last.values())

    @property
    def hashes(self) -> list[str]:
        """Of the settings and the code of each."""
        return [str(record[DESCRIPTIONS[record["kind"]]]) for record in self.descriptions]

    @property
    def commands(self) -> list[str]:
        """What was typed; none of a ledger that was made before ledgers kept it, and of `evals.distill`."""
        return _once(record["command"] for record in self.records if record.get("kind") == "command")

    @property
    def commits(self) -> list[str]:
        facts = self._facts
        return _once(f"{one['commit'][:12]}{', with changes' if one.get('dirty') else ''}" for one in facts if one.get("commit"))

    @property
    def processors(self) -> list[str]:
        """What computed."""
        return _once(str(one.get("gpu") or one["cpu"]) for one in self._facts)

    @property
    def machines(self) -> list[str]:
        """What computed, its memory, and what ran there."""
        return _once(
            f"{one.get('gpu') or one['cpu']}, {BYTES.format(one['memory_bytes'], digits=3)} of memory, "
            f"{one['platform']}, Python {one['python']}, torch {one['torch']}"
            for one in self._facts
        )

    @property
    def days(self) -> list[str]:
        """On which it was begun, the first and the last."""
        found = sorted(str(record["time"])[:10] for record in self.descriptions)
        return _once([found[0], found[-1]]) if found else []

    @property
    def _facts(self) -> list[dict[str, Any]]:
        return [record["provenance"] for record in self.descriptions if record.get("provenance")]


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def found(results: Path, pattern: str) -> Sequence[Source]:
    """The folders of this name, or of names of this pattern, that hold a table; in the order of their names."""
    return [Source(path.parent) for path in sorted(results.glob(f"{pattern}/results.csv"))]
