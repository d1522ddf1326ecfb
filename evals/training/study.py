"""Trains every candidate of a comparison on its task: at each learning rate, and at the best one with every seed."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from evals.benchmark import code_hash
from evals.benchmark.job import Job, ProgressCallback
from evals.config import Candidate, Comparison, Training
from evals.isolation.locks import exclusive_lock
from evals.isolation.worker import Result, Worker
from evals.measure.clock import now
from evals.results.ids import digest
from evals.results.ledger import Ledger, Record
from evals.results.training_runs import best_learning_rate
from evals.training.tasks.base import Task
from evals.training.tasks.build import build_task
from evals.training.trainer import TrainingProgress, train


def next_run(runs: Sequence[Record], training: Training) -> tuple[float, int] | None:
    """The learning rate and seed of the run that one candidate still lacks; None if there is no more to do.

    runs: its records so far. Every learning rate is tried with seed 0; the best of them then has the other seeds.
    """
    made = {(run["learning_rate"], run["seed"]) for run in runs}
    for rate in training.learning_rates:
        if (rate, 0) not in made:
            return rate, 0
    best = best_learning_rate(runs, training.learning_rates)
    if best is None:
        return None
    return next(((best, seed) for seed in range(training.seeds) if (best, seed) not in made), None)


class Study(Job):
    """Works off a comparison with a task. Runs that `ledger` holds are not made again, whichever command made them.

    A run that was killed goes on from its checkpoint. Raises UsageError if the ledger is of a sweep over something else.
    """

    kind = "study"

    def __init__(self, comparison: Comparison, ledger: Ledger, certificates: Ledger) -> None:
        super().__init__(comparison, ledger, certificates)
        self.task: Task = build_task(comparison)
        self.settings = {**comparison.settings, **self.task.facts(), **self.machine}
        trainer = code_hash.modules_digest(
            "evals.training.trainer", "evals.training.optimizer", "evals.benchmark.workloads", "evals.training.tasks.base"
        )
        own = code_hash.modules_digest(type(self.task).__module__)
        lengths = comparison.training.eval_length_multiples
        self.keys = {
            one.name: digest([self.settings, lengths, asdict(one), self.code[one.name], trainer, own])
            for one in comparison.candidates
        }
        self.id = digest([self.keys, comparison.training.learning_rates, comparison.training.seeds])

    def remaining(self) -> tuple[int, float | None]:
        """How many runs there are already, and about how many seconds the others take; None where none was made yet."""
        done = {one.name: self.runs(one) for one in self.comparison.candidates}
        known = [float(run["train_s"]) for runs in done.values() for run in runs if run["outcome"] == "ok"]
        made = sum(map(len, done.values()))
        return made, sum(known) / len(known) * max(0, self._wanted() - made) if known else None

    def run(self, report: ProgressCallback) -> Iterator[Record]:
        """Yields every record as soon as it is in the ledger. Of a main thread."""
        yield self.append(self.description())
        for candidate in self.comparison.candidates:
            report(f"{candidate.name}: certificate", self._part())
            objection = self.objection(candidate)
            if objection is not None:
                yield objection
                continue
            for run in self.runs(candidate):  # one that was killed right after its record was kept
                self.saved(candidate, run["learning_rate"], run["seed"]).unlink(missing_ok=True)
            while (wanted := next_run(self.runs(candidate), self.comparison.training)) is not None:
                yield self.append(self._trained(candidate, *wanted, report))
                self.saved(candidate, *wanted).unlink(missing_ok=True)

    def runs(self, candidate: Candidate) -> list[Record]:
        """What the ledger holds of a candidate's runs."""
        key = self.keys[candidate.name]
        return [record for record in self.ledger.read()[0] if record.get("kind") == "run" and record["run"] == key]

    def objection(self, candidate: Candidate) -> Record | None:
        """The record that says why this candidate is not trained; None if it is certified."""
        certified = self.preflight.certified(candidate)
        if certified.outcome == "ok":
            return None
        known = [record for record in self.runs(candidate) if record["outcome"] == certified.outcome]
        return known[0] if known else self.append(self.run_record(candidate, None, 0, certified))

    def run_record(self, candidate: Candidate, learning_rate: float | None, seed: int, result: Result) -> Record:
        """What the ledger keeps of a run."""
        outcome = {"outcome": result.outcome, "detail": result.detail}
        return {
            "kind": "run",
            "run": self.keys[candidate.name],
            "attention": candidate.name,
            "learning_rate": learning_rate,
            "seed": seed,
            **(result.value if result.outcome == "ok" else outcome),
            "time": now(),
        }

    def saved(self, candidate: Candidate, learning_rate: float, seed: int) -> Path:
        """Where the checkpoint of a run lies until its record is in the ledger."""
        name = f"{candidate.name}-{digest([self.keys[candidate.name], learning_rate, seed])}.safetensors"
        return self.ledger.path.parent / "checkpoints" / name.replace(os.sep, "_")

    def _trained(self, candidate: Candidate, learning_rate: float, seed: int, report: ProgressCallback) -> Record:
        limit_s, saved = self.comparison.sampling.timeout_s, self.saved(candidate, learning_rate, seed)
        arguments = (self.comparison, candidate, self.task, learning_rate, seed, saved)
        steps, done = self.comparison.training.steps, self._part()
        with (
            exclusive_lock(self.comparison.device.kind),
            Worker(train, *arguments, memory_limit_bytes=self.memory_limit_bytes) as worker,
        ):
            result = worker.result(limit_s)
            while result.outcome == "ok" and isinstance(result.value, TrainingProgress):
                step, loss, left_s = result.value
                words = (
                    f"{candidate.name}, rate {learning_rate:g}, seed {seed}: step {step}/{steps}, loss {loss:.3f}, {left_s:.0f} s"
                )
                report(words, done + step / steps / self._wanted())
                result = worker.ask(None, limit_s)
        return self.run_record(candidate, learning_rate, seed, result)

    def _wanted(self) -> int:
        """How many runs there are to be, if all goes well."""
        training = self.comparison.training
        return len(self.comparison.candidates) * (len(training.learning_rates) + training.seeds - 1)

    def _part(self) -> float:
        return min(1.0, sum(len(self.runs(one)) for one in self.comparison.candidates) / self._wanted())

    def description(self) -> Record:
        return super().description() | {
            "candidates": {one.name: {"node": one.node, "ff_dim": one.ff_dim} for one in self.comparison.candidates},
            "runs": self.keys,
            "learning_rates": self.comparison.training.learning_rates,
            "chance": self.task.chance,
            "grouped_by": self.task.grouped_by,
            "unit": self.task.unit,
        }
