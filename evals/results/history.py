"""The history of one comparison in a ledger: its preflights, rounds and failures, for the engine and for the tables."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from evals.results.ledger import Record
from evals.stats.intervals import CONFIDENCE, Interval, Speedup, median_interval, medians, speedup_interval


class Process(NamedTuple):
    """One process of a round: a candidate, or the A/A control, which is a second process of the reference."""

    name: str
    is_control: bool = False


class History:
    """The records of the comparison with a given id, in the order of a ledger."""

    def __init__(self, records: Iterable[Record], comparison: str) -> None:
        self.preflights: dict[str, Record] = {}  # by candidate
        self.failures: dict[str, Record] = {}  # the first failed record of each candidate that failed
        self.stop_reason = ""  # the rule that ended sampling; empty if it has not ended
        self.lost = ""  # why the comparison was given up; empty if anything was measured since
        self._rounds: dict[Process, dict[int, Record]] = {}
        self._seconds: dict[int, float] = {}
        for record in records:
            if record.get("comparison") == comparison:
                self.add(record)

    def add(self, record: Record) -> None:
        """Adds the next record of the comparison."""
        kind = record["kind"]
        if kind == "restart":  # on another machine: earlier measurements do not count
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
        """How many rounds were measured."""
        return len(self._seconds)

    @property
    def next_round(self) -> int:
        """Number of the next round; rounds count from 0."""
        return max(self._seconds, default=-1) + 1

    @property
    def spent_s(self) -> float:
        """Seconds that all rounds took."""
        return sum(self._seconds.values())

    def is_active(self, name: str) -> bool:
        """Whether a candidate has passed its preflight and has not failed since."""
        return name in self.preflights and name not in self.failures

    def process_bytes(self, name: str) -> int:
        """Estimates the memory of a candidate's process from its preflight, in bytes."""
        preflight = self.preflights[name]
        peaks = int(preflight.get("process_peak_bytes") or 0) + int(preflight.get("peak_bytes") or 0)
        return peaks + 2 * int(preflight["parameter_bytes"])

    def records(self, process: Process) -> list[Record]:
        """The completed rounds of a process, in their order."""
        return [record for _, record in sorted(self._rounds.get(process, {}).items())]

    def medians(self, process: Process) -> dict[int, list[float]]:
        """The median of each time slice in seconds, by round."""
        return {record["round"]: medians(record["time_slices"]).tolist() for record in self.records(process)}

    def ratios(self, reference: Process, process: Process) -> list[list[float]]:
        """The reference's medians over those of another process, slice by slice, for each round that both completed."""
        theirs, ours = self.medians(reference), self.medians(process)
        return [[a / b for a, b in zip(theirs[number], ours[number], strict=False)] for number in theirs if number in ours]

    def round_medians(self, process: Process) -> list[float]:
        """The median over the time slices' medians of each round, in seconds."""
        return [float(np.median(slices)) for slices in self.medians(process).values()]

    def log_ratios(self, reference: Process, process: Process) -> list[float]:
        """The logarithm of each round's median ratio; above 0 if the process is faster than the reference."""
        return [math.log(np.median(ratios)) for ratios in self.ratios(reference, process)]

    def latency(self, process: Process) -> Interval:
        """Median latency in seconds over all rounds, with its interval.

        Raises:
            ValueError: if the process has completed no round.
        """
        # A fixed seed of the bootstrap: the same ledger gives the same numbers.
        return median_interval(list(self.medians(process).values()), generator=np.random.default_rng(0))

    def speedup(self, reference: Process, process: Process, confidence: float = CONFIDENCE) -> Speedup | None:
        """How many times faster a process is than the reference; None if they have no round in common."""
        theirs, ours = self._rounds.get(reference, {}), self._rounds.get(process, {})
        common = sorted(theirs.keys() & ours.keys())
        if not common:
            return None
        slices = [[rounds[number]["time_slices"] for number in common] for rounds in (theirs, ours)]
        return speedup_interval(*slices, confidence=confidence, generator=np.random.default_rng(0))
