"""The exclusive lock under which a command measures, on all cores and the GPU that it uses, and how two commands share it."""

import contextlib
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from evals.isolation.affinity import exclusive_resources
from evals.measure.clock import Stopwatch

LOCK_PIPES = "BSBR_LOCK_PIPES"
"""Environment variable of a command that shares the lock with another one: two file descriptors of pipes, as in "3,4".

A byte that is read from the first grants the lock; a byte that is written to the second grants it to the other command. A command
that ends closes its pipes, which grants the lock for good.
"""
GRANTED, ROUND_ENDED = b".", b"|"
"""The bytes: the lock alone, and the lock from a command that waits for the other one to end its round."""


@contextlib.contextmanager
def exclusive_lock(device: str = "cpu") -> Iterator[None]:
    """Context in which no other command of this user measures on a core or GPU that this process may use.

    Waits for the lock, with a message on standard error. `yield_lock` interrupts it.
    """
    if LOCK_PIPES in os.environ:
        _take_lock()
        yield
        _grant_lock()
        return
    with contextlib.ExitStack() as stack:
        # In the same order everywhere, so that no two commands wait for each other.
        for name in exclusive_resources(device):
            stack.enter_context(_locked(Path(tempfile.gettempdir()) / f"bsbr-measuring-{os.getuid()}-{name}.lock"))
        yield


def yield_lock() -> float:
    """Lets the command that shares the lock, if any, measure for one time slice; returns the seconds that this took."""
    if LOCK_PIPES not in os.environ:
        return 0.0
    stopwatch = Stopwatch()
    _grant_lock()
    _take_lock()
    return stopwatch.seconds()


def end_round() -> None:
    """Lets the command that shares the lock, if any, end its round too, so that the rounds of both stay in step.

    Without it a command whose rounds hold fewer time slices would run ahead, and its rounds could not be paired.
    """
    if LOCK_PIPES not in os.environ:
        return
    received = GRANTED
    while received == GRANTED:  # the other one is in its round, and was granted time for a slice
        _grant_lock(ROUND_ENDED)
        received = _take_lock()
    _grant_lock(ROUND_ENDED)  # the answer to its end of the round
    _take_lock()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(f"waits until process {file.read() or 'of another'} has measured its comparison", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _take_lock() -> bytes:
    """Waits for the lock. Returns the byte that granted it; empty if the other command has ended."""
    return os.read(_pipes()[0], 1)


def _grant_lock(byte: bytes = GRANTED) -> None:
    with contextlib.suppress(BrokenPipeError):  # the other command has ended
        os.write(_pipes()[1], byte)


def _pipes() -> tuple[int, int]:
    ours, theirs = os.environ[LOCK_PIPES].split(",")
    return int(ours), int(theirs)
