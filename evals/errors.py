"""Errors that a user can cause, the wording of their messages, and the exit codes of the commands."""

import difflib
import importlib
from collections.abc import Iterable

OK, USAGE, INCOMPLETE, INTERRUPTED, BROKEN_PIPE = 0, 2, 3, 130, 141
"""Exit codes: done; the user's mistake; done, but some row has no number; Ctrl-C; the reader closed the pipe."""


class UsageError(ValueError):
    """Something the user asked for cannot be: one sentence, said without a traceback, exit code 2."""


def not_found(target: str) -> str:
    """Why there is no such class, in words."""
    module, _, name = target.rpartition(".")
    try:
        there = vars(importlib.import_module(module))
    except Exception as error:  # noqa: BLE001  importing runs anybody's code
        return (
            f"module {module} cannot be imported: {type(error).__name__}: {one_sentence(error)}; "
            "a module of your own lies in the folder of --config-dir, or beside it"
        )
    return f"module {module} has no {name}{did_you_mean(name, there)}"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """What to put behind `given`, which is unknown; empty where nothing is like it."""
    like = difflib.get_close_matches(given, list(known), n=1, cutoff=0.7)
    return f" (did you mean {like[0]}?)" if like else ""


def one_sentence(error: BaseException) -> str:
    """An error's message on one line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
