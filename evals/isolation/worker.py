"""Worker processes: a function runs in a fresh child, so that its hang, crash or lack of memory does not harm the command."""

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
from typing import Any, Generic, Self, TypeVar, cast

import torch

from evals.errors import one_sentence
from evals.isolation.forkserver import end_with_parent, launch
from evals.isolation.scratch import scratch_folder
from evals.measure.memory import private_bytes

Request = TypeVar("Request")
Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Result(Generic[Reply]):
    """The result of one step of a worker."""

    outcome: str  # ok, oom, timeout, unsupported or crash, as `Worker` defines them
    value: Reply = None  # type: ignore[assignment] # what the function returned or yielded; None unless the outcome is ok
    detail: str = ""  # the failure in words


class Worker(Generic[Request, Reply]):
    """A fresh child process that runs a generator function of a module. Leaving its context ends the process.

    The child sends every value that the generator yields, then waits for the next request. Its process is stopped (SIGSTOP)
    while it waits, so that none of its spinning threads takes time from another worker. A function that returns a value instead
    sends that one value.

    Outcomes of a step:
        ok: the function returned or yielded a value.
        oom: no memory was left, or the process was killed by SIGKILL, as the kernel does then.
        timeout: no value came in time.
        unsupported: the function raised an error that says it is not implemented for these arguments.
        crash: it raised another error, died by another signal, or exited.
    """

    def __init__(
        self, function: Callable[..., Generator[Reply, Request, None]], *arguments: Any, memory_limit_bytes: int | None = None
    ) -> None:
        """Starts the process, which imports the function by its name and unpickles the arguments.

        memory_limit_bytes: what the child may allocate beyond what it holds at its start, unless the command has a lower limit;
            enforced on Linux only.
        """
        self._log = tempfile.NamedTemporaryFile(prefix="worker-", dir=scratch_folder())  # noqa: SIM115  closed by __exit__
        self._process, self._connection = launch(_run_child, self._log.name, memory_limit_bytes, function, arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
        self._process.join()
        self._connection.close()
        self._log.close()

    def kill(self) -> None:
        """Kills the process, stopped or not, without waiting for its end; `__exit__` waits."""
        self._process.kill()

    def result(self, timeout_s: float) -> Result[Reply]:
        """Waits for the next value or a failure, then stops the process."""
        if not wait([self._connection], timeout_s):
            return Result("timeout", detail=f"took longer than {timeout_s:g} s")
        with contextlib.suppress(EOFError, ConnectionResetError):  # the child died before it sent anything
            result: Result[Reply] = self._connection.recv()
            self._signal(signal.SIGSTOP)
            return result
        self._process.join()
        return _death_result(self._process.exitcode, Path(self._log.name).read_text(errors="replace"))

    def ask(self, request: Request, timeout_s: float) -> Result[Reply]:
        """Resumes the process, sends it a request and waits for the reply, as `result` does."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # the child is dead; `result` says why
            self._connection.send(request)
        return self.result(timeout_s)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)


def run_isolated(
    function: Callable[..., Reply], *arguments: Any, timeout_s: float, memory_limit_bytes: int | None = None
) -> Result[Reply]:
    """Calls a function that returns one value in a fresh child process, which ends with it; see `Worker`."""
    one_value = cast(Callable[..., Generator[Reply, None, None]], function)
    with Worker(one_value, *arguments, memory_limit_bytes=memory_limit_bytes) as worker:
        return worker.result(timeout_s)


def _death_result(exit_code: int | None, log: str) -> Result[Any]:
    """The result of a process that ended without sending one."""
    lines = log.strip().splitlines()
    last_words = f"; its last words: {lines[-1].strip()}" if lines else ""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        if name == "SIGKILL":
            return Result("oom", detail="killed by SIGKILL, as the kernel does when memory runs out")
        return Result("crash", detail=f"killed by {name}{last_words}")
    return Result("crash", detail=f"exited with code {exit_code} before it had a result{last_words}")


# --- in the child -------------------------------------------------------------------------------


def _run_child(
    connection: Connection, log: str, memory_limit: int | None, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # Ctrl-C reaches the whole process group, and the parent lets a measurement finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Output of libraries would tear the parent's progress bar apart.
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # A killed command must leave no stopped process behind: the fork server dies with the command, and the child with that.
    end_with_parent()
    if sys.platform == "linux" and memory_limit is not None:
        limit_memory(memory_limit)
    try:
        value = function(*arguments)
        if isinstance(value, Generator):
            _serve(connection, value)
            return
        result = Result("ok", value)
    except Exception as error:  # noqa: BLE001  whatever a variant raises is an outcome
        result = Result(classify_error(error), detail=_describe_error(error))
    connection.send(result)


def limit_memory(more_bytes: int) -> None:
    """Limits this process to `more_bytes` beyond what it holds; a lower limit that it has, which it could not raise, stays."""
    limits = (private_bytes() + more_bytes, *resource.getrlimit(resource.RLIMIT_DATA))
    allowed = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def _serve(connection: Connection, generator: Generator[Reply, Request, None]) -> None:
    """Sends the generator's values and passes requests to it, until it ends or the parent closes the pipe."""
    with contextlib.suppress(StopIteration, EOFError):
        reply = next(generator)
        while True:
            connection.send(Result("ok", reply))
            reply = generator.send(connection.recv())


def classify_error(error: Exception) -> str:
    """Outcome of a measurement that raised this error: oom, unsupported or crash."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text or "bad_alloc" in text:
        return "oom"
    if isinstance(error, NotImplementedError) or "not implemented for" in text:
        return "unsupported"
    return "crash"


def _describe_error(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_sentence(error)} ({Path(frame.filename).name}:{frame.lineno})"
