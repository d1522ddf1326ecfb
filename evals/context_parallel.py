"""One sequence across several processes: as a workload of a comparison, and under torchrun, on one machine or many.

    python -m evals.run sweep=context_parallel
    torchrun --standalone --nproc-per-node=2 -m evals.context_parallel --seq-len 65536

The second builds an attention, holds it to the same on one rank at a short length, and prints seconds and bytes.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from bsbr.interface import MultiHeadAttention
from bsbr.process_group import SequenceGroup, ring_sent_bytes, split_evenly
from evals.config import DTYPES
from evals.measure.clock import Stopwatch
from evals.paths import CONF

# --- under torchrun -------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    arguments = _arguments(words)
    if "RANK" not in os.environ:
        print(
            "start it with torchrun, such as: torchrun --standalone --nproc-per-node=2 -m evals.context_parallel --seq-len 65536",
            file=sys.stderr,
        )
        return 2
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return _report(arguments, device)
    finally:
        dist.destroy_process_group()


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --standalone --nproc-per-node=2 -m evals.context_parallel", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--attention", default="bsbr", help="a file of conf/attention: bsbr or ring")
    parser.add_argument("--seq-len", type=int, default=16384, help="tokens of the whole sequence")
    parser.add_argument("--hidden-dim", type=int, default=256)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: over gloo; cuda: a GPU each, over NCCL")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--calls", type=int, default=5, help="of which the median is printed")
    return parser.parse_args(words)


@torch.inference_mode()
def _report(arguments: argparse.Namespace, device: torch.device) -> int:
    """Prints, on rank 0, whether the ranks are right, how long they take and what they send. Returns 1 if they are wrong."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same parameters everywhere
    node = OmegaConf.load(CONF / "attention" / f"{arguments.attention}.yaml")[arguments.attention]
    built = instantiate(node, hidden_dim=arguments.hidden_dim, num_heads=arguments.num_heads)
    attention = cast(MultiHeadAttention, built.to(device, DTYPES[arguments.dtype]).eval())

    def stretch(lengths: list[int]) -> tuple[Tensor, slice]:
        """This rank's inputs, which are the same whoever else makes them, and where they stand."""
        each = [torch.Generator().manual_seed(one) for one in range(size)]
        made = [torch.randn(1, length, arguments.hidden_dim, generator=one) for length, one in zip(lengths, each, strict=True)]
        start = sum(lengths[:rank])
        return torch.cat(made, dim=1).to(device, attention.dtype), slice(start, start + lengths[rank])

    def say(words: str) -> None:
        if rank == 0:
            print(words, flush=True)

    short = split_evenly(2 * size * attention.block_length - 1, size, attention.block_length)
    inputs, mine = stretch(short)
    expected = attention(inputs)[:, mine].double()
    error = (attention.context_parallel_forward(inputs[:, mine], SequenceGroup()).double() - expected).norm() / expected.norm()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    tolerance = max(1e-5, 2 * torch.finfo(attention.dtype).eps)
    say(f"{arguments.attention} across {size} ranks, {dist.get_backend()}, {arguments.dtype} on {device.type}")
    say(f"{sum(short)} tokens: differs from one rank by {error:.1e} of its norm, {tolerance:.0e} allowed")

    lengths = split_evenly(arguments.seq_len, size, attention.block_length)
    inputs, mine = stretch(lengths)
    inputs = inputs[:, mine].clone()
    seconds = []
    for _ in range(1 + arguments.calls):
        dist.barrier()
        watch, ranks = Stopwatch(), SequenceGroup(lengths=lengths)
        attention.context_parallel_forward(inputs, ranks)
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()  # the call is over when the last rank is
        seconds.append(watch.seconds())
    sent: list[int] = [0] * size
    dist.all_gather_object(sent, ranks.sent_bytes)
    heads = {"kv_heads": attention.num_kv_heads, "head_dim": attention.head_dim, "itemsize": attention.dtype.itemsize}
    ring = [ring_sent_bytes(lengths, one, **heads) for one in range(size)]
    say(f"{arguments.seq_len} tokens: {statistics.median(seconds[1:]):.3f} s a call, median of {arguments.calls}")
    say(f"sent in a call, MiB a rank:     {_mib(sent)}; in all {sum(sent) / 2**20:.2f}")
    say(f"ring attention sends, by formula: {_mib(ring)}; in all {sum(ring) / 2**20:.2f}")
    return 0 if float(error) <= tolerance else 1


def _mib(each: Sequence[int]) -> str:
    return ", ".join(f"{one / 2**20:.2f}" for one in each)


if __name__ == "__main__":
    sys.exit(main())
