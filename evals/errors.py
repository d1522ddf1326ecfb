"""Errors that a user can cause, the wording of their messages, and the exit codes of the commands."""

import difflib
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

OK, BUG, USAGE, INCOMPLETE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141
EXIT_CODES = {
    OK: "every row has a number, or the requested text was printed",
    BUG: "a bug in this program, with a traceback",
    USAGE: "the command cannot do what was asked; one sentence on standard error says why",
    INCOMPLETE: "all work is done, but a row has no number, as its outcome is not ok, or an output could not be made",
    INTERRUPTED: "Ctrl-C; the same command continues",
    BROKEN_PIPE: "the program that reads the output, such as head, closed the pipe",
}
"""The meanings of the exit codes, for `--help` and the documentation."""


class UsageError(ValueError):
    """Request of the user that cannot be met; printed as one sentence without a traceback, with exit code `USAGE`."""


def not_found(target: str) -> str:
    """Explains why the class with this full dotted name cannot be imported, with a suggestion if a similar name exists."""
    module, _, name = target.rpartition(".")
    try:
        known = vars(importlib.import_module(module))
    except Exception as error:  # noqa: BLE001  importing a user's module can raise anything
        return (
            f"module {module} cannot be imported: {type(error).__name__}: {one_sentence(error)}; "
            "a module of your own lies in the folder of --config-dir, or beside it"
        )
    return f"module {module} has no {name}{did_you_mean(name, known)}"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Suggests the known name most similar to `given`, as ` (did you mean …?)`; empty if none is similar."""
    similar = difflib.get_close_matches(given, list(known), n=1, cutoff=0.7)
    return f" (did you mean {similar[0]}?)" if similar else ""


def describe_os_error(error: OSError) -> str:
    """What cannot be used, and why: "results/x.csv cannot be used: No space left on device"."""
    return f"{error.filename or 'a file'} cannot be used: {error.strerror or one_sentence(error)}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of a file to an OSError that lacks it, as that of a write to a full disk does."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def one_sentence(error: BaseException) -> str:
    """An error's message on one line; the name of its type if it has no message."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
