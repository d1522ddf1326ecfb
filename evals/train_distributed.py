"""Trains the candidates of a sweep with several processes that share every batch, on one machine or many.

    torchrun --standalone --nproc-per-node=2 -m evals.train_distributed sweep=recall device=cuda

The runs go to the same ledger as those of `python -m evals.run`, which makes the table if it is given the same arguments. A run
that crashes ends the command, because the processes of one run cannot be isolated from each other.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from evals.cli import hydra_app
from evals.cli.command import RESUME, command
from evals.cli.jobs import read_job
from evals.errors import USAGE
from evals.isolation import forkserver
from evals.training.distributed import train_comparison


@command(interrupted=RESUME)
def main() -> int:
    if "RANK" not in os.environ:
        print(
            "start it with torchrun, such as: torchrun --standalone --nproc-per-node=2 -m evals.train_distributed sweep=recall",
            file=sys.stderr,
        )
        return USAGE
    if os.environ["RANK"] == "0":
        forkserver.start()  # certificates are made in processes of their own
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo sends tensors and objects of the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        return hydra_app.run(lambda job: train_comparison(read_job(job.cfg, job.varied), Path(job.cfg.results_dir)))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
