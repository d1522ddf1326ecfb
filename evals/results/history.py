"""What a ledger says of one comparison: for its engine to go on from, and for the table to be made of."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from evals.results.ledger import Record
from evals.stats.intervals import CONFIDENCE, Interval, Speedup, median_interval, medians, speedup_interval


class Process(NamedTuple):
    """One process of a round. The reference has two: what its twin differs by is noise."""

    name: str
    is_control: bool = False


class History:
    """The trials and rounds of one comparison, among all records of a ledger."""

    def __init__(self, records: Iterable[Record], comparison: str) -> None:
        self.preflights: dict[str, Record] = {}
        self._rounds: dict[Process, dict[int, Record]] = {}
        self.failures: dict[str, Record] = {}
        self.stop_reason = ""
        self.lost = ""  # why it was given up, where that is the last that is known of it
        self._seconds: dict[int, float] = {}
        for record in records:
            if record.get("comparison") == comparison:
                self.add(record)

    def add(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "restart":  # on another machine: what came before does not count
            self.preflights, self._rounds, self.failures, self._seconds = {}, {}, {}, {}
            self.stop_reason = ""
        self.lost = str(record["detail"]) if kind == "lost" else ""
        if kind == "stop":
            self.stop_reason = record["stop_reason"]
        if kind == "preflight":
            self.preflights[record["attention"]] = record
        if kind == "latency":
            self._seconds[record["round"]] = record["round_s"]
            if record["outcome"] == "ok":
                self._rounds.setdefault(Process(record["attention"], record["is_control"]), {})[record["round"]] = record
        if kind in ("preflight", "latency") and record["outcome"] != "ok":
            self.failures.setdefault(record["attention"], record)

    @property
    def rounds(self) -> int:
        return len(self._seconds)

    @property
    def next_round(self) -> int:
        return max(self._seconds, default=-1) + 1

    @property
    def spent_s(self) -> float:
        return sum(self._seconds.values())

    def is_active(self, name: str) -> bool:
        return name in self.preflights and name not in self.failures

    def held_bytes(self, name: str) -> int:
        """About what a process of this candidate holds."""
        trial = self.preflights[name]
        return int(trial.get("process_peak_bytes") or 0) + int(trial.get("peak_bytes") or 0) + 2 * int(trial["parameter_bytes"])

    def medians(self, runner: Process) -> dict[int, list[float]]:
        """By round, the median of each turn."""
        records = self._rounds.get(runner, {})
        return {number: medians(records[number]["time_slices"]).tolist() for number in sorted(records)}

    def record(self, runner: Process, number: int) -> Record:
        return self._rounds[runner][number]

    def ratios(self, reference: Process, runner: Process) -> list[list[float]]:
        """Of each round that both have, the ratios of the reference's turns to the other's."""
        theirs, ours = self.medians(reference), self.medians(runner)
        both = (number for number in theirs if number in ours)
        return [[a / b for a, b in zip(theirs[number], ours[number], strict=False)] for number in both]

    def latency(self, runner: Process) -> Interval:
        """Of all that it was timed, in seconds. Raises ValueError where it has no round."""
        # The same ledger gives the same figures: the bootstrap's randomness is fixed.
        return median_interval(list(self.medians(runner).values()), generator=np.random.default_rng(0))

    def speedup(self, reference: Process, runner: Process, confidence: float = CONFIDENCE) -> Speedup | None:
        """How many times faster than the reference; None where they have no round in common."""
        theirs, ours = self._rounds.get(reference, {}), self._rounds.get(runner, {})
        both = sorted(theirs.keys() & ours.keys())
        if not both:
            return None
        generator = np.random.default_rng(0)
        turns = [[record[number]["time_slices"] for number in both] for record in (theirs, ours)]
        return speedup_interval(*turns, confidence=confidence, generator=generator)
