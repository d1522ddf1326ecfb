"""The wrapper around every command's `main`: a user's mistake, Ctrl-C and a closed pipe become exit codes, not tracebacks."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from evals.errors import BROKEN_PIPE, INTERRUPTED, USAGE, UsageError, one_sentence

P = ParamSpec("P")

RESUME = "interrupted; what was measured is kept, and the same command goes on from there"
"""Message after Ctrl-C in a command that can resume from its records."""


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
                message = f"{error.filename or 'a file'} cannot be used: {error.strerror or error}"
            print(f"error: {message}", file=sys.stderr)
            return USAGE

        return run

    return decorate
