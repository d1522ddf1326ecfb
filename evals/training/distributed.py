"""TODO: what lives here."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from evals.config import Comparison
from evals.errors import UsageError
from evals.isolation.worker import Result
from evals.results.ledger import Ledger
from evals.training.study import Study, next_run
from evals.training.trainer import TrainingProgress, is_first_rank, train

T = TypeVar("T")


def work_off(comparison: Comparison, results: Path) -> None:
    """One Hydra job, on every rank."""
    if comparison.task is None:
        raise UsageError("only training is shared by ranks: name a sweep that trains, such as sweep=recall, or a task")
    study = Study(comparison, Ledger(results / comparison.sweep / "samples.jsonl"), Ledger(results / "certificates.jsonl"))
    if is_first_rank():
        study.ledger.append(study.description())
    for candidate in comparison.candidates:
        if _told(lambda: study.objection(candidate)) is not None:  # noqa: B023  it is called at once
            continue
        while (wanted := _told(lambda: next_run(study.runs(candidate), comparison.training))) is not None:  # noqa: B023
            saved = study.saved(candidate, *wanted)
            for told in train(comparison, candidate, study.task, *wanted, saved):
                if is_first_rank() and isinstance(told, TrainingProgress):
                    print(
                        f"{candidate.name}, rate {wanted[0]:g}, seed {wanted[1]}: step {told.step}, loss {told.loss:.3f}",
                        flush=True,
                    )
            if is_first_rank():
                study.ledger.append(study.run_record(candidate, *wanted, Result("ok", told)) | {"ranks": dist.get_world_size()})
                saved.unlink(missing_ok=True)


def _told(of_first: Callable[[], T]) -> T:
    """What rank 0 finds: no other rank looks, since what it would see may have changed meanwhile."""
    told = [of_first() if is_first_rank() else None]
    dist.broadcast_object_list(told)
    return told[0]  # type: ignore[return-value]
