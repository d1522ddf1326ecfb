"""The scratch folder of a process: its temporary files are removed at its end, or by the next command if it was killed."""

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from multiprocessing import util
from pathlib import Path

PREFIX = "bsbr-"
"""Begins the names of scratch folders, before the number of their process."""
LONGEST_ROOT = 49
"""Characters of the temporary folder: the path of a socket may have 103, of which 54 are names of folders in it."""


@functools.cache
def scratch_folder() -> Path:
    """Scratch folder of this process, created by the first call.

    The process holds a file lock on the folder. The kernel releases the lock when the process ends, for whatever reason. The
    first call of a later process removes all unlocked folders of this user. The folder lies in the temporary folder, or in
    /tmp where that path is too long for the sockets of multiprocessing.
    """
    root = Path(tempfile.gettempdir())
    if len(os.fsencode(root)) > LONGEST_ROOT:
        root = Path("/tmp")
    with (root / f"bsbr-scratch-{os.getuid()}.lock").open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # a folder that is being created is not locked yet, and must not be removed
        for folder in root.glob(f"{PREFIX}[0-9]*-*/"):
            with contextlib.suppress(FileNotFoundError):  # its process has ended meanwhile, and removed it
                if folder.stat().st_uid == os.getuid():
                    _remove_if_abandoned(folder)
        scratch = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=root))
        fcntl.flock(os.open(scratch, os.O_RDONLY), fcntl.LOCK_EX)  # open, and so locked, for as long as the process lives
    # After multiprocessing has removed its folder in it, at priority -100; not by a fork of this process.
    util.Finalize(None, shutil.rmtree, (scratch,), {"ignore_errors": True}, exitpriority=-200)
    return scratch


def _remove_if_abandoned(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # its process lives
    finally:
        os.close(descriptor)
