"""The training of `python -m evals.run` with every batch shared by several processes, on one machine or many:

    torchrun --standalone --nproc-per-node=2 -m evals.train_ranks sweep=recall device=cuda

Runs go to the same ledger and count for the same table, which `python -m evals.run` with the same words then makes. What a
run cannot survive ends the command: ranks of one run cannot be isolated from each other.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from evals import cli, forkserver
from evals.config import UsageError, read_comparison
from evals.ledger import Ledger
from evals.study import Study, next_run
from evals.train import Progress, first, train
from evals.worker import Result

T = TypeVar("T")


def work_off(cfg: DictConfig) -> None:
    """One Hydra job, on every rank."""
    comparison = read_comparison(cfg, cli.Session.swept)
    if comparison.task is None:
        raise UsageError("only training is shared by ranks: name a sweep that trains, such as sweep=recall, or a task")
    results = Path(cfg.results_dir)
    study = Study(comparison, Ledger(results / str(cfg.sweep_name) / "samples.jsonl"), Ledger(results / "certificates.jsonl"))
    if first():
        study.ledger.append(study.description())
    for contestant in comparison.contestants:
        if _told(lambda: study.objection(contestant)) is not None:  # noqa: B023  it is called at once
            continue
        while (wanted := _told(lambda: next_run(study.runs(contestant), comparison.training))) is not None:  # noqa: B023
            saved = study.saved(contestant, *wanted)
            for told in train(comparison, contestant, study.task, *wanted, saved):
                if first() and isinstance(told, Progress):
                    print(
                        f"{contestant.name}, rate {wanted[0]:g}, seed {wanted[1]}: step {told.step}, loss {told.loss:.3f}",
                        flush=True,
                    )
            if first():
                study.ledger.append(study.record(contestant, *wanted, Result("ok", told)) | {"ranks": dist.get_world_size()})
                saved.unlink(missing_ok=True)


def _told(of_first: Callable[[], T]) -> T:
    """What rank 0 finds: no other rank looks, since what it would see may have changed meanwhile."""
    told = [of_first() if first() else None]
    dist.broadcast_object_list(told)
    return told[0]  # type: ignore[return-value]


def main() -> int:
    if "RANK" not in os.environ:
        print(
            "start it with torchrun, such as: torchrun --standalone --nproc-per-node=2 -m evals.train_ranks sweep=recall",
            file=sys.stderr,
        )
        return 2
    if os.environ["RANK"] == "0":
        forkserver.start()  # for certificates
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo for tensors of the CPU, which small talk is, too.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        return cli.run(work_off)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
