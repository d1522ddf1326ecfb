"""`python -m evals.paper`: measures and draws the whole study; a second start resumes an interrupted one.

It runs the commands of conf/paper.yaml one after the other and stops at the first that fails. Names of data select some of
them. `results_dir=` and `plots_dir=` are the folders of the output (results/paper, plots/paper); `device=cuda` measures the GPU
half, into the folder cuda in it. Every other key=value is passed to each `evals.run`. --dry-run prints what would be done.
Exit code: 0, 2 for a wrong argument, else that of the command that failed.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence

from evals.cli.command import command
from evals.errors import OK
from evals.paper.plan import RUN, plan
from evals.paths import BASE


@command(ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the planned commands and draws the study; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m evals.paper", description=str(__doc__).partition("\n")[0])
    parser.add_argument("words", nargs="*", help="data to measure (default: all), results_dir=, plots_dir=, device=cuda, key=value")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and about how long it takes")
    options = parser.parse_intermixed_args(arguments)
    lines, results, plots = plan(options.words, dry=options.dry_run)
    for line in lines:
        print(f"$ {line}", flush=True)
        if options.dry_run and not line.startswith(RUN):
            continue  # it has no --dry-run
        module, *words = shlex.split(line)[2:]
        # By `bsbr`, which finds our evals where the folder has another.
        code = subprocess.run(
            [sys.executable, "-m", "bsbr", module.removeprefix("evals."), *words], cwd=BASE, check=False
        ).returncode
        if code:
            return code
    if not options.dry_run:
        from evals.paper.draw import draw_study  # imports matplotlib, which measuring does not need

        print(f"{len(draw_study(results, plots))} files in {plots}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
