"""Tests run side by side, and nothing that they do may depend on how fast: a thread each, a place of their own each."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch  # here, because it reads OMP_NUM_THREADS

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Sets the number of threads to the test's parameter; it is 1 in other tests."""
    import torch  # here, because it reads OMP_NUM_THREADS

    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(usual)
