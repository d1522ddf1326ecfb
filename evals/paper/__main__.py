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
from pathlib import Path

from evals.cli.command import command
from evals.errors import OK
from evals.paper.recipe import GPU, recipe
from evals.paths import ROOT

RUN = "python -m evals.run "


def plan(words: Sequence[str], *, dry: bool = False) -> tuple[list[str], Path, Path]:
    """Plans the commands.

    Args:
        words: names of data, and key=value.
        dry: adds --dry-run to the commands.

    Returns:
        The command lines, the folder of the results, and the folder of the figures.

    Raises:
        ValueError: for an unknown name, or a step that is not measured on a GPU if one is requested.
    """
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word]
    steps = {step.data: step for step in recipe()}
    unknown = [name for name in names if name not in steps]
    if unknown:
        raise ValueError(f"unknown data {unknown[0]}; known are {', '.join(steps)}")
    results, plots = (Path(settings.pop(f"{kind}_dir", f"{kind}/paper")) for kind in ("results", "plots"))
    gpu = f"device={settings.pop('device', 'cpu')}" == GPU
    cpu_only = [name for name in names if gpu and steps[name].gpu is None]
    if cpu_only:
        on_gpu = ", ".join(step.data for step in recipe() if step.gpu is not None)
        raise ValueError(f"{cpu_only[0]} is measured on a CPU only: leave out {GPU}, or name {on_gpu}")
    folder = (results / "cuda" if gpu else results).as_posix()
    more = [*(f"{key}={shlex.quote(value)}" for key, value in settings.items()), *(["--dry-run"] if dry else [])]
    commands = []
    for step in steps.values():
        if (not names or step.data in names) and (step.gpu is not None or not gpu):
            added = [*([step.gpu] if gpu and step.gpu else []), *more]
            commands += [" ".join([line, *added]) if line.startswith(RUN) else line for line in step.lines(folder)]
    return commands, results, plots


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
        code = subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=ROOT, check=False).returncode
        if code:
            return code
    if not options.dry_run:
        from evals.paper.draw import draw_study  # imports matplotlib, which measuring does not need

        print(f"{len(draw_study(results, plots))} files in {plots}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
