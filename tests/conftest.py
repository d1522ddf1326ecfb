"""Tests run side by side, and nothing that they do may depend on how fast: a thread each, a place of their own each."""

import atexit
import os
import shutil
import tempfile

# Threads that wait for each other on a busy core do so for a hundred times as long as they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What pytest makes of warnings ends at this process: a number that is none is an error in those that tests start, too.
os.environ["PYTHONWARNINGS"] = "error::RuntimeWarning"

# Commands that measure take turns with all others on this machine, by a lock in the temporary folder.
folder = tempfile.mkdtemp(prefix=f"bsbr-tests-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-")
tempfile.tempdir = os.environ["TMPDIR"] = folder
atexit.register(shutil.rmtree, folder, ignore_errors=True)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for a process that they started."""
    return (os.cpu_count() or 1) + 1
