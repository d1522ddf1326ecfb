"""Merging of ledgers: measurements of several folders in one, each of them once, and each machine apart from the others.

- Rounds of one comparison on one machine are pooled, in the order in which they were measured. Rounds of two machines never are.
- What was measured twice, and differently, is a conflict: the newest measurement counts, or that of the preferred folder. The
  other one is superseded. It is kept, so that nothing is lost, and no table is made from it.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.results.ledger import Record
from evals.results.machines import JOBS, MACHINE

Cell = tuple[str, str]
"""The id of a comparison, and an attention."""

IDENTITY = {
    "preflight": ("comparison", "attention"),
    "probe": ("search", "attention", "seq_len"),
    "run": ("run", "learning_rate", "seed"),
}
"""The kinds of records that a ledger holds once for each of these keys."""

INCIDENTAL = {"time", "called_s", "checked_s", "train_s", "process_peak_bytes"}
"""Fields that differ whenever something is measured again: a difference in them is no conflict."""


@dataclass(frozen=True)
class Source:
    """The records of one folder, told apart by machine."""

    folder: Path
    records: Sequence[Record]
    superseded: Sequence[Record] = ()  # records that an earlier merge has set aside


@dataclass
class Merged:
    """The records that count, in the order of their time; those that do not; and a sentence for each conflict."""

    records: list[Record] = field(default_factory=list)
    superseded: list[Record] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)


def merge(sources: Sequence[Source], preferred: Path | None = None) -> Merged:
    """Merges the records of several folders.

    The order of the sources changes nothing, and neither does a folder that was merged before.

    Args:
        sources: the folders.
        preferred: the folder whose measurements count where another folder has others; None: the newest count.
    """
    return _Merging(sources, preferred).merged()


def content(record: Record) -> str:
    """Text that two records share if they are the same measurement; the number of a round is no part of it."""
    return json.dumps({key: value for key, value in record.items() if key != "round"}, sort_keys=True)


class _Merging:
    """The state of one merge: which records there are, in which folders, and which of them are superseded."""

    def __init__(self, sources: Sequence[Source], preferred: Path | None) -> None:
        self.sources = sources
        self.preferred = preferred
        self.superseded = {content(record): record for one in sources for record in one.superseded}
        for record in (record for one in sources if one.folder == preferred for record in one.records):
            self.superseded.pop(content(record), None)
        self.records: dict[str, Record] = {}
        self.folders: dict[str, list[Path]] = defaultdict(list)
        for source in sources:
            for record in source.records:
                text = content(record)
                if text not in self.superseded:
                    self.records[text] = record
                    self.folders[text].append(source.folder)
        described = sorted((record for record in self.records.values() if record.get("kind") in JOBS), key=_order)
        self.jobs = {job[job["kind"]]: job for job in described}  # the last description of each
        self.ids = {one.folder: {record[kind] for record in one.records for kind in JOBS if kind in record} for one in sources}
        self.conflicts: list[str] = []

    def merged(self) -> Merged:
        self._choose_jobs()
        self._choose_single_records()
        self._choose_outcomes()
        kept = [record for record in self.records.values() if record.get("kind") != "latency"]
        return Merged(
            sorted([*kept, *self._renumbered_rounds()], key=_order),
            sorted(self.superseded.values(), key=_order),
            sorted(self.conflicts),
        )

    # --- choices ------------------------------------------------------------------------------------

    def _choose_jobs(self) -> None:
        """Finds cells that several jobs measured under the same settings: other code or limits of sampling give another id.

        A table shows the job that was begun last. A job is superseded if the preferred folder has all of its cells.
        """
        by_settings: dict[str, list[str]] = defaultdict(list)
        for key, job in self.jobs.items():
            by_settings[json.dumps([job["kind"], job["settings"], job.get("limit_bytes")], sort_keys=True)].append(key)
        for keys in by_settings.values():
            if len(keys) < 2 or any(ids.issuperset(keys) for ids in self.ids.values()):
                continue  # a folder that holds them all has decided already
            chosen = [key for key in keys if self.preferred and key in self.ids[self.preferred]] or keys[-1:]
            names = {name for key in chosen for name in self.jobs[key]["candidates"]}
            others = [key for key in keys if key not in chosen and names & self.jobs[key]["candidates"].keys()]
            if others:
                words = f"with other code or sampling; that of {self._counting(self.jobs[chosen[-1]])} counts"
                self._report(", ".join(sorted(names)), self.jobs[chosen[-1]], words, [self.jobs[key] for key in keys])
            for key in others:
                if self.preferred and self.jobs[key]["candidates"].keys() <= names:
                    self._supersede(text for text, record in self.records.items() if key in (record.get(kind) for kind in JOBS))

    def _choose_single_records(self) -> None:
        """Keeps one record of each measurement of which a ledger holds one."""
        found: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for text, record in self.records.items():
            if record.get("kind") in IDENTITY:
                found[record["kind"], *(record.get(key) for key in IDENTITY[record["kind"]])].append(text)
        for texts in found.values():
            best, *others = sorted(texts, key=self._rank, reverse=True)
            records = [self.records[text] for text in texts]
            fields = {name for record in records for name in record} - INCIDENTAL
            differing = sorted(name for name in fields if len({repr(record.get(name)) for record in records}) > 1)
            if differing:
                counts = ", ".join(f"{key} {records[texts.index(best)].get(key)}" for key in differing if key != "detail")
                words = f"with different {', '.join(differing)}; {counts} of {self._counting(self.records[best])} counts"
                self._report(records[0]["attention"], self._job_of(records[0]), words, records)
            self._supersede(others)

    def _choose_outcomes(self) -> None:
        """Decides about cells that were timed to the end in one folder and failed in a round of another."""
        timed: dict[Cell, list[str]] = defaultdict(list)
        for text, record in self.records.items():
            if record.get("kind") == "latency":
                timed[record["comparison"], record["attention"]].append(text)
        for (_, attention), texts in timed.items():
            failed = [text for text in texts if self.records[text]["outcome"] != "ok"]
            failed_in = {folder for text in failed for folder in self.folders[text]}
            if not failed or failed_in.issuperset(folder for text in texts for folder in self.folders[text]):
                continue
            best = max(texts, key=self._rank)
            is_failed = bool(failed_in & ({self.preferred} if self.preferred in self.folders[best] else {*self.folders[best]}))
            records = [self.records[text] for text in (best, *failed)]
            outcome = records[1]["outcome"] if is_failed else "ok"
            words = f"with different outcomes; {outcome} of {self._counting(records[0])} counts"
            self._report(attention, self._job_of(records[0]), words, [self.records[text] for text in texts])
            if not is_failed:
                self._supersede(failed)

    # --- rounds -------------------------------------------------------------------------------------

    def _renumbered_rounds(self) -> Iterator[Record]:
        """The timed records of each comparison, its rounds numbered in the order of their time."""
        rounds: dict[str, list[dict[str, Record]]] = defaultdict(list)
        for source in self.sources:
            found: dict[tuple[str, int], dict[str, Record]] = defaultdict(dict)
            for record in source.records:
                text = content(record)
                if record.get("kind") == "latency" and text in self.records:
                    found[record["comparison"], record["round"]][text] = record
            for (comparison, _), records in found.items():
                same = [one for one in rounds[comparison] if one.keys() & records.keys()]
                rounds[comparison] = [one for one in rounds[comparison] if one not in same]
                rounds[comparison].append({text: record for one in (*same, records) for text, record in one.items()})
        for pooled in rounds.values():
            for number, one in enumerate(sorted(pooled, key=lambda one: min(map(_order, one.values())))):
                yield from (record | {"round": number} for record in one.values())

    # --- helpers ------------------------------------------------------------------------------------

    def _rank(self, text: str) -> tuple[bool, str, str]:
        """Sort key of a record: of two, the one with the higher key counts."""
        return (self.preferred in self.folders[text], *_order(self.records[text]))

    def _supersede(self, texts: Iterable[str]) -> None:
        for text in list(texts):
            self.superseded[text] = self.records.pop(text)

    def _job_of(self, record: Record) -> Record:
        return self.jobs.get(record.get("comparison") or record.get("search") or "", {})

    def _where(self, records: Iterable[Record]) -> str:
        """The folders that hold any of the records."""
        folders = {folder for record in records for folder in self.folders[content(record)]}
        return " and ".join(sorted(map(str, folders)))

    def _counting(self, record: Record) -> str:
        """The folder whose record counts, for a message."""
        return str(self.preferred) if self.preferred in self.folders[content(record)] else self._where([record])

    def _report(self, attention: str, job: Record, words: str, records: Iterable[Record]) -> None:
        settings = job.get("settings", {})
        varied = [f"{name}={settings[name]}" for name in job.get("varied", ()) if name in settings]
        where = [*varied, *([f"on {settings[MACHINE]}"] if MACHINE in settings else [])]
        self.conflicts.append(f"{' '.join([attention, *where])} was measured twice, in {self._where(records)}, {words}")


def _order(record: Record) -> tuple[str, str]:
    return str(record.get("time", "")), content(record)
