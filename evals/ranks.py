"""One sequence across several processes: as a workload of a comparison, and under torchrun, on one machine or many.

    python -m evals.run sweep=context_parallel
    torchrun --standalone --nproc-per-node=2 -m evals.ranks --seq-len 65536

The second builds an attention, holds it to the same on one rank at a short length, and prints seconds and bytes.
"""

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import cast

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from bsbr.interface import Attention, MultiHeadAttention
from bsbr.ranks import Ranks, ring_sent_bytes, split
from evals.cli import CONF
from evals.config import DTYPES, cores
from evals.forkserver import end_with_parent
from evals.measure import Stopwatch
from evals.workloads import Work, only, tokens_in


@only(scopes=("attention",))
def context_parallel(module: Attention, inputs: Tensor, ranks: int = 1) -> Work:
    """One forward pass over a sequence that `ranks` processes share, a core each, without gradients.

    This process is rank 0. The others are copies of it, which wait at a pipe for its word and tell when they are done, so
    that a call lasts until the last of them is: between calls, and while rank 0 is stopped, they take no time from anyone.
    They die with it. Counts sent_bytes: what rank 0 sends in a call, and no other rank sends more.
    """
    if inputs.device.type != "cpu":
        raise NotImplementedError("not implemented for cuda: torchrun -m evals.ranks --device cuda runs across GPUs")
    if torch.get_num_threads() != 1:
        raise ValueError(f"each rank has a core of its own: this needs device.threads=1, got {torch.get_num_threads()}")
    if not 1 <= ranks <= cores():
        raise ValueError(f"workload.ranks must be from 1 to {cores()}, the cores that this process may use, got {ranks}")
    module.eval()
    lengths = split(inputs.shape[1], ranks, module.block_length)

    def join(rank: int, store: TCPStore) -> Callable[[], int]:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        start = sum(lengths[:rank])
        stretch = inputs[:, start : start + lengths[rank]].clone()

        @torch.inference_mode()
        def attend() -> int:
            shared = Ranks(lengths=lengths)
            module.across(stretch, shared)
            return shared.sent_bytes

        return attend

    def follow(rank: int, leader: Connection) -> None:
        attend = join(rank, TCPStore("127.0.0.1", leader.recv(), ranks))
        while True:
            leader.recv()
            attend()
            leader.send(None)

    followers = [_fork(follow, rank) for rank in range(1, ranks)]
    store = TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
    for follower in followers:
        follower.send(store.port)
    attend, sent = join(0, store), 0

    def call() -> None:
        nonlocal sent
        for follower in followers:
            follower.send(None)
        sent = attend()
        for rank, follower in enumerate(followers, 1):
            _check(rank, follower)

    return Work(call, tokens_in(inputs), counted=lambda: {"sent_bytes": sent})


def _fork(follow: Callable[[int, Connection], None], rank: int) -> Connection:
    """A copy of this process, as it is now, that follows what comes through the connection until this process is gone."""
    ours, theirs = Pipe()
    parent = os.getpid()
    # Not multiprocessing, which allows a worker no children: safe as long as this process has one thread.
    if os.fork():
        theirs.close()
        return ours
    try:
        ours.close()
        gc.freeze()
        end_with_parent()
        if os.getppid() == parent:  # or it died before it was asked for
            follow(rank, theirs)
    except EOFError:
        pass  # the parent is gone
    except Exception as error:  # noqa: BLE001  the parent raises it
        theirs.send(f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _check(rank: int, follower: Connection) -> None:
    try:
        failure = follower.recv()
    except EOFError:
        failure = "it died"
    if failure is not None:
        raise RuntimeError(f"rank {rank}: {failure}")


# --- under torchrun -------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    arguments = _arguments(words)
    if "RANK" not in os.environ:
        print(
            "start it with torchrun, such as: torchrun --standalone --nproc-per-node=2 -m evals.ranks --seq-len 65536",
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
        prog="torchrun --standalone --nproc-per-node=2 -m evals.ranks", description=(__doc__ or "").partition("\n")[0]
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

    short = split(2 * size * attention.block_length - 1, size, attention.block_length)
    inputs, mine = stretch(short)
    expected = attention(inputs)[:, mine].double()
    error = (attention.across(inputs[:, mine], Ranks()).double() - expected).norm() / expected.norm()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    tolerance = max(1e-5, 2 * torch.finfo(attention.dtype).eps)
    say(f"{arguments.attention} across {size} ranks, {dist.get_backend()}, {arguments.dtype} on {device.type}")
    say(f"{sum(short)} tokens: differs from one rank by {error:.1e} of its norm, {tolerance:.0e} allowed")

    lengths = split(arguments.seq_len, size, attention.block_length)
    inputs, mine = stretch(lengths)
    inputs = inputs[:, mine].clone()
    seconds = []
    for _ in range(1 + arguments.calls):
        dist.barrier()
        watch, ranks = Stopwatch(), Ranks(lengths=lengths)
        attention.across(inputs, ranks)
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
