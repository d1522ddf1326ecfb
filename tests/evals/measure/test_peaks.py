"""Measured peaks: no rate is missing, and the timed calls do all the work that is counted."""

from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import torch

from evals.isolation.worker import run_isolated
from evals.measure import peaks as module
from evals.measure.peaks import measure_peaks
from evals.stats.roofline import Peaks

KIB, MIB = 2**10, 2**20


@pytest.mark.parametrize(("dtype", "threads"), [("float32", 1), ("bfloat16", 2)])
def test_every_rate_is_measured_in_a_process_of_its_own(dtype: str, threads: int) -> None:
    before = torch.get_num_threads()
    result = run_isolated(measure_peaks, "cpu", getattr(torch, dtype), threads, 0.0, timeout_s=120)
    assert result.outcome == "ok", result.detail
    measured = result.value
    assert isinstance(measured, Peaks)
    assert measured.threads == threads
    sizes = [size for size, _ in measured.bytes_per_s]
    assert sizes == [size for size, _ in measured.thread_bytes_per_s]
    assert sizes[0] == 64 * KIB
    assert all(larger == 2 * smaller for smaller, larger in pairwise(sizes))
    assert measured.flops_per_s >= measured.thread_flops_per_s > 0
    assert all(every >= one for (_, every), (_, one) in zip(measured.bytes_per_s, measured.thread_bytes_per_s, strict=True))
    assert torch.get_num_threads() == before


def test_working_sets_leave_three_quarters_of_the_free_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 * MIB))
    assert sorted({size for size, _ in module.memory_passes("cpu")}) == [64 * KIB, 128 * KIB, 256 * KIB]


def test_a_pass_goes_over_the_whole_working_set() -> None:
    """A pass that touched fewer bytes than are counted would report a peak above the machine's."""
    for size, call in list(module.memory_passes("cpu"))[:6]:
        moved = call()
        assert isinstance(moved, torch.Tensor)
        if moved.ndim == 0:  # a sum of ones says how many were read
            assert moved.item() * 4 == size
        else:  # half is read and half is written
            assert moved.nbytes * 2 == size


@pytest.mark.gpu
def test_the_peaks_of_a_gpu_are_plausible() -> None:
    measured = run_isolated(measure_peaks, "cuda", torch.bfloat16, 1, timeout_s=120).value
    assert 1e12 < measured.flops_per_s < 5e15
    assert 1e11 < measured.bytes_per_s[-1][1] < 1e13
