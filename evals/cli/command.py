"""The wrapper around every command's `main`: a user's mistake, Ctrl-C and a closed pipe become exit codes, not tracebacks."""

import codecs
import io
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from bsbr.import_path import prefer_ours
from evals.errors import BROKEN_PIPE, INTERRUPTED, USAGE, UsageError, describe_os_error, one_sentence

P = ParamSpec("P")

PLAIN = {"±": "+-", "×": "x", "µ": "u", "…": "...", "–": "-", "−": "-", "φ": "phi", "✓": "+", "✗": "-"}
"""Spellings for terminals that cannot show a character; others become a question mark."""

RESUME = "interrupted; what was measured is kept, and the same command goes on from there"
"""Message after Ctrl-C in a command that can resume from its records."""


def write_any_character() -> None:
    """Lets both streams replace characters that their encoding lacks, as in a locale without UTF-8, instead of raising."""
    codecs.register_error("plain", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end


def command(*mistakes: type[Exception], interrupted: str = "interrupted") -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorates the `main` of a command.

    Args:
        mistakes: exceptions that, besides UsageError and OSError, mean a mistake of the user in this command.
        interrupted: what Ctrl-C prints on standard error.

    Returns:
        A decorator. The decorated function returns what `main` returns, or 2 after "error: <one sentence>" on standard
        error, 130 after Ctrl-C, 141 if the reader of the output, such as `head`, has closed the pipe.
    """
    expected: tuple[type[Exception], ...] = (UsageError, *mistakes)

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            write_any_character()
            for note in prefer_ours():
                print(f"note: {note}", file=sys.stderr)
            try:
                try:
                    return main(*args, **kwargs)
                finally:
                    sys.stdout.flush()  # argparse's --help, too, leaves its text in a buffer and exits
            except BrokenPipeError:
                # Python flushes both streams once more at its exit, and would print a traceback then.
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                return BROKEN_PIPE
            except KeyboardInterrupt:
                print(interrupted, file=sys.stderr)
                return INTERRUPTED
            except expected as error:
                message = one_sentence(error)
            except OSError as error:
                message = describe_os_error(error)
            print(f"error: {message}", file=sys.stderr)
            return USAGE

        return run

    return decorate
