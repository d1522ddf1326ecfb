"""Checks and times a context-parallel attention in a process group, on one machine or many: `evals.context_parallel`."""

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from bsbr.interface import MultiHeadAttention
from bsbr.process_group import SequenceGroup, ring_sent_bytes, split_evenly
from evals.config import DTYPES
from evals.measure.clock import Stopwatch
from evals.paths import CONF


@dataclass(frozen=True)
class Setup:
    """The attention that is checked and timed, and how."""

    attention: str  # name of a file of conf/attention
    seq_len: int  # of the whole sequence that is timed
    hidden_dim: int
    num_heads: int
    device: str  # cpu, over gloo; or cuda, a GPU a rank, over NCCL
    dtype: str
    calls: int  # timed; their median is reported


@torch.inference_mode()
def check_and_time(setup: Setup) -> bool:
    """Compares the ranks' output with that of one rank, times the ranks, and counts the bytes that they send; rank 0 prints.

    Must run in every process that torchrun started. Returns whether the output is right.
    """
    with _process_group(setup.device) as device:
        attention = _build(setup, device)
        size = dist.get_world_size()
        short = split_evenly(2 * size * attention.block_length - 1, size, attention.block_length)
        error = _output_error(attention, short, device)
        tolerance = max(1e-5, 2 * torch.finfo(attention.dtype).eps)
        _print(f"{setup.attention} across {size} ranks, {dist.get_backend()}, {setup.dtype} on {device.type}")
        _print(f"{sum(short)} tokens: differs from one rank by {error:.1e} of its norm, {tolerance:.0e} allowed")

        lengths = split_evenly(setup.seq_len, size, attention.block_length)
        seconds, sent_bytes = _time_calls(attention, lengths, device, setup.calls)
        heads = {"kv_heads": attention.num_kv_heads, "head_dim": attention.head_dim, "itemsize": attention.dtype.itemsize}
        ring_bytes = [ring_sent_bytes(lengths, rank, **heads) for rank in range(size)]
        _print(f"{setup.seq_len} tokens: {seconds:.3f} s a call, median of {setup.calls}")
        _print(f"sent in a call, MiB a rank:     {_in_mib(sent_bytes)}")
        _print(f"ring attention sends, by formula: {_in_mib(ring_bytes)}")
        return error <= tolerance


@contextmanager
def _process_group(device_type: str) -> Iterator[torch.device]:
    """The process group of torchrun, and this rank's device."""
    device = torch.device(device_type)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _build(setup: Setup, device: torch.device) -> MultiHeadAttention:
    """The attention, with the same parameters on every rank."""
    torch.manual_seed(0)
    config = cast(DictConfig, OmegaConf.load(CONF / "attention" / f"{setup.attention}.yaml"))
    attention = instantiate(config[setup.attention], hidden_dim=setup.hidden_dim, num_heads=setup.num_heads)
    return cast(MultiHeadAttention, attention.to(device, DTYPES[setup.dtype]).eval())


def _make_shards(attention: MultiHeadAttention, lengths: Sequence[int], device: torch.device) -> list[Tensor]:
    """Inputs of every rank, [1, length, hidden_dim] each; the same whichever rank makes them."""
    generators = [torch.Generator().manual_seed(rank) for rank in range(len(lengths))]
    shards = [torch.randn(1, n, attention.hidden_dim, generator=one) for n, one in zip(lengths, generators, strict=True)]
    return [shard.to(device, attention.dtype) for shard in shards]


def _output_error(attention: MultiHeadAttention, lengths: Sequence[int], device: torch.device) -> float:
    """Relative error of the ranks' output against one rank's, the largest of all ranks."""
    shards, rank = _make_shards(attention, lengths, device), dist.get_rank()
    expected = attention(torch.cat(shards, dim=1)).split(list(lengths), dim=1)[rank].double()
    output = attention.context_parallel_forward(shards[rank], SequenceGroup())
    error = (output.double() - expected).norm() / expected.norm()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return float(error)


def _time_calls(attention: MultiHeadAttention, lengths: Sequence[int], device: torch.device, calls: int) -> tuple[float, list[int]]:
    """Median seconds of a call, after one that warms up, and the bytes that each rank sends in it."""
    shard = _make_shards(attention, lengths, device)[dist.get_rank()]
    seconds, sent = [], 0
    for _ in range(1 + calls):
        dist.barrier()
        stopwatch, group = Stopwatch(), SequenceGroup(lengths=lengths)
        attention.context_parallel_forward(shard, group)
        if shard.is_cuda:
            torch.cuda.synchronize()
        dist.barrier()  # a call ends when its last rank is done
        seconds.append(stopwatch.seconds())
        sent = group.sent_bytes
    sent_bytes = [0] * len(lengths)
    dist.all_gather_object(sent_bytes, sent)
    return statistics.median(seconds[1:]), sent_bytes


def _print(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def _in_mib(sent_bytes: Sequence[int]) -> str:
    return f"{', '.join(f'{one / 2**20:.2f}' for one in sent_bytes)}; in all {sum(sent_bytes) / 2**20:.2f}"
