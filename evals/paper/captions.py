"""What stands beside a figure: a sentence that says what it draws, and the command, commit, machine and settings of its data."""

from collections.abc import Sequence
from pathlib import Path

from evals.paper.recipe import Step, step_of
from evals.paper.sources import Source
from evals.paths import ROOT

COMMAND = "python -m evals.figures paper"


def caption(name: str, says: str, sources: Sequence[Source], results: Path) -> str:
    """The text of plots/paper/<name>.md. results: the folder that all sources lie in."""
    parts = "\n\n".join(_origin(source, results) for source in sources)
    return f"# {name}\n\n{says}\n\nDrawn by `{COMMAND}` from:\n\n{parts}\n"


def _origin(source: Source, results: Path) -> str:
    """One folder: what the ledger in it says."""
    data = source.folder.relative_to(results).as_posix()
    head = f"`{shown(results)}/{data}`, begun on {' and '.join(source.days) or 'a day that is not known'}"
    facts = {
        "command": _commands(source, step_of(data), results),
        "commit": source.commits,
        "machine": source.machines,
        "config hash": [", ".join(source.hashes)],
    }
    lines = [f"- {what}: {value or 'not known'}" for what, values in facts.items() for value in values or [""]]
    return "\n".join([head, "", *lines])


def _commands(source: Source, step: Step | None, results: Path) -> list[str]:
    """As the ledger has them; where it has none, as the recipe does."""
    return [f"`{command}`" for command in source.commands or (step.lines(shown(results)) if step else [])]


def shown(folder: Path) -> str:
    """The folder as one types it from the repository's root."""
    folder = folder.resolve()
    return (folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder).as_posix()
