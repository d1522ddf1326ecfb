"""`python -m evals.gpu_check`: tests this project on a GPU within ten minutes, and prints a Markdown table for an issue.

It certifies the kernels that run on a GPU only, runs the GPU's tests (in a checkout), measures a short sweep, and compares Triton
with torch. Each step has a time limit of its own, and the next one runs whatever became of it.
Exit code: 0; 1 if a step failed; 2 without a CUDA device.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from evals.cli.command import command
from evals.cli.gpu_steps import BUDGET_S, gpu_steps, machine
from evals.cli.steps import FAILED, markdown, run_steps
from evals.errors import OK, UsageError
from evals.measure.gpu_status import marked


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.gpu_check", description=str(__doc__).partition(": ")[2])
    parser.add_argument("--list", action="store_true", help="print the steps and their commands, and run nothing")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bsbr-gpu-check-") as folder:
        steps = gpu_steps(Path(folder))
        if options.list:
            print(*(f"{step.name}, {step.limit_s:g} s: {step.missing or ' '.join(step.command)}" for step in steps), sep="\n")
            return OK
        if not torch.cuda.is_available():
            raise UsageError(
                "this check needs a CUDA device, and torch sees none; python -m evals.certify checks attentions on a CPU"
            )
        outcomes = []
        for outcome in run_steps(steps, BUDGET_S):
            outcomes.append(outcome)
            print(f"{outcome.step}: {outcome.verdict.outcome}, {outcome.verdict.detail}", file=sys.stderr, flush=True)
    print(markdown(marked("GPU check of bsbr", "cuda"), outcomes, machine()))
    return int(any(outcome.verdict.outcome == FAILED for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
