"""What a report is made of: the tables in a folder of results, its ledger, and the certificates beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from evals.errors import UsageError
from evals.results import frames, schema
from evals.results.formatting import format_setting
from evals.results.ledger import Ledger, Record
from evals.results.settings import SETTINGS, TRAINING_SETTINGS

SPEED, LEARNED, CONTEXT = "speed", "learned", "context"
"""What a table is of: timings, training, or the longest context that fits."""

DESCRIPTIONS = ("comparison", "study", "search")
"""The kinds of record that say under what the others were made."""


@dataclass(frozen=True)
class Source:
    """One folder that evals.run wrote."""

    folder: Path
    label: str
    kind: str
    table: pd.DataFrame
    curves: pd.DataFrame | None = None
    fits: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def swept(self) -> str:
        return "attention" if self.kind == CONTEXT else frames.swept_column(self.table)

    @cached_property
    def records(self) -> list[Record]:
        return Ledger(self.folder / "samples.jsonl").read()[0]

    @cached_property
    def descriptions(self) -> list[Record]:
        """Of the comparisons, studies or searches that the table's rows are of; all, where none is named."""
        found = [record for record in self.records if record.get("kind") in DESCRIPTIONS]
        known = {str(key) for column in DESCRIPTIONS if column in self.table for key in self.table[column].dropna()}
        return [record for record in found if record.get(record["kind"]) in known] or found

    @cached_property
    def certificates(self) -> dict[str, Record]:
        """The last of each attention, where the ledger of certificates is still there."""
        return {str(record["attention"]): record for record in Ledger(self.folder.parent / "certificates.jsonl").read()[0]}

    @property
    def commands(self) -> list[str]:
        return list(dict.fromkeys(str(record["command"]) for record in self.records if record.get("kind") == "command"))

    @property
    def commits(self) -> list[str]:
        facts = [record.get("provenance") or {} for record in self.descriptions]
        told = (f"{one['commit'][:12]}{' with changes' if one.get('dirty') else ''}" for one in facts if one.get("commit"))
        return list(dict.fromkeys(told))


def read(folders: Sequence[Path]) -> list[Source]:
    """A source a folder. Raises UsageError, in one sentence, for a folder that holds no table of results, or is given twice."""
    twice = {folder for folder in folders if [one.resolve() for one in folders].count(folder.resolve()) > 1}
    if twice:
        raise UsageError(f"{min(twice)} is given twice: a report compares folders that differ")
    names = [folder.resolve().name for folder in folders]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    try:
        return [_read(folder, label) for folder, label in zip(folders, labels, strict=True)]
    except (ValueError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def _read(folder: Path, label: str) -> Source:
    path = folder / "results.csv"
    kind = schema.kind_of(path) if path.is_file() else ""
    if kind == "max_context":
        return Source(folder, label, CONTEXT, frames.read_table(folder))
    if kind == "accuracy":
        curves = folder / "curves.csv"
        return Source(folder, label, LEARNED, frames.read_table(folder), schema.read(curves) if curves.is_file() else None)
    if kind == "conversion":
        raise ValueError(
            f"{folder} holds conversions of pretrained models, which a report does not show: `python -m evals.figures {folder}` "
            "draws them"
        )
    return Source(folder, label, SPEED, frames.read_table(folder), fits=frames.read_fits(folder))


# --- parts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Sources of one kind, swept over one setting: they share charts and a table."""

    sources: list[Source]

    @property
    def kind(self) -> str:
        return self.sources[0].kind

    @property
    def swept(self) -> str:
        return self.sources[0].swept

    @cached_property
    def table(self) -> pd.DataFrame:
        """The rows of all sources, with `set`, their source, and `settings`, what else they differ in than the swept setting."""
        rows = pd.concat([one.table.assign(set=one.label) for one in self.sources], ignore_index=True)
        named = {**SETTINGS, **TRAINING_SETTINGS}
        # A set is of a machine; what trained lengths and examples differ in goes with the swept setting.
        own = ("processor", "torch") if len(self.sources) > 1 else ()
        apart = [
            name
            for name in named
            if name in rows and name not in (self.swept, *own) and frames.varies_independently(rows, self.swept, name)
        ]
        told = [
            rows[name].map(lambda value, name=name: "" if pd.isna(value) else named[name].format(format_setting(value)))
            for name in apart
        ]
        joined = [", ".join(filter(None, words)) for words in zip(*told, strict=True)] if told else ""
        return rows.assign(settings=joined)

    @property
    def attentions(self) -> list[str]:
        return list(dict.fromkeys(self.table["attention"].astype(str)))


def parts(sources: Sequence[Source]) -> list[Part]:
    """Sources that belong together, in the order in which they were given."""
    grouped: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        grouped.setdefault((source.kind, source.swept), []).append(source)
    return [Part(group) for group in grouped.values()]


def facts(description: Record) -> dict[str, Any]:
    """What is known of the machine of a comparison, without what changes from minute to minute."""
    given = {key: value for key, value in (description.get("provenance") or {}).items() if key != "load_1m"}
    return {key: value for key, value in given.items() if value not in (None, "")}
