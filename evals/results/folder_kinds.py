"""The kinds of result folders, and which command can use which."""

from pathlib import Path

from evals.errors import UsageError
from evals.results.schema import kind_of

CONTENTS = {
    "latency": "timings",
    "accuracy": "training runs",
    "max_context": "searches for the longest context",
    "conversion": "conversions of pretrained models",
}
"""What a folder of each kind holds."""

USERS = {
    "latency": ("claim", "compare", "export", "figures", "merge", "report", "tables"),
    "accuracy": ("export", "figures", "merge", "report", "tables"),
    "max_context": ("export", "figures", "merge", "report", "tables"),
    "conversion": ("export", "figures", "tables"),
}
"""The commands that can use a folder of each kind."""


def check_folder(folder: Path, command: str) -> str:
    """Returns the kind of a result folder.

    Args:
        folder: the folder.
        command: the name of the command that is to use it, such as compare.

    Raises:
        UsageError: if it is no result folder, or if the command cannot use folders of its kind; the sentence says what can be done.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise UsageError(f"{folder} {_what_it_is(folder)}; give a folder that evals.run wrote, such as results/seq_len")
    kind = kind_of(path)
    if command not in USERS[kind]:
        users = ", ".join(f"evals.{user}" for user in USERS[kind])
        raise UsageError(f"{folder} holds {CONTENTS[kind]}, which evals.{command} cannot use; use {users}")
    return kind


def _what_it_is(folder: Path) -> str:
    if not folder.is_dir():
        return "is a file" if folder.exists() else "does not exist"
    if (folder / "samples.jsonl").is_file():
        return f"holds raw samples, and no results.csv, which `python -m evals.tables {folder}` makes"
    below = sorted(str(path.parent) for path in folder.glob("*/results.csv"))
    return f"holds no results.csv{f', but {len(below)} folders do, such as {below[0]}' if below else ''}"
