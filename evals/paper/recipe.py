"""The recipe of the study: the steps of conf/paper.yaml, each a folder of results and the commands that make it."""

import shlex
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import yaml

from evals.paths import ROOT

RECIPE = ROOT / "conf" / "paper.yaml"
GPU = "device=cuda"
"""The argument that selects the GPU half."""


@dataclass(frozen=True)
class Step:
    """One folder of results and the commands that make it.

    Attributes:
        data: path of the folder in results/paper.
        what: what is measured.
        commands: the commands, with {results} in place of the folder of the study.
        gpu: what is added to them on a GPU; None if the step is measured on a CPU only.
    """

    data: str
    what: str
    commands: tuple[str, ...]
    gpu: str | None = None

    def lines(self, results: str) -> list[str]:
        """The commands as one types them, for results in this folder."""
        return [command.replace("{results}", shlex.quote(results)) for command in self.commands]


@cache
def recipe(path: Path = RECIPE) -> list[Step]:
    """Reads all steps, in order. Raises ValueError if the file is invalid or has two steps for one folder."""
    try:
        steps = [Step(**{**step, "commands": tuple(step["commands"])}) for step in yaml.safe_load(path.read_text())]
    except (OSError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} must list steps of data, what, commands and perhaps gpu: {' '.join(str(error).split())}"
        ) from error
    folders = [step.data for step in steps]
    twice = [data for data in folders if folders.count(data) > 1]
    if twice:
        raise ValueError(f"{path} has two steps of data {twice[0]}: give all commands of a folder in one")
    return steps


def step_of(data: str) -> Step | None:
    """The first step whose folder has this name or matches this pattern; None if there is none."""
    return next((step for step in recipe() if fnmatch(step.data, data)), None)


def command_of(data: str, results: str) -> str | None:
    """The first command that makes this folder or pattern; None if there is none."""
    step = step_of(data)
    return step.lines(results)[0] if step else None
