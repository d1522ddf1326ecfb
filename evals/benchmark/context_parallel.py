"""The workload `context_parallel`: one sequence across several processes of this machine, a core each."""

import gc
import os
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NoReturn

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
    """One forward pass over a sequence that several ranks share, without gradients.

    This process is rank 0, and the others are forks of it. A call lasts until the last rank is done. Between calls, and while
    rank 0 is stopped, the others wait at a pipe and take no time from anyone.

    Args:
        module: an attention with `context_parallel_forward`.
        inputs: [batch, time, hidden_dim] on the CPU.
        ranks: number of processes, at most the number of cores.

    Returns:
        The call. It counts sent_bytes, what rank 0 sends in a call; no other rank sends more.

    Raises:
        NotImplementedError: for another device, or an attention that does not run across ranks.
        ValueError: if ranks would share a core, or if the sequence is too short for so many ranks.
    """
    if inputs.device.type != "cpu":
        raise NotImplementedError("not implemented for cuda: torchrun -m evals.context_parallel --device cuda runs across GPUs")
    if torch.get_num_threads() != 1:
        raise ValueError(f"each rank has a core of its own: this needs device.threads=1, got {torch.get_num_threads()}")
    if not 1 <= ranks <= core_count():
        raise ValueError(f"workload.ranks must be from 1 to {core_count()}, the cores that this process may use, got {ranks}")
    module.eval()
    lengths = split_evenly(inputs.shape[1], ranks, module.block_length)
    # Forked before this process starts a thread for the store, since a fork has none of its parent's threads.
    others = [ForkedRank(module, inputs, lengths, rank) for rank in range(1, ranks)]
    store = TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
    for rank in others:
        rank.join(store.port)
    shard = Shard(module, inputs, lengths, 0, store)

    def call() -> None:
        for rank in others:
            rank.start_call()
        shard.forward()
        for rank in others:
            rank.finish_call()

    return Work(call, count_tokens(inputs), counted=lambda: {"sent_bytes": shard.sent_bytes})


class Shard:
    """A rank's shard of the sequence. Its constructor joins the process group."""

    def __init__(self, module: Attention, inputs: Tensor, lengths: Sequence[int], rank: int, store: TCPStore) -> None:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=len(lengths))
        self._module = module
        self._lengths = lengths
        self._hidden_states = inputs.split(list(lengths), dim=1)[rank].clone()
        self.sent_bytes = 0  # of the last forward pass

    @torch.inference_mode()
    def forward(self) -> None:
        group = SequenceGroup(lengths=self._lengths)
        self._module.context_parallel_forward(self._hidden_states, group)
        self.sent_bytes = group.sent_bytes


class ForkedRank:
    """Another rank: a fork of this process, which dies with it.

    The fork receives the store's port, then None for each call, through a pipe. Its reply to a call is None or the error's text.
    """

    def __init__(self, module: Attention, inputs: Tensor, lengths: Sequence[int], rank: int) -> None:
        self._rank = rank
        self._connection, theirs = Pipe()
        parent = os.getpid()
        # Not multiprocessing, which allows a worker process no children. Safe as long as this process has one thread.
        if os.fork() == 0:
            self._connection.close()
            _serve_calls(theirs, parent, module, inputs, lengths, rank)
        theirs.close()

    def join(self, port: int) -> None:
        self._connection.send(port)

    def start_call(self) -> None:
        self._connection.send(None)

    def finish_call(self) -> None:
        """Waits for the rank. Raises RuntimeError if it failed."""
        try:
            failure = self._connection.recv()
        except EOFError:
            failure = "it died"
        if failure is not None:
            raise RuntimeError(f"rank {self._rank}: {failure}")


def _serve_calls(
    connection: Connection, parent: int, module: Attention, inputs: Tensor, lengths: Sequence[int], rank: int
) -> NoReturn:
    """Joins the process group and runs the calls of a forked rank, until its parent is gone."""
    try:
        gc.freeze()
        end_with_parent()
        if os.getppid() != parent:  # the parent died before end_with_parent took effect
            os._exit(0)
        shard = Shard(module, inputs, lengths, rank, TCPStore("127.0.0.1", connection.recv(), len(lengths)))
        while True:
            connection.recv()
            shard.forward()
            connection.send(None)
    except EOFError:
        pass  # the parent is gone
    except Exception as error:  # noqa: BLE001  the parent raises it
        connection.send(f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)
