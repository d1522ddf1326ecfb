"""What the study is measured by: conf/paper.yaml, read."""

import shlex
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import yaml

from evals.paths import ROOT

RECIPE = ROOT / "conf" / "paper.yaml"
GPU = "device=cuda"
"""The word that asks for the GPU half."""


@dataclass(frozen=True)
class Step:
    """One folder of results, and the commands that fill it. gpu: what they need more on a GPU; None: they have no such half."""

    data: str
    what: str
    commands: tuple[str, ...]
    gpu: str | None = None

    def lines(self, results: str) -> list[str]:
        """The commands, as one types them, of results that go to this folder."""
        return [command.replace("{results}", shlex.quote(results)) for command in self.commands]


@cache
def recipe(path: Path = RECIPE) -> list[Step]:
    """All steps, in order. Raises ValueError, in one sentence, for a file that is none, or a step that stands there twice."""
    try:
        listed = [Step(**{**step, "commands": tuple(step["commands"])}) for step in yaml.safe_load(path.read_text())]
    except (OSError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} must list steps of data, what, commands and perhaps gpu: {' '.join(str(error).split())}"
        ) from error
    twice = [step.data for number, step in enumerate(listed) if step.data in [one.data for one in listed[:number]]]
    if twice:
        raise ValueError(f"{path} has two steps of data {twice[0]}: give all commands of a folder in one")
    return listed


def step_of(data: str) -> Step | None:
    """The first step whose folder this is, or a pattern such as recall* is of; None if there is none."""
    return next((step for step in recipe() if fnmatch(step.data, data)), None)


def command_of(data: str, results: str) -> str | None:
    """The first command of `step_of` these data, of results that go to this folder; None if there is no step."""
    step = step_of(data)
    return step.lines(results)[0] if step else None
