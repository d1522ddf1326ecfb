"""A process's temporary files are removed at its end, or by the next process if it was killed."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from evals.paths import ROOT

WAITING = "import sys\nfrom evals.isolation.scratch import scratch_folder\nprint(scratch_folder(), flush=True)\nsys.stdin.read()\n"
MEASURING = """
import sys
sys.path.insert(0, sys.argv[1])
import test_worker
from evals.isolation.worker import Worker
with Worker(test_worker.wait_for_more) as worker:
    print(worker.result(60).value, flush=True)
    sys.stdin.read()
"""


def start(command: str, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Starts a command with its temporary files in `folder`; returns it with its first line of output."""
    arguments = [sys.executable, "-c", command, str(Path(__file__).parent)]
    environment = os.environ | {"TMPDIR": str(folder)}
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("")
    assert process.returncode == 0


def temporary(folder: Path) -> set[str]:
    """Contents of a folder without lock files and torch's cache, which all processes of a user share."""
    return {str(path) for path in folder.iterdir() if path.suffix != ".lock" and not path.name.startswith("torchinductor_")}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, since sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="bsbr-test-", dir="/tmp") as name:
        yield Path(name)


def test_a_folder_that_vanishes_while_others_are_looked_at_is_no_error(folder: Path) -> None:
    """A process removes its own folder at its end, whoever looks at it then."""
    (folder / "bsbr-1-gone").mkdir()
    vanishing = (
        "import pathlib\n"
        "glob = pathlib.Path.glob\n"
        "def vanish(self, pattern):\n"
        "    for path in list(glob(self, pattern)):\n"
        "        path.rmdir()\n"
        "        yield path\n"
        "pathlib.Path.glob = vanish\n"
    )
    process, used = start(vanishing + WAITING, folder)
    assert temporary(folder) == {used}
    end(process)


def test_the_next_process_removes_folders_of_killed_processes_and_no_others(folder: Path) -> None:
    (killed, left), (living, used) = start(WAITING, folder), start(WAITING, folder)
    assert temporary(folder) == {left, used}
    (Path(left) / "file").write_text("of a measurement")
    killed.kill()
    killed.communicate()
    assert temporary(folder) == {left, used}
    last, new = start(WAITING, folder)
    assert temporary(folder) == {used, new}
    end(last)
    assert temporary(folder) == {used}
    end(living)
    assert temporary(folder) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is dead")
def test_a_command_that_is_killed_while_it_measures_leaves_only_its_scratch_folder(folder: Path) -> None:
    killed, pid = start(MEASURING, folder)
    worker = psutil.Process(int(pid))
    killed.kill()
    killed.communicate()
    psutil.wait_procs([worker], timeout=60)
    assert len(temporary(folder)) == 1
    last, new = start(WAITING, folder)
    assert temporary(folder) == {new}
    end(last)


def test_workers_start_where_the_temporary_folder_has_a_long_path(folder: Path) -> None:
    long = folder / ("x" * 90)
    long.mkdir()
    command, pid = start(MEASURING, long)
    end(command)
    assert int(pid)
    assert temporary(long) == set()
