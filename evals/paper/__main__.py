"""`python -m evals.paper`: measures all that the study is made of, and draws it; started again, it goes on where it was.

It runs the commands of conf/paper.yaml one after the other, and stops at the first that fails. Names of data choose some of
them. `results_dir=` and `plots_dir=` say where to (results/paper, plots/paper); `device=cuda` measures the GPU half, into the
folder cuda there. Whatever else is said as key=value goes to every `evals.run`. --dry-run tells what would be done.
Exit code: 0, 2 for what cannot be read, else that of the command that failed.
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
    """The commands that are asked for, as one types them, and the folders of the results and of the plots.

    Raises ValueError, in one sentence, for a name that is no step's, and a step that is not for the GPU that is asked for.
    """
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word]
    steps = {step.data: step for step in recipe()}
    unknown = [name for name in names if name not in steps]
    if unknown:
        raise ValueError(f"unknown data {unknown[0]}; known are {', '.join(steps)}")
    results, plots = (Path(settings.pop(f"{kind}_dir", f"{kind}/paper")) for kind in ("results", "plots"))
    gpu = f"device={settings.pop('device', 'cpu')}" == GPU
    cpu_alone = [name for name in names if gpu and steps[name].gpu is None]
    if cpu_alone:
        raise ValueError(f"{cpu_alone[0]} is measured on a CPU alone: leave out {GPU}, or name {_of_gpu()}")
    own = (results / "cuda" if gpu else results).as_posix()
    more = [*(f"{key}={shlex.quote(value)}" for key, value in settings.items()), *(["--dry-run"] if dry else [])]
    commands = []
    for step in steps.values():
        if (not names or step.data in names) and (step.gpu is not None or not gpu):
            added = [*([step.gpu] if gpu and step.gpu else []), *more]
            commands += [" ".join([line, *added]) if line.startswith(RUN) else line for line in step.lines(own)]
    return commands, results, plots


def _of_gpu() -> str:
    return ", ".join(step.data for step in recipe() if step.gpu is not None)


@command(ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.paper", description=str(__doc__).partition("\n")[0])
    parser.add_argument("words", nargs="*", help="data to measure (default: all), results_dir=, plots_dir=, device=cuda, key=value")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and about how long it takes")
    options = parser.parse_intermixed_args(arguments)
    lines, results, plots = plan(options.words, dry=options.dry_run)
    for line in lines:
        print(f"$ {line}", flush=True)
        if options.dry_run and not line.startswith(RUN):
            continue  # it cannot tell
        code = subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=ROOT, check=False).returncode
        if code:
            return code
    if not options.dry_run:
        from evals.paper.draw import draw_study  # imports matplotlib, which measuring does not need

        print(f"{len(draw_study(results, plots))} files in {plots}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
