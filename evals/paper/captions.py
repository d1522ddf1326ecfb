"""Captions of the study's figures: a description, and the command, commit, machine and settings of the data."""

from collections.abc import Sequence
from pathlib import Path

from evals.paper.recipe import step_of
from evals.paper.sources import Source
from evals.paths import BASE

COMMAND = "python -m evals.figures paper"


def caption(name: str, description: str, sources: Sequence[Source], results: Path) -> str:
    """The text of plots/paper/<name>.md; `results` is the folder that contains all sources."""
    parts = "\n\n".join(_origin(source, results) for source in sources)
    return f"# {name}\n\n{description}\n\nDrawn by `{COMMAND}` from:\n\n{parts}\n"


def _origin(source: Source, results: Path) -> str:
    """The origin of one folder's data: from its ledger, or the recipe's commands if the ledger has none."""
    data = source.folder.relative_to(results).as_posix()
    head = f"`{typed_path(results)}/{data}`, begun on {' and '.join(source.days) or 'an unknown day'}"
    step = step_of(data)
    commands = source.commands or (step.lines(typed_path(results)) if step else [])
    facts = {
        "command": [f"`{command}`" for command in commands],
        "commit": source.commits,
        "machine": source.machines,
        "config hash": [", ".join(source.hashes)],
    }
    lines = [f"- {fact}: {value or 'unknown'}" for fact, values in facts.items() for value in values or [""]]
    return "\n".join([head, "", *lines])


def typed_path(folder: Path) -> str:
    """The path of a folder relative to the repository, or absolute outside of it."""
    folder = folder.resolve()
    return (folder.relative_to(BASE) if folder.is_relative_to(BASE) else folder).as_posix()
