"""TODO: what lives here."""

import gc
import os
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from bsbr.interface import Attention
from bsbr.process_group import SequenceGroup, split_evenly
from evals.benchmark.workloads import Work, count_tokens, limit_to
from evals.isolation.affinity import core_count
from evals.isolation.forkserver import end_with_parent


@limit_to(scopes=("attention",))
def context_parallel(module: Attention, inputs: Tensor, ranks: int = 1) -> Work:
    """One forward pass over a sequence that `ranks` processes share, a core each, without gradients.

    This process is rank 0. The others are copies of it, which wait at a pipe for its word and tell when they are done, so
    that a call lasts until the last of them is: between calls, and while rank 0 is stopped, they take no time from anyone.
    They die with it. Counts sent_bytes: what rank 0 sends in a call, and no other rank sends more.
    """
    if inputs.device.type != "cpu":
        raise NotImplementedError("not implemented for cuda: torchrun -m evals.context_parallel --device cuda runs across GPUs")
    if torch.get_num_threads() != 1:
        raise ValueError(f"each rank has a core of its own: this needs device.threads=1, got {torch.get_num_threads()}")
    if not 1 <= ranks <= core_count():
        raise ValueError(f"workload.ranks must be from 1 to {core_count()}, the cores that this process may use, got {ranks}")
    module.eval()
    lengths = split_evenly(inputs.shape[1], ranks, module.block_length)

    def join(rank: int, store: TCPStore) -> Callable[[], int]:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        start = sum(lengths[:rank])
        stretch = inputs[:, start : start + lengths[rank]].clone()

        @torch.inference_mode()
        def attend() -> int:
            shared = SequenceGroup(lengths=lengths)
            module.context_parallel_forward(stretch, shared)
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

    return Work(call, count_tokens(inputs), counted=lambda: {"sent_bytes": sent})


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
