"""One sequence across several processes: checks a context-parallel attention, times it, and prints the bytes sent.

    torchrun --standalone --nproc-per-node=2 -m evals.context_parallel --seq-len 65536

As a workload of a comparison, on one machine: python -m evals.run sweep=context_parallel
"""

import argparse
import os
import sys
from collections.abc import Sequence

from evals.benchmark.distributed_check import Setup, check_and_time
from evals.cli.command import command
from evals.config import DTYPES
from evals.errors import OK, USAGE

PROGRAM = "torchrun --standalone --nproc-per-node=2 -m evals.context_parallel"


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--attention", default="bsbr", help="a file of conf/attention: bsbr or ring")
    parser.add_argument("--seq-len", type=int, default=16384, help="tokens of the whole sequence")
    parser.add_argument("--hidden-dim", type=int, default=256)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: over gloo; cuda: a GPU each, over NCCL")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--calls", type=int, default=5, help="timed calls, of which the median is printed")
    setup = Setup(**vars(parser.parse_args(arguments)))
    if "RANK" not in os.environ:
        print(f"start it with torchrun, such as: {PROGRAM} --seq-len 65536", file=sys.stderr)
        return USAGE
    return OK if check_and_time(setup) else 1


if __name__ == "__main__":
    sys.exit(main())
