"""A sequence across processes: the bytes that the workload counts; its ranks wait quietly, report failures, and die with it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from torch import Tensor

from baselines.ring import RingAttention
from bsbr import BSBRAttention
from bsbr.context_parallel import sent_bytes
from bsbr.process_group import SequenceGroup, ring_sent_bytes
from evals import run
from evals.benchmark.context_parallel import context_parallel
from evals.context_parallel import main
from evals.isolation.affinity import core_count
from evals.isolation.worker import Worker, run_isolated
from evals.paths import ROOT
from tests.evals.commands import call

pytestmark = pytest.mark.xdist_group("ranks")
two_cores = pytest.mark.skipif(core_count() < 2, reason="two ranks take two cores")
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they notice at their next read")


def inputs() -> Tensor:
    return torch.randn(3, 100, 32, generator=torch.Generator().manual_seed(0))


def count_sent_bytes(cls: type[BSBRAttention | RingAttention], options: dict[str, int], ranks: int) -> dict[str, int]:
    torch.set_num_threads(1)
    work = context_parallel(cls(32, 4, **options), inputs(), ranks)  # type: ignore[arg-type]
    work.call()
    work.call()
    return work.counted()


@two_cores
def test_the_bytes_that_one_call_sends_are_counted() -> None:
    bsbr = run_isolated(count_sent_bytes, BSBRAttention, {"chunk_size": 16, "compression_factor": 2}, 2, timeout_s=60)
    shape: dict[str, Any] = {"kv_heads": 4, "head_dim": 8, "itemsize": 4, "batch_size": 3}
    assert bsbr.value == {"sent_bytes": sent_bytes([64, 36], 0, chunk_size=16, feature_dim=4, **shape)[0]}
    ring = run_isolated(count_sent_bytes, RingAttention, {}, 2, timeout_s=60)
    assert ring.value == {"sent_bytes": ring_sent_bytes([64, 36], 0, **shape)}
    assert run_isolated(count_sent_bytes, RingAttention, {}, 1, timeout_s=60).value == {"sent_bytes": 0}


class Broken(BSBRAttention):
    """Fails on the second rank."""

    def context_parallel_forward(self, hidden_states: Tensor, group: SequenceGroup) -> Tensor:
        if group.rank == 1:
            raise ArithmeticError("no such number")
        return hidden_states


class Alone(BSBRAttention):
    def context_parallel_forward(self, hidden_states: Tensor, group: SequenceGroup) -> Tensor:
        raise NotImplementedError("not made for it")


@two_cores
def test_a_failure_of_another_rank_is_reported() -> None:
    failed = run_isolated(count_sent_bytes, Broken, {"chunk_size": 16}, 2, timeout_s=60)
    assert failed.outcome == "crash"
    assert "rank 1: ArithmeticError: no such number" in failed.detail
    assert run_isolated(count_sent_bytes, Alone, {"chunk_size": 16}, 2, timeout_s=60).outcome == "unsupported"


@pytest.mark.parametrize(
    ("ranks", "seq_len", "sentence"),
    [
        (0, 100, f"workload.ranks must be from 1 to {core_count()}, the cores that this process may use, got 0"),
        (
            core_count() + 1,
            100,
            f"workload.ranks must be from 1 to {core_count()}, the cores that this process may use, got {core_count() + 1}",
        ),
        pytest.param(2, 16, "16 tokens are 1 chunks of 16, too few for 2 ranks", marks=two_cores),
    ],
)
def test_bad_options_are_one_sentence(ranks: int, seq_len: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        context_parallel(BSBRAttention(32, 4, chunk_size=16), inputs()[:, :seq_len], ranks)


def test_a_rank_has_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match=r"each rank has a core of its own: this needs device\.threads=1, got 2"):
        context_parallel(BSBRAttention(32, 4, chunk_size=16), inputs(), 2)


def serve_pids() -> Iterator[list[int]]:
    torch.set_num_threads(1)
    work = context_parallel(BSBRAttention(32, 4, chunk_size=16), inputs(), 2)
    while True:
        work.call()
        yield [child.pid for child in psutil.Process().children()]


@two_cores
@linux
def test_ranks_rest_between_calls_and_die_with_rank_0() -> None:
    with Worker(serve_pids) as worker:
        (pid,) = worker.result(60).value
        rank = psutil.Process(pid)
        assert worker.ask(None, 60).value == [pid]
        before = rank.cpu_times()
        with pytest.raises(psutil.TimeoutExpired):  # it lives on
            rank.wait(0.5)
        # A rank that spun would have worked all the while.
        after = rank.cpu_times()
        assert after.user + after.system - before.user - before.system <= 0.05
    rank.wait(30)


# --- the commands ---------------------------------------------------------------------------------


@two_cores
def test_the_sweep_has_a_row_for_each_number_of_ranks_with_its_bytes(tmp_path: Path) -> None:
    places = (f"results_dir={tmp_path / 'results'}", f"plots_dir={tmp_path / 'plots'}")
    small = ("model.hidden_dim=32", "model.num_heads=2", "attention.bsbr.chunk_size=16", "shape.seq_len=256")
    quick = ("sampling=quick", "sampling.budget_s=0.01", "sampling.min_rounds=2", "sampling.time_slices=2", "workload.ranks=1,2")
    done = call(run.main, "sweep=context_parallel", *places, *small, *quick)
    assert (done.returncode, done.stderr) == (0, "")
    rows = pd.read_csv(tmp_path / "results" / "context_parallel" / "results.csv")
    assert (rows["outcome"] == "ok").all()
    sent = {(row["attention"], row["ranks"]): row["sent_bytes"] for _, row in rows.iterrows()}
    # 8 chunks of (16 + 1)·16 numbers and 2 heads; 2·128 keys and values of 32.
    assert sent == {("ring", 1): 0, ("bsbr", 1): 0, ("bsbr", 2): 4 * 8 * 17 * 16 * 2, ("ring", 2): 4 * 2 * 128 * 32}
    assert "data sent per call by one rank in MiB, lower is better" in done.stdout


SIZES = ("--seq-len", "2000", "--hidden-dim", "32", "--num-heads", "2", "--calls", "2")


def reported(attention: str, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{attention} across 2 ranks, gloo, float32 on cpu"
    assert "sent in a call, MiB a rank:" in lines[3]


def test_torchrun_starts_the_command() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "evals.context_parallel"]
    reported("bsbr", subprocess.run([*torchrun, *SIZES], cwd=ROOT, capture_output=True, text=True, check=False))


def started(rank: int, port: int) -> subprocess.CompletedProcess[str]:
    """One of two ranks of ring attention, as torchrun starts it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return call(main, *SIZES, "--attention", "ring")


def test_another_attention_runs_across_ranks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Worker(started, 0, port) as first, Worker(started, 1, port) as second:
        assert second.result(60).value.stdout == ""
        reported("ring", first.result(60).value)


def test_without_torchrun_there_is_a_hint() -> None:
    done = call(main)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "start it with torchrun, such as: torchrun --standalone --nproc-per-node=2 -m evals.context_parallel"
    )
