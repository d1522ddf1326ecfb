"""The fork server: imports the modules that worker processes need, and forks each worker.

This module imports nothing but the standard library, so that a command can start the server before anything else.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, util
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from evals.isolation.scratch import scratch_folder

PRELOAD = ("evals.benchmark.preload",)
PR_SET_PDEATHSIG = 1

_main_module_lock = threading.Lock()
"""Held while sys.modules["__main__"] is replaced, which threads that start workers share."""


def start(preload: Sequence[str] = PRELOAD) -> None:
    """Starts the server, which imports in the background; does nothing if it runs.

    The server ends with the thread that started it: the main thread must call this before other threads launch anything.
    """
    with _main_module_lock, _hidden_command():
        _put_socket_into(scratch_folder())
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
        with _same_path():
            forkserver.ensure_running()


def launch(function: Callable[..., None], *arguments: Any) -> tuple[ForkServerProcess, Connection]:
    """Starts a child that calls `function(connection, *arguments)`; returns its process and the other end of the connection."""
    start()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=function, args=(theirs, *arguments), daemon=True)
    with _main_module_lock, _hidden_command():
        process.start()
    theirs.close()
    return process, ours


def end_with_parent() -> None:
    """Lets the kernel kill this process when its parent dies (Linux only): a stopped process would not notice by itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _put_socket_into(folder: Path) -> None:
    """Puts multiprocessing's temporary folder into this one, since a killed command leaves it behind."""
    previous, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        util.get_temp_dir()
    finally:
        tempfile.tempdir = previous


@contextmanager
def _same_path() -> Iterator[None]:
    """Gives processes that are started meanwhile the path of this one: the server would look into the working folder first.

    Python before 3.13 hands the path to the server's children only, after the server has imported.
    """
    changed = {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path), "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _hidden_command() -> Iterator[None]:
    """Hides the command's `__main__` from children, each of which would import it again: 0.4 s a process for evals.run.

    Therefore a child can call no function of `__main__`.
    """
    command = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = command
