"""Runs a command in this process as a user would start it: a process of its own spends 10 seconds of a core on imports."""

import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from subprocess import CompletedProcess
from unittest.mock import patch


def call(main: Callable[[], int], *words: str) -> "CompletedProcess[str]":
    """Calls a command's `main` with these arguments; returns its exit code and output.

    A test of signals, of a process's end or of what it imports needs a process of its own.
    """
    arguments = [f"{main.__module__}.py", *words]
    with _started(arguments) as done:
        done.returncode = main()
    return done


def typed(*words: str) -> "CompletedProcess[str]":
    """Runs a whole command line, such as `python -m evals.run sweep=seq_len`, given word by word."""
    python, m, module, *others = words
    assert (python, m) == ("python", "-m")
    with _started([module, *others]) as done, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* found in sys.modules", category=RuntimeWarning)  # by a test before this
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            done.returncode = end.code
    return done


@contextmanager
def _started(arguments: list[str]) -> "Iterator[CompletedProcess[str]]":
    done, out, err = CompletedProcess(arguments, 0, "", ""), StringIO(), StringIO()
    # A command adds the folders of a user's variants to the path; those of one test are not for the next.
    with patch.object(sys, "argv", arguments), patch.object(sys, "path", [*sys.path]), redirect_stdout(out), redirect_stderr(err):
        yield done
    done.stdout, done.stderr = out.getvalue(), err.getvalue()
