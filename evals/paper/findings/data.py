"""The data of findings: folders of results that the study's page requires, or can do without."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pandas as pd

from evals.paper.captions import typed_path
from evals.paper.findings.text import enumerate_words
from evals.paper.recipe import command_of, step_of
from evals.paper.sources import Source, find_sources
from evals.results.frames import Sweep

OURS = "bsbr"
"""The attention that the study is about."""


@cache
def required_source(results: Path, data: str) -> Source:
    """The folder of these data. Raises ValueError, which names the command that makes it, if it is not there."""
    sources = find_sources(results, data)
    if not sources:
        folder = typed_path(results)
        command = command_of(data, folder)
        raise ValueError(f"{folder}/{data} holds no results, and the study's page needs them; `{command}` makes it")
    return sources[0]


def required_sweep(results: Path, data: str) -> Sweep:
    """The sweep of timings in a folder. Raises ValueError as `required_source`."""
    sweep: Sweep = required_source(results, data).first
    return sweep


def describe_optional(results: Path, data: str, describe: Callable[[Source], str]) -> str:
    """Describes each folder of this name or pattern, or says that it was not measured yet and how to do that."""
    sources = find_sources(results, data)
    if sources:
        return "\n\n".join(map(describe, sources))
    step = step_of(data)
    assert step is not None
    return f"*Not measured yet, {step.what}.* `{step.lines(typed_path(results))[0]}` does it."


def rows_of(sweep: Sweep, name: str) -> pd.DataFrame:
    """The rows of one attention. Raises ValueError if the sweep has none."""
    if name not in sweep.by_attention:
        raise ValueError(f"the study is about {name}, and its results hold {enumerate_words(sweep.by_attention)}")
    return sweep.by_attention[name]
