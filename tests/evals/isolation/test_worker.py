"""Every end of a child process becomes a result, and the process leaves nothing behind."""

import ctypes
import gc
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest
import torch

from evals.isolation.worker import Result, classify_error, limit_memory, run_isolated
from evals.measure.memory import private_bytes
from evals.paths import ROOT


def product(a: int, b: int) -> int:
    return a * b


def fail() -> None:
    raise KeyError("no such thing")


def leave() -> None:
    print("the last thing it said", file=sys.stderr)
    os._exit(7)


def segfault() -> None:
    ctypes.string_at(0)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    threading.Event().wait()


def hold(mebibytes: int) -> int:
    return len(torch.ones(mebibytes, 2**18))


def not_implemented() -> None:
    raise NotImplementedError("no backward for this")


def print_and_write() -> int:
    print("on stdout", flush=True)
    os.write(2, b"on stderr")
    return 1


def test_the_value_is_returned() -> None:
    assert run_isolated(product, 6, 7, timeout_s=60) == Result("ok", 42)


def test_a_child_does_not_inherit_the_state_of_its_parent() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 3)
        assert run_isolated(torch.get_num_threads, timeout_s=60).value == before
    finally:
        torch.set_num_threads(before)


def test_a_child_does_not_import_the_command_that_starts_it(tmp_path: Path) -> None:
    command = tmp_path / "command.py"
    command.write_text(
        "from multiprocessing.connection import Connection\nfrom evals.isolation import forkserver\n"
        "print('imported', flush=True)\n"
        "if __name__ == '__main__':\n    forkserver.start(preload=())\n"  # preloading takes ten seconds
        "    process, ours = forkserver.launch(Connection.send, 'b')\n    print(ours.recv())\n    process.join()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for arguments in (["-m", "command"], ["command.py"]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.stdout.split(), done.stderr) == (["imported", "b"], "")


def wait_for_more() -> Generator[int, None, None]:
    yield os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is dead")
def test_a_killed_command_leaves_no_process_behind() -> None:
    script = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nimport test_worker\nfrom evals.isolation.worker import Worker\n"
        "worker = Worker(test_worker.wait_for_more)\n"
        "print(worker.result(60).value, flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            child = psutil.Process(int(process.stdout.readline()))  # which is being stopped by now
            server = child.parent()
        finally:
            process.kill()
    assert server is not None
    _, alive = psutil.wait_procs([child, server], timeout=60)
    assert alive == []


def is_imported(name: str) -> bool:
    return name in sys.modules


def test_a_child_has_imported_modules_that_measure_and_none_that_draw() -> None:
    assert run_isolated(is_imported, "torch._dynamo", timeout_s=60).value
    assert not run_isolated(is_imported, "matplotlib", timeout_s=60).value
    assert run_isolated(gc.get_freeze_count, timeout_s=60).value > 10_000


@pytest.mark.parametrize(
    ("function", "outcome", "words"),
    [
        (fail, "crash", r"KeyError: 'no such thing' \(test_worker.py:\d+\)"),
        (leave, "crash", "exited with code 7 before it had a result; its last words: the last thing it said"),
        (segfault, "crash", "killed by SIGSEGV"),
        (kill_itself, "oom", "killed by SIGKILL"),
        (not_implemented, "unsupported", "NotImplementedError: no backward for this"),
    ],
)
def test_a_failure_has_an_outcome_and_a_description(function: object, outcome: str, words: str) -> None:
    result = run_isolated(function, timeout_s=60)  # type: ignore[arg-type]
    assert result.outcome == outcome
    assert re.match(words, result.detail)


def test_a_hang_ends_at_its_time_limit_and_leaves_no_process() -> None:
    children = psutil.Process().children(recursive=True)
    assert run_isolated(hang, timeout_s=0.5) == Result("timeout", detail="took longer than 0.5 s")
    left = [child for child in psutil.Process().children(recursive=True) if child not in children]
    # The forkserver itself may have been started by this very call.
    assert all("forkserver" in " ".join(child.cmdline()) or "resource_tracker" in " ".join(child.cmdline()) for child in left)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
def test_memory_beyond_the_limit_is_oom_and_below_it_is_ok() -> None:
    limit = 256 * 2**20
    assert run_isolated(hold, 128, timeout_s=60, memory_limit_bytes=limit) == Result("ok", 128)
    result = run_isolated(hold, 300, timeout_s=60, memory_limit_bytes=limit)
    assert result.outcome == "oom"
    assert "can't allocate memory" in result.detail


def hold_within_a_lower_limit(mib: int) -> int:
    lower = private_bytes() + 256 * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (lower, lower))
    limit_memory(2**40)
    return hold(mib)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
def test_a_lower_limit_of_the_command_stays() -> None:
    assert run_isolated(hold_within_a_lower_limit, 128, timeout_s=60) == Result("ok", 128)
    assert run_isolated(hold_within_a_lower_limit, 300, timeout_s=60).outcome == "oom"


def test_a_child_does_not_write_on_the_parents_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_isolated(print_and_write, timeout_s=60).outcome == "ok"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"), "oom"),
        (RuntimeError("std::bad_alloc"), "oom"),
        (RuntimeError("\"triangular_solve\" not implemented for 'Half'"), "unsupported"),
        (RuntimeError("shapes cannot be multiplied"), "crash"),
    ],
)
def test_an_exception_is_oom_unsupported_or_a_crash(error: Exception, outcome: str) -> None:
    assert classify_error(error) == outcome
