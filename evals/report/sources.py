"""The data of a report: the tables and the ledger of each result folder, and its certificates."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from evals.errors import UsageError
from evals.results import frames
from evals.results.folder_kinds import check_folder
from evals.results.formatting import format_setting
from evals.results.ledger import Ledger, Record
from evals.results.settings import SETTINGS, TRAINING_SETTINGS, setting_columns, setting_phrase

TIMING, TRAINING, CONTEXT = "timing", "training", "context"
"""The kinds of tables: of latencies, of training runs, and of the longest context that fits."""

TABLES = {TIMING: "latency", TRAINING: "accuracy", CONTEXT: "max_context"}
"""The schema of each kind."""

DESCRIPTIONS = ("comparison", "study", "search")
"""The kinds of records that describe a job's settings."""


@dataclass(frozen=True)
class Source:
    """One result folder of evals.run."""

    folder: Path
    label: str  # its name in the report
    kind: str
    table: pd.DataFrame
    fits: dict[str, pd.DataFrame] = field(default_factory=dict)  # scaling fits and crossovers

    @property
    def swept(self) -> str:
        return "attention" if self.kind == CONTEXT else frames.swept_column(self.table)

    @cached_property
    def records(self) -> list[Record]:
        return Ledger(self.folder / "samples.jsonl").read()[0]

    @cached_property
    def descriptions(self) -> list[Record]:
        """Records that describe the jobs of the table's rows; of all jobs, if the table does not name them."""
        descriptions = [record for record in self.records if record.get("kind") in DESCRIPTIONS]
        known = {str(key) for column in DESCRIPTIONS if column in self.table for key in self.table[column].dropna()}
        return [record for record in descriptions if record.get(record["kind"]) in known] or descriptions

    @cached_property
    def certificates(self) -> dict[str, Record]:
        """The last certificate of each attention; empty without a ledger of certificates."""
        return {str(record["attention"]): record for record in Ledger(self.folder.parent / "certificates.jsonl").read()[0]}

    @property
    def commands(self) -> list[str]:
        return list(dict.fromkeys(str(record["command"]) for record in self.records if record.get("kind") == "command"))

    @property
    def commits(self) -> list[str]:
        provenances = [record.get("provenance") or {} for record in self.descriptions]
        commits = (f"{one['commit'][:12]}{' with changes' if one.get('dirty') else ''}" for one in provenances if one.get("commit"))
        return list(dict.fromkeys(commits))


def read_sources(folders: Sequence[Path]) -> list[Source]:
    """Reads result folders.

    Raises:
        UsageError: if a folder has no table of results, or is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    repeated = [folder for folder, path in zip(folders, resolved, strict=True) if resolved.count(path) > 1]
    if repeated:
        raise UsageError(f"{min(repeated)} is given twice: a report compares folders that differ")
    names = [path.name for path in resolved]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    try:
        return [_read_source(folder, label) for folder, label in zip(folders, labels, strict=True)]
    except (ValueError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def _read_source(folder: Path, label: str) -> Source:
    kind = check_folder(folder, "report")
    if kind == "max_context":
        return Source(folder, label, CONTEXT, frames.read_table(folder))
    if kind == "accuracy":
        return Source(folder, label, TRAINING, frames.read_table(folder))
    return Source(folder, label, TIMING, frames.read_table(folder), fits=frames.read_fits(folder))


# --- parts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Sources of one kind that sweep the same setting: they share charts and a table."""

    sources: list[Source]

    @property
    def kind(self) -> str:
        return self.sources[0].kind

    @property
    def swept(self) -> str:
        return self.sources[0].swept

    @cached_property
    def table(self) -> pd.DataFrame:
        """The rows of all sources; column `set` is the label of the source, `settings` has the other settings that differ."""
        rows = pd.concat([source.table.assign(set=source.label) for source in self.sources], ignore_index=True)
        # Sets differ in machine and torch version anyway.
        ignored = (self.swept, *(("processor", "torch") if len(self.sources) > 1 else ()))
        settings = [name for name in setting_columns(rows.drop(columns="set"), TABLES[self.kind]) if name not in ignored]
        texts = [
            rows[name].map(partial(_phrase, name))
            for name in settings
            if rows[name].notna().any() and frames.varies_independently(rows, self.swept, name)
        ]
        return rows.assign(settings=[", ".join(filter(None, row)) for row in zip(*texts, strict=True)] if texts else "")

    @property
    def attentions(self) -> list[str]:
        return list(dict.fromkeys(self.table["attention"].astype(str)))


def _phrase(setting: str, value: Any) -> str:
    if pd.isna(value):
        return ""
    phrase = SETTINGS.get(setting) or TRAINING_SETTINGS.get(setting)
    return phrase.format(format_setting(value)) if phrase else setting_phrase(setting, value)


def group_sources(sources: Sequence[Source]) -> list[Part]:
    """Groups the sources that share charts, in the order in which they were given."""
    grouped: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        grouped.setdefault((source.kind, source.swept), []).append(source)
    return [Part(group) for group in grouped.values()]
