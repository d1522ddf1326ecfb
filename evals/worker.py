"""A measurement in a process of its own, which may hang, crash or run out of memory without taking anything with it."""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from evals.config import one_sentence
from evals.measure import private_bytes

# A child of the forkserver has everything imported and shares nothing with a parent that has worked. Ready must lie what
# it imports again with the command's own module, and torch._dynamo, which torch's profiler imports when it first starts:
# a second for every measurement of memory.
PRELOAD = ["evals.cli", "evals.engine", "evals.table", "torch._dynamo"]


@dataclass(frozen=True)
class Result:
    """`value` is what the function returned where the outcome is ok; `detail` says in words what happened instead."""

    outcome: str
    value: Any = None
    detail: str = ""


def run_isolated(function: Callable[..., Any], *arguments: Any, timeout_s: float, memory_limit_bytes: int | None = None) -> Result:
    """Calls a module's function in a fresh child process. Whatever happens to the child is a `Result`:

    ok | oom (no memory, or killed as the kernel does when there is none) | timeout | unsupported (it says it is not
    implemented for this) | crash (anything else that it raised, a signal, an exit).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(prefix="bsbr-worker-") as log, receiver:
        process = context.Process(target=_child, args=(sender, log.name, memory_limit_bytes, function, arguments), daemon=True)
        process.start()
        sender.close()
        try:
            ready = wait([receiver], timeout_s)
            if not ready:
                return Result("timeout", detail=f"took longer than {timeout_s:g} s")
            with contextlib.suppress(EOFError):  # it died without a word
                result: Result = receiver.recv()
                return result
            process.join()
            return _died(process.exitcode, Path(log.name).read_text(errors="replace"))
        finally:
            process.kill()
            process.join()


def _died(exit_code: int | None, log: str) -> Result:
    said = log.strip().splitlines()
    last_words = f"; its last words: {said[-1].strip()}" if said else ""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        if name == "SIGKILL":
            return Result("oom", detail="killed by SIGKILL, as the kernel does when memory runs out")
        return Result("crash", detail=f"killed by {name}{last_words}")
    return Result("crash", detail=f"exited with code {exit_code} before it had a result{last_words}")


def _child(
    sender: Connection, log: str, memory_limit: int | None, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # What libraries print here would tear the progress bar of the parent apart.
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if memory_limit is not None and sys.platform == "linux":
        allowed = private_bytes() + memory_limit
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    try:
        result = Result("ok", function(*arguments))
    except Exception as error:  # noqa: BLE001  whatever a variant raises is an outcome
        result = Result(outcome_of(error), detail=_told(error))
    sender.send(result)


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
