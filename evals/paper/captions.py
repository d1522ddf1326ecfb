"""Captions of the study's figures: a description, and the command, commit, machine and settings of the data."""

from collections.abc import Sequence
from pathlib import Path

from evals.paper.recipe import Step, step_of
from evals.paper.sources import Source
from evals.paths import ROOT

COMMAND = "python -m evals.figures paper"


def caption(name: str, description: str, sources: Sequence[Source], results: Path) -> str:
    """The text of plots/paper/<name>.md.

    Args:
        name: of the figure.
        description: what it draws.
        sources: the folders that its data come from.
        results: the folder that all of them lie in.
    """
    parts = "\n\n".join(_origin(source, results) for source in sources)
    return f"# {name}\n\n{description}\n\nDrawn by `{COMMAND}` from:\n\n{parts}\n"


def _origin(source: Source, results: Path) -> str:
    """The origin of one folder's data, as its ledger records it."""
    data = source.folder.relative_to(results).as_posix()
    head = f"`{typed_path(results)}/{data}`, begun on {' and '.join(source.days) or 'an unknown day'}"
    facts = {
        "command": _commands(source, step_of(data), results),
        "commit": source.commits,
        "machine": source.machines,
        "config hash": [", ".join(source.hashes)],
    }
    lines = [f"- {fact}: {value or 'unknown'}" for fact, values in facts.items() for value in values or [""]]
    return "\n".join([head, "", *lines])


def _commands(source: Source, step: Step | None, results: Path) -> list[str]:
    """The commands of the ledger, or those of the recipe if the ledger has none."""
    return [f"`{command}`" for command in source.commands or (step.lines(typed_path(results)) if step else [])]


def typed_path(folder: Path) -> str:
    """The path of a folder as one types it in the repository's root."""
    folder = folder.resolve()
    return (folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder).as_posix()
