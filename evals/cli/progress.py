"""What is known of every attention of a comparison while it is worked on: a table that fills, and a line for each that comes."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from evals.benchmark.job import Job
from evals.benchmark.max_context import ContextSearch
from evals.config import Comparison
from evals.results.formatting import QUANTITIES, format_mean, format_value
from evals.results.history import History, Process
from evals.results.ledger import Record
from evals.results.training_runs import best_learning_rate
from evals.stats.intervals import half_width, mean_interval, medians
from evals.training.study import Study


class Board(Protocol):
    @property
    def heads(self) -> Sequence[str]:
        """Of the columns of figures, behind that of the names."""

    def add(self, record: Record) -> str | None:
        """Takes in what was measured, and tells of it in a line, where it is worth one."""

    def rows(self) -> Iterator[tuple[str, list[str], str]]:
        """For every attention its name, its figures, and in a word or two how far it is."""

    def note(self) -> str:
        """What is to be said of all of them together; empty if nothing is."""


def board(job: Job, comparison: Comparison, records: Sequence[Record]) -> Board:
    """What a job's table shows. records: all that the ledger holds already."""
    if isinstance(job, Study):
        return Learned(job, comparison)
    if isinstance(job, ContextSearch):
        return Searched(job, comparison, records)
    return Timed(job, comparison, records)


