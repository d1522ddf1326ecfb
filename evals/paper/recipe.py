"""The recipe of the study: the steps of conf/paper.yaml, each a folder of results and the commands that make it."""

import shlex
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import yaml

from evals.paths import CONF

RECIPE = CONF / "paper.yaml"
GPU = "device=cuda"
"""The argument that selects the GPU half."""


@dataclass(frozen=True)
class Step:
    """One folder of results and the commands that make it."""

    data: str  # path of the folder in results/paper
    what: str  # what is measured
    commands: tuple[str, ...]  # {results} stands for the folder of the study
    gpu: str | None = None  # arguments that they take on a GPU; None if the step is measured on a CPU only

    def lines(self, results: str) -> list[str]:
        """The command lines for results in this folder."""
        return [command.replace("{results}", shlex.quote(results)) for command in self.commands]


@cache
def recipe(path: Path = RECIPE) -> list[Step]:
    """Reads all steps, in order. Raises ValueError if the file is invalid or has two steps for one folder."""
    try:
        steps = [Step(**{**step, "commands": tuple(step["commands"])}) for step in yaml.safe_load(path.read_text(encoding="utf-8"))]
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
    """The first step for a folder of this name or pattern; None for a folder that the recipe does not make."""
    return next((step for step in recipe() if fnmatch(step.data, data)), None)


def command_of(data: str, results: str) -> str:
    """The first command that makes a folder or pattern of the recipe."""
    return next(step.lines(results)[0] for step in recipe() if fnmatch(step.data, data))
