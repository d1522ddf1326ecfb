"""The training of `python -m evals.run` with every batch shared by several processes, on one machine or many:

    torchrun --standalone --nproc-per-node=2 -m evals.train_distributed sweep=recall device=cuda

Runs go to the same ledger and count for the same table, which `python -m evals.run` with the same words then makes. What a
run cannot survive ends the command: ranks of one run cannot be isolated from each other.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from evals.cli import hydra_app
from evals.cli.command import RESUME, command
from evals.cli.jobs import read_job
from evals.isolation import forkserver
from evals.training.distributed import train_comparison


@command(interrupted=RESUME)
def main() -> int:
    if "RANK" not in os.environ:
        print(
            "start it with torchrun, such as: torchrun --standalone --nproc-per-node=2 -m evals.train_distributed sweep=recall",
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
        session = hydra_app.Session()
        return hydra_app.run(lambda cfg: train_comparison(read_job(cfg, session.swept), Path(cfg.results_dir)), session=session)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