class Timed:
    """Latencies and speed-ups, whose intervals are those by which it is decided whether there is another round.

    They cost microseconds, unlike the bootstrap of the final table, for which the next round would have to wait.
    """

    def __init__(self, job: Job, comparison: Comparison, records: Sequence[Record]) -> None:
        self.names = [one.name for one in comparison.candidates]
        self.reference = comparison.relative_to
        self.quantities = [one for one in QUANTITIES if one.column != "speedup" or self.reference in self.names]
        self.quantities = [one for one in self.quantities if one.column != "sent_bytes"]
        self.heads = [one.name for one in self.quantities]
        self.history = History(records, job.id)
        self.told: set[str] = set()

    def add(self, record: Record) -> str | None:
        self.history.add(record)
        name = record.get("attention")
        if name is None or record.get("is_control"):
            return None
        if record["outcome"] != "ok":
            return failed(record)
        if record["kind"] == "preflight" or name in self.told:
            return None
        self.told.add(name)
        return first_row(record, self.history.preflights[name])

    def rows(self) -> Iterator[tuple[str, list[str], str]]:
        for name in self.names:
            failure = self.history.failures.get(name)
            state = "" if self.history.rounds else "certified" if name in self.history.preflights else "waits"
            if failure is not None:
                state = str(failure["outcome"])
            known = {"outcome": "ok", **self._known(name)}
            figures = [format_value(known, one) if one.column in known else "" for one in self.quantities]
            yield name, figures if failure is None else [""] * len(figures), state

    def _known(self, name: str) -> dict[str, Any]:
        known: dict[str, Any] = {}
        if "peak_bytes" in self.history.preflights.get(name, {}):
            known["peak_bytes"] = self.history.preflights[name]["peak_bytes"]
        rounds = list(self.history.medians(Process(name)).values())
        if rounds:
            known |= _estimate("latency", rounds, "_s")
        ratios = self.history.ratios(Process(self.reference), Process(name))
        if name == self.reference:
            known |= {"speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0} if rounds else {}
        elif ratios:
            known |= _estimate("speedup", ratios)
        return known

    def note(self) -> str:
        rounds = self.history.rounds
        told = [f"{rounds} round{'s' if rounds > 1 else ''}"] if rounds else []
        if rounds and self.history.stop_reason:
            told[0] += f", ended by {self.history.stop_reason}"
        noise = self.history.ratios(Process(self.reference), Process(self.reference, is_control=True))
        if noise:
            itself = {"outcome": "ok", **_estimate("speedup", noise)}
            told.append(f"noise: {self.reference} over itself {format_value(itself, QUANTITIES[1])}")
        if self.reference not in self.names:
            told.append(f"no speed-ups: {self.reference} is not among those compared")
        return "; ".join(told)


def _estimate(name: str, rounds: Sequence[Sequence[float]], unit: str = "") -> dict[str, float]:
    """The median and its interval, as columns of a row. Of a single round, no interval."""
    value, width = statistics.median(value for one in rounds for value in one), half_width(rounds)
    low, high = (value, value) if math.isinf(width) else (value / (1 + width), value * (1 + width))
    return {f"{name}{unit}": value, f"{name}_low{unit}": low, f"{name}_high{unit}": high}


class Learned:
    """Accuracy and loss at the learning rate that is best so far."""

    heads = ("runs", "rate", "accuracy", "loss")

    def __init__(self, job: Study, comparison: Comparison) -> None:
        self.rates = comparison.training.learning_rates
        self.wanted = len(self.rates) + comparison.training.seeds - 1
        self.runs = {one.name: job.runs(one) for one in comparison.candidates}

    def add(self, record: Record) -> str | None:
        if record["kind"] != "run":
            return None
        self.runs[record["attention"]].append(record)
        return trained(record)

    def rows(self) -> Iterator[tuple[str, list[str], str]]:
        for name, runs in self.runs.items():
            good = [run for run in runs if run["outcome"] == "ok"]
            figures = [f"{len(good)}/{self.wanted}", "", "", ""]
            best = best_learning_rate(good, self.rates)
            if best is not None:
                own = [run for run in good if run["learning_rate"] == best]
                accuracy = mean_interval([_accuracy(run) for run in own])
                loss = statistics.mean(run["validation_loss"] for run in own)
                figures[1:] = [f"{best:g}", format_mean(accuracy.value, accuracy.low, accuracy.high), f"{loss:.3f}"]
            yield name, figures, "" if good else str(runs[-1]["outcome"]) if runs else "waits"

    def note(self) -> str:
        return ""


class Searched:
    """The longest sequence that fits so far, and what came of the last one that was tried."""

    heads = ("tokens", "peak MiB")

    def __init__(self, job: ContextSearch, comparison: Comparison, records: Sequence[Record]) -> None:
        self.probes: dict[str, list[Record]] = {one.name: [] for one in comparison.candidates}
        for record in records:
            if record.get("search") == job.id:
                self.add(record)

    def add(self, record: Record) -> str | None:
        if record["kind"] != "probe":
            return None
        self.probes[record["attention"]].append(record)
        return probe(record)

    def rows(self) -> Iterator[tuple[str, list[str], str]]:
        for name, probes in self.probes.items():
            longest = max((one for one in probes if one["outcome"] == "ok"), key=lambda one: int(one["seq_len"]), default=None)
            figures = ["", ""] if longest is None else [str(longest["seq_len"]), f"{longest['peak_bytes'] / 2**20:.2f}"]
            yield name, figures, f"{probes[-1]['seq_len']}: {probes[-1]['outcome']}" if probes else "waits"

    def note(self) -> str:
        return ""


# --- a line for each --------------------------------------------------------------------------------


def failed(record: Record) -> str:
    return f"  {record['attention']:<15} {record['outcome']}: {record['detail']}"


def first_row(latency: Record, trial: Record) -> str:
    """What an attention's first round gave."""
    seconds = statistics.median(medians(latency["time_slices"]))
    held = f"{trial['peak_bytes'] / 2**20:10.2f} MiB" if "peak_bytes" in trial else f"  {trial['detail']}"
    return f"  {latency['attention']:<15} about {seconds * 1e3:8.3f} ms{held}"


def probe(tried: Record) -> str:
    """One length of a search, and whether it fits."""
    held = "" if tried["peak_bytes"] is None else f"{tried['peak_bytes'] / 2**20:10.2f} MiB"
    return f"  {tried['attention']:<15} {tried['seq_len']:>9} tokens{held}  {tried['outcome']}"


def trained(run: Record) -> str:
    """One training run: how well it does where it was trained."""
    if run["outcome"] != "ok":
        return failed(run)
    place = f"rate {run['learning_rate']:g}, seed {run['seed']}"
    told = f"accuracy {_accuracy(run):.3f}, loss {run['curve'][-1][1]:.3f}, {run['train_s']:.0f} s"
    return f"  {run['attention']:<15} {place:<24}{told}"


def _accuracy(run: Record) -> float:
    asked = run["evaluations"][0]
    return float(sum(asked["right"]) / sum(asked["targets"]))
