"""The progress tables: the values so far of each attention of a comparison, one class per kind of job."""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from evals.benchmark.job import Job
from evals.benchmark.max_context import ContextSearch
from evals.results.formatting import format_mean, format_value
from evals.results.history import History, Process
from evals.results.ledger import Record
from evals.results.metrics import LATENCY, PEAK_MEMORY, SPEEDUP
from evals.results.training_runs import best_learning_rate
from evals.stats.intervals import half_width, mean_interval, medians
from evals.training.study import Study


class Row(NamedTuple):
    """One attention of a progress table."""

    attention: str
    values: list[str]  # one per heading
    state: str  # such as waiting; empty if the values suffice


class ProgressTable(ABC):
    """A table that fills while a job runs."""

    headings: Sequence[str]

    @abstractmethod
    def add(self, record: Record) -> str | None:
        """Takes in a record of the job. Returns a line for a log if the record is noteworthy."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """One row per attention."""

    def footnote(self) -> str:
        """A line about all attentions together; may be empty."""
        return ""


def make_table(job: Job) -> ProgressTable:
    """The progress table of a job, filled from its ledger."""
    if isinstance(job, Study):
        return TrainingTable(job)
    return SearchTable(job) if isinstance(job, ContextSearch) else TimingTable(job)


class TimingTable(ProgressTable):
    """Latency, speed-up and peak memory so far, with the intervals by which the engine decides whether to add a round.

    These intervals cost microseconds. The bootstrap of the final table would delay the next round.
    """

    def __init__(self, job: Job) -> None:
        self.names = [candidate.name for candidate in job.comparison.candidates]
        self.reference = job.comparison.relative_to
        self.metrics = [LATENCY, *([SPEEDUP] if self.reference in self.names else []), PEAK_MEMORY]
        self.headings = [metric.heading for metric in self.metrics]
        self.history = History(job.ledger.read()[0], job.id)
        self.logged: set[str] = set()

    def add(self, record: Record) -> str | None:
        self.history.add(record)
        name = record.get("attention")
        if name is None or record.get("is_control"):
            return None
        if record["outcome"] != "ok":
            return _failure(record)
        if record["kind"] == "preflight":
            return f"  {name:<15} certified {_peak(record):>24}"
        if name in self.logged:
            return None
        self.logged.add(name)
        latency_ms = statistics.median(medians(record["time_slices"])) * 1e3
        return f"  {name:<15} about {latency_ms:8.3f} ms{_peak(self.history.preflights[name])}"

    def rows(self) -> Iterator[Row]:
        for name in self.names:
            if name in self.history.failures:
                yield Row(name, [""] * len(self.metrics), str(self.history.failures[name]["outcome"]))
                continue
            state = "" if self.history.rounds else "certified" if name in self.history.preflights else "waiting"
            known = {"outcome": "ok", **self._estimates(name)}
            yield Row(name, [format_value(known, metric) if metric.column in known else "" for metric in self.metrics], state)

    def _estimates(self, name: str) -> dict[str, Any]:
        """An attention's columns of the table of results, as far as they are known."""
        known: dict[str, Any] = {}
        if "peak_bytes" in self.history.preflights.get(name, {}):
            known["peak_bytes"] = self.history.preflights[name]["peak_bytes"]
        rounds = list(self.history.medians(Process(name)).values())
        if rounds:
            known |= _estimate("latency", rounds, "_s")
        ratios = self.history.ratios(Process(self.reference), Process(name))
        if rounds and name == self.reference:
            known |= {"speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0}
        elif ratios:
            known |= _estimate("speedup", ratios)
        return known

    def footnote(self) -> str:
        count, reason = self.history.rounds, self.history.stop_reason
        notes = []
        if count:
            notes.append(f"{count} round{'s' if count > 1 else ''}" + (f", ended by {reason}" if reason else ""))
        control = self.history.ratios(Process(self.reference), Process(self.reference, is_control=True))
        if control:
            estimate = format_value({"outcome": "ok", **_estimate("speedup", control)}, SPEEDUP)
            notes.append(f"noise: {self.reference} over itself {estimate}")
        if self.reference not in self.names:
            notes.append(f"no speed-ups: {self.reference} is not among those compared")
        return "; ".join(notes)


def _estimate(name: str, rounds: Sequence[Sequence[float]], unit: str = "") -> dict[str, float]:
    """The median of all rounds and its interval, as columns of a row. A single round has no interval."""
    value, width = statistics.median(value for samples in rounds for value in samples), half_width(rounds)
    low, high = (value, value) if math.isinf(width) else (value / (1 + width), value * (1 + width))
    return {f"{name}{unit}": value, f"{name}_low{unit}": low, f"{name}_high{unit}": high}


def _peak(preflight: Record) -> str:
    return f"{preflight['peak_bytes'] / 2**20:10.2f} MiB" if "peak_bytes" in preflight else f"  {preflight['detail']}"


def _failure(record: Record) -> str:
    return f"  {record['attention']:<15} {record['outcome']}: {record['detail']}"


class TrainingTable(ProgressTable):
    """Accuracy and loss at the learning rate that is best so far."""

    headings = ("runs", "rate", "accuracy", "loss")

    def __init__(self, job: Study) -> None:
        training = job.comparison.training
        self.rates = training.learning_rates
        self.runs_per_attention = len(self.rates) + training.seeds - 1
        self.runs = {candidate.name: job.runs(candidate) for candidate in job.comparison.candidates}

    def add(self, record: Record) -> str | None:
        if record["kind"] != "run":
            return None
        self.runs[record["attention"]].append(record)
        if record["outcome"] != "ok":
            return _failure(record)
        run = f"rate {record['learning_rate']:g}, seed {record['seed']}"
        result = f"accuracy {_accuracy(record):.3f}, loss {record['curve'][-1][1]:.3f}, {record['train_s']:.0f} s"
        return f"  {record['attention']:<15} {run:<24}{result}"

    def rows(self) -> Iterator[Row]:
        for name, runs in self.runs.items():
            good = [run for run in runs if run["outcome"] == "ok"]
            values = [f"{len(good)}/{self.runs_per_attention}", "", "", ""]
            best = best_learning_rate(good, self.rates)
            if best is not None:
                at_best = [run for run in good if run["learning_rate"] == best]
                accuracy = mean_interval([_accuracy(run) for run in at_best])
                loss = statistics.mean(run["validation_loss"] for run in at_best)
                values[1:] = [f"{best:g}", format_mean(accuracy.value, accuracy.low, accuracy.high), f"{loss:.3f}"]
            yield Row(name, values, "" if good else str(runs[-1]["outcome"]) if runs else "waiting")


def _accuracy(run: Record) -> float:
    """Accuracy at the training length."""
    evaluation = run["evaluations"][0]
    return float(sum(evaluation["right"]) / sum(evaluation["targets"]))


class SearchTable(ProgressTable):
    """The longest sequence that fits so far, and the result of the last length that was tried."""

    headings = ("tokens", "peak MiB")

    def __init__(self, job: ContextSearch) -> None:
        self.probes: dict[str, list[Record]] = {candidate.name: [] for candidate in job.comparison.candidates}
        for record in job.records("probe"):
            self.add(record)

    def add(self, record: Record) -> str | None:
        if record["kind"] != "probe":
            return None
        self.probes[record["attention"]].append(record)
        peak = "" if record["peak_bytes"] is None else _peak(record)
        return f"  {record['attention']:<15} {record['seq_len']:>9} tokens{peak}  {record['outcome']}"

    def rows(self) -> Iterator[Row]:
        for name, probes in self.probes.items():
            fitting = [probe for probe in probes if probe["outcome"] == "ok"]
            longest = max(fitting, key=lambda probe: int(probe["seq_len"]), default=None)
            values = ["", ""] if longest is None else [str(longest["seq_len"]), f"{longest['peak_bytes'] / 2**20:.2f}"]
            yield Row(name, values, f"{probes[-1]['seq_len']}: {probes[-1]['outcome']}" if probes else "waiting")
