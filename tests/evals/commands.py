"""A command as a user starts it, but in this process: one of its own takes 15 seconds of a core to import what it needs."""

import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from subprocess import CompletedProcess
from unittest.mock import patch


def call(main: Callable[[], int], *words: str) -> "CompletedProcess[str]":
    """What a command's `main` returns and writes where these words stand behind its name.

    Where its own process is what is tested, its signals, its end or what it imports, start one.
    """
    out, err = StringIO(), StringIO()
    arguments = [f"{main.__module__}.py", *words]
    # A command adds the folders of a user's variants to the path; those of one test are not for the next.
    with patch.object(sys, "argv", arguments), patch.object(sys, "path", [*sys.path]), redirect_stdout(out), redirect_stderr(err):
        code = main()
    return CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
