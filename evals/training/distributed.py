"""Trains a comparison with several processes that share every batch, under torch.distributed."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from evals.benchmark.certificates import Certificates
from evals.config import Candidate, Comparison
from evals.errors import UsageError
from evals.isolation.worker import Result
from evals.results.ledger import Ledger
from evals.training.study import Study, next_run
from evals.training.trainer import TrainingProgress, is_first_rank, train

T = TypeVar("T")


def train_comparison(comparison: Comparison, results_dir: Path) -> None:
    """Trains all candidates of a comparison in this process group; rank 0 writes the records to the ledger.

    Raises:
        UsageError: if the comparison has no task.
    """
    if comparison.task is None:
        raise UsageError("only training is shared by ranks: name a sweep that trains, such as sweep=recall, or a task")
    ledger = Ledger(results_dir / comparison.sweep / "samples.jsonl")
    study = Study(comparison, ledger, Certificates(results_dir / "certificates.jsonl"))
    if is_first_rank():
        study.append(study.description())
    for candidate in comparison.candidates:
        if _from_first_rank(lambda: study.certificate_failure(candidate)) is not None:  # noqa: B023  called at once
            continue
        while (planned := _from_first_rank(lambda: next_run(study.runs(candidate), comparison.training))) is not None:  # noqa: B023
            _train_run(study, candidate, *planned)


def _train_run(study: Study, candidate: Candidate, learning_rate: float, seed: int) -> None:
    path = study.checkpoint_path(candidate, learning_rate, seed)
    name = f"{candidate.name}, rate {learning_rate:g}, seed {seed}"
    for event in train(study.comparison, candidate, study.task, learning_rate, seed, path):
        if not is_first_rank():
            continue
        if isinstance(event, TrainingProgress):
            print(f"{name}: step {event.step}, loss {event.loss:.3f}", flush=True)
        else:
            record = study.run_record(candidate, learning_rate, seed, Result("ok", event))
            study.append(record | {"ranks": dist.get_world_size()})
            path.unlink(missing_ok=True)


def _from_first_rank(compute: Callable[[], T]) -> T:
    """Computes a value on rank 0 and sends it to all ranks, which could read different versions of the same file."""
    values = [compute() if is_first_rank() else None]
    dist.broadcast_object_list(values)
    return values[0]  # type: ignore[return-value]
