"""TODO: what lives here."""

import contextlib
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from evals.isolation.affinity import exclusive_resources
from evals.measure.clock import Stopwatch

BATON = "BSBR_BATON"
"""Names the ends of two pipes, as in 3,4, of a command that measures in turns with another one: it may work once it has read
a byte from the first, and lets the other work by writing one to the second. The end of a command ends the turns.
"""


@contextlib.contextmanager
def exclusive_lock(device: str = "cpu") -> Iterator[None]:
    """While it lasts, no other command of this user measures on a core or GPU of this process, but for `yield_lock`.

    Says so where it has to wait.
    """
    if BATON in os.environ:
        _take_baton()
        yield
        _give_baton()
        return
    with contextlib.ExitStack() as stack:
        # In the same order everywhere, so that no two wait for each other.
        for name in exclusive_resources(device):
            stack.enter_context(_locked(Path(tempfile.gettempdir()) / f"bsbr-measuring-{os.getuid()}-{name}.lock"))
        yield


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


def yield_lock() -> float:
    """Lets the other command have a turn, where one measures in turns with this. Returns how many seconds that took."""
    if BATON not in os.environ:
        return 0.0
    watch = Stopwatch()
    _give_baton()
    _take_baton()
    return watch.seconds()


def _take_baton() -> None:
    os.read(int(os.environ[BATON].partition(",")[0]), 1)


def _give_baton() -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(int(os.environ[BATON].partition(",")[2]), b".")
