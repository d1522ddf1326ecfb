"""A measurement in a process of its own, which may hang, crash or run out of memory without taking anything with it."""

import contextlib
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from evals.errors import one_sentence
from evals.isolation.forkserver import end_with_parent, launch
from evals.measure.memory import private_bytes


@dataclass(frozen=True)
class Result:
    """`value` is what the function returned where the outcome is ok; `detail` says in words what happened instead."""

    outcome: str
    value: Any = None
    detail: str = ""


class Worker:
    """A fresh child process that runs a module's function; used as a context, at whose end the process is gone.

    A plain function gives one result. A generator gives one for every value that it yields, and waits there for the
    next message; while it waits its process is stopped, so that no thread of it that still spins takes time from
    another worker. Whatever happens to the child is a `Result`:

    ok | oom (no memory, or killed as the kernel does when there is none) | timeout | unsupported (it says it is not
    implemented for this) | crash (anything else that it raised, a signal, an exit).
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, memory_limit_bytes: int | None = None) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="bsbr-worker-")  # noqa: SIM115  closed at exit
        self._process, self._connection = launch(_child, self._log.name, memory_limit_bytes, function, arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
        self._process.join()
        self._connection.close()
        self._log.close()

    def kill(self) -> None:
        """Lets the process end, also one that is stopped; the end of the context waits until it is gone."""
        self._process.kill()

    def result(self, timeout_s: float) -> Result:
        """The next result: what the function returned, or yielded first."""
        if not wait([self._connection], timeout_s):
            return Result("timeout", detail=f"took longer than {timeout_s:g} s")
        # It may die without a word.
        with contextlib.suppress(EOFError, ConnectionResetError):
            result: Result = self._connection.recv()
            self._signal(signal.SIGSTOP)
            return result
        self._process.join()
        return _died(self._process.exitcode, Path(self._log.name).read_text(errors="replace"))

    def ask(self, message: Any, timeout_s: float) -> Result:
        """Sends the generator a message, and returns what it yields next."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # then `result` tells what became of it
            self._connection.send(message)
        return self.result(timeout_s)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)


def run_isolated(function: Callable[..., Any], *arguments: Any, timeout_s: float, memory_limit_bytes: int | None = None) -> Result:
    """Calls a module's function in a fresh child process."""
    with Worker(function, *arguments, memory_limit_bytes=memory_limit_bytes) as worker:
        return worker.result(timeout_s)


def _died(exit_code: int | None, log: str) -> Result:
    said = log.strip().splitlines()
    last_words = f"; its last words: {said[-1].strip()}" if said else ""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        if name == "SIGKILL":
            return Result("oom", detail="killed by SIGKILL, as the kernel does when memory runs out")
        return Result("crash", detail=f"killed by {name}{last_words}")
    return Result("crash", detail=f"exited with code {exit_code} before it had a result{last_words}")


# --- in the child -------------------------------------------------------------------------------


def _child(
    connection: Connection, log: str, memory_limit: int | None, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # Ctrl-C reaches the whole process group, and the parent lets a measurement finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print here would tear the progress bar of the parent apart.
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # A killed command must not leave stopped processes behind: the forkserver dies with it, and this with that.
    end_with_parent()
    if sys.platform == "linux" and memory_limit is not None:
        allowed = private_bytes() + memory_limit
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    try:
        value = function(*arguments)
        if isinstance(value, Generator):
            _converse(connection, value)
            return
        result = Result("ok", value)
    except Exception as error:  # noqa: BLE001  whatever a variant raises is an outcome
        result = Result(outcome_of(error), detail=_told(error))
    connection.send(result)


def _converse(connection: Connection, generator: Generator[Any, Any, None]) -> None:
    message = None
    with contextlib.suppress(StopIteration, EOFError):  # it has nothing more to say, or no one listens
        while True:
            connection.send(Result("ok", generator.send(message)))
            message = connection.recv()


def outcome_of(error: Exception) -> str:
    """What an exception says about the measurement that raised it."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text or "bad_alloc" in text:
        return "oom"
    if isinstance(error, NotImplementedError) or "not implemented for" in text:
        return "unsupported"
    return "crash"


def _told(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_sentence(error)} ({Path(frame.filename).name}:{frame.lineno})"
