"""Where child processes come from: a server that has imported what they need, and forks.

Imports nothing but the standard library, so that a command can start it before anything else.
"""

import ctypes
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from types import ModuleType
from typing import Any

PRELOAD = ["evals.benchmark.preload"]

_lock = threading.Lock()


def start() -> None:
    """Lets the server import in the background, while the caller does something else.

    It ends with the thread that started it: this is for the main thread to call before others launch anything.
    """
    with _lock, _hidden_command():
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()


def launch(function: Callable[..., None], *arguments: Any) -> tuple[ForkServerProcess, Connection]:
    """A child that calls `function` with its end of a pipe, then `arguments`; and our end."""
    start()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=function, args=(theirs, *arguments), daemon=True)
    with _lock, _hidden_command():
        process.start()
    theirs.close()
    return process, ours


def end_with_parent() -> None:
    """Has the kernel kill this process when its parent dies (Linux): one that is stopped would not notice by itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


PR_SET_PDEATHSIG = 1


@contextmanager
def _hidden_command() -> Iterator[None]:
    """Children do not see which module the command is: they would each import it again, with all that it imports.

    For evals.run that took 0.4 s a process. What a child is to call must come from a module that has a name, therefore.
    """
    command = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = command
