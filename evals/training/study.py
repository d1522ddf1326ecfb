"""Trains every candidate of a comparison on its task: once at each learning rate, then at the best one with the other seeds."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evals.benchmark import code_hash
from evals.benchmark.certificates import Certificates
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

TRAINER_MODULES = (
    *("evals.training.trainer", "evals.training.loss", "evals.training.optimizer"),
    *("evals.benchmark.modules", "evals.training.tasks.base"),
)
"""Modules that determine the result of a training run: a run is repeated if their code changes."""


def next_run(runs: Sequence[Record], training: Training) -> tuple[float, int] | None:
    """Learning rate and seed of the next run of a candidate, given the records of its runs; None after the last run.

    Every learning rate is tried with seed 0; the best of them is then trained with the other seeds.
    """
    done = {(run["learning_rate"], run["seed"]) for run in runs}
    best = best_learning_rate(runs, training.learning_rates)
    planned = [(rate, 0) for rate in training.learning_rates]
    planned += [(best, seed) for seed in range(training.seeds)] if best is not None else []
    return next((run for run in planned if run not in done), None)


def run_key(candidate: Candidate, code: str, task: Task, settings: dict[str, Any], eval_length_multiples: Sequence[int]) -> str:
    """Key of a candidate's training runs in the ledger, together with the learning rate and the seed.

    Args:
        candidate: its node and its own ff_dim count.
        code: digest of the attention's source code.
        task: its source code counts; its options are among the settings.
        settings: conditions of the runs, as columns of the table.
        eval_length_multiples: lengths of evaluation, as multiples of that of training.

    Returns:
        16 hexadecimal digits.
    """
    trainer = code_hash.modules_digest(*TRAINER_MODULES)
    task_code = code_hash.modules_digest(type(task).__module__)
    return digest([settings, eval_length_multiples, asdict(candidate), code, trainer, task_code])


class Study(Job):
    """Training of all candidates on the comparison's task.

    Runs that the ledger holds are not made again, whichever command made them. A run that was killed continues from its checkpoint.

    Attributes:
        task: what is learned, at the length of training.
        keys: for each candidate, the key of its runs in the ledger.
    """

    kind = "study"

    def __init__(self, comparison: Comparison, ledger: Ledger, certificates: Certificates) -> None:
        super().__init__(comparison, ledger, certificates)
        training = comparison.training
        self.task = build_task(comparison)
        self.settings = {**comparison.settings, **self.task.extra_settings(), **self.machine}
        self.keys = {
            one.name: run_key(one, self.code[one.name], self.task, self.settings, training.eval_length_multiples)
            for one in comparison.candidates
        }
        self.id = digest([self.keys, training.learning_rates, training.seeds])

    def remaining(self) -> tuple[int, float | None]:
        """Number of runs done, and estimated seconds of the others; None if none has ended well yet."""
        done = [run for candidate in self.comparison.candidates for run in self.runs(candidate)]
        seconds = [float(run["train_s"]) for run in done if run["outcome"] == "ok"]
        left = max(0, self._num_planned() - len(done))
        return len(done), sum(seconds) / len(seconds) * left if seconds else None

    def is_complete(self) -> bool:
        training = self.comparison.training
        return bool(self.records("study")) and all(next_run(self.runs(one), training) is None for one in self.comparison.candidates)

    def run(self, report: ProgressCallback) -> Iterator[Record]:
        """Trains what is left; yields each record once it is in the ledger. Must run in the main thread."""
        yield self.append(self.description())
        for candidate in self.comparison.candidates:
            report(f"{candidate.name}: certificate", self._share_done())
            failure = self.certificate_failure(candidate)
            if failure is not None:
                yield failure
                continue
            for run in self.runs(candidate):  # a command may have been killed between the record and this
                self.checkpoint_path(candidate, run["learning_rate"], run["seed"]).unlink(missing_ok=True)
            while (planned := next_run(self.runs(candidate), self.comparison.training)) is not None:
                yield self.append(self._train(candidate, *planned, report))
                self.checkpoint_path(candidate, *planned).unlink(missing_ok=True)

    def runs(self, candidate: Candidate) -> list[Record]:
        """Records of a candidate's runs that the ledger holds."""
        key = self.keys[candidate.name]
        return [record for record in self.ledger.read()[0] if record.get("kind") == "run" and record["run"] == key]

    def certificate_failure(self, candidate: Candidate) -> Record | None:
        """Record of why a candidate is not trained, which is also in the ledger; None if the candidate is certified."""
        certified = self.preflight.certify(candidate)
        if certified.outcome == "ok":
            return None
        known = [record for record in self.runs(candidate) if record["outcome"] == certified.outcome]
        return known[0] if known else self.append(self.run_record(candidate, None, 0, certified))

    def run_record(self, candidate: Candidate, learning_rate: float | None, seed: int, result: Result[Any]) -> Record:
        """Record of a run: the fields that `train` ended with, or why there are none."""
        return {
            "kind": "run",
            "run": self.keys[candidate.name],
            "attention": candidate.name,
            "learning_rate": learning_rate,
            "seed": seed,
            **(result.value if result.outcome == "ok" else {"outcome": result.outcome, "detail": result.detail}),
            "time": now(),
        }

    def checkpoint_path(self, candidate: Candidate, learning_rate: float, seed: int) -> Path:
        """File of a run's checkpoint, which exists until the run's record is in the ledger."""
        name = f"{candidate.name}-{digest([self.keys[candidate.name], learning_rate, seed])}.safetensors"
        return self.ledger.path.parent / "checkpoints" / name.replace(os.sep, "_")

    def description(self) -> Record:
        """Record of what is compared and trained, under which settings, and on which machine."""
        return super().description() | {
            "candidates": {one.name: {"node": one.node, "ff_dim": one.ff_dim} for one in self.comparison.candidates},
            "runs": self.keys,
            "learning_rates": self.comparison.training.learning_rates,
            "chance": self.task.chance,
            "grouped_by": self.task.grouped_by,
            "unit": self.task.unit,
        }

    def _train(self, candidate: Candidate, learning_rate: float, seed: int, report: ProgressCallback) -> Record:
        """Trains one run in a worker process; returns its record."""
        timeout_s, steps = self.comparison.sampling.timeout_s, self.comparison.training.steps
        name, done, share = f"{candidate.name}, rate {learning_rate:g}, seed {seed}", self._share_done(), 1 / self._num_planned()
        path = self.checkpoint_path(candidate, learning_rate, seed)
        arguments = (self.comparison, candidate, self.task, learning_rate, seed, path)
        with (
            exclusive_lock(self.comparison.device.kind),
            Worker(train, *arguments, memory_limit_bytes=self.memory_limit_bytes) as worker,
        ):
            result = worker.result(timeout_s)
            while result.outcome == "ok" and isinstance(result.value, TrainingProgress):
                step, loss, remaining_s = result.value
                report(f"{name}: step {step}/{steps}, loss {loss:.3f}, {remaining_s:.0f} s", done + share * step / steps)
                result = worker.ask(None, timeout_s)
        return self.run_record(candidate, learning_rate, seed, result)

    def _num_planned(self) -> int:
        """Number of runs, if all end well."""
        training = self.comparison.training
        return len(self.comparison.candidates) * (len(training.learning_rates) + training.seeds - 1)

    def _share_done(self) -> float:
        return min(1.0, sum(len(self.runs(one)) for one in self.comparison.candidates) / self._num_planned())
