"""Plans the commands that measure the study, or a part of it, on a CPU or a GPU."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from evals.paper.recipe import GPU, recipe

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
