"""Process group of one sequence that is cut into shards, one per rank: shard lengths, messages, and the bytes they send."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # builds of torch without distributed support lack the name, and every attention imports this module
    from torch.distributed import ProcessGroup


class SequenceGroup:
    """The ranks that share a sequence, with this process as one of them; rank i holds the i-th shard.

    Args:
        group: a process group of torch.distributed (gloo or NCCL); None is the default one.
        lengths: tokens of each rank's shard, if known; otherwise in every call each rank sends its own, 8 bytes, to each other.

    Attributes:
        rank, size: rank of this process in the group, and number of ranks.
        sent_bytes: bytes of all tensors that this rank has sent, counted once for each receiver.

    Raises:
        RuntimeError: if there is no process group, or this process is not in it.
        ValueError: if the number of lengths is not that of the ranks.
    """

    def __init__(self, group: "ProcessGroup | None" = None, lengths: Sequence[int] | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "a sequence across ranks needs a process group: start the ranks with torchrun, and call "
                "torch.distributed.init_process_group in each before"
            )
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError(f"process {dist.get_rank()} is not in the group of ranks that it was given")
        if lengths is not None and len(lengths) != self.size:
            raise ValueError(f"lengths must be one for each of the {self.size} ranks, got {list(lengths)}")
        self.lengths = None if lengths is None else list(lengths)
        self.sent_bytes = 0

    def shard_lengths(self, time: int, device: torch.device, block: int = 1, lengths: Sequence[int] | None = None) -> list[int]:
        """Number of tokens of each rank's shard; the ranks exchange the numbers if they are not known.

        Args:
            time: tokens of this rank's shard.
            device: device of the tensors that the group exchanges.
            block: every shard but the last must be a multiple of it.
            lengths: the result, if the caller knows it.

        Raises:
            ValueError: on all ranks, if a shard is empty, or one before the last is not a multiple of `block`; on this rank, if
                `time` is not what the known lengths say.
        """
        known = self.lengths if lengths is None else list(lengths)
        lengths = self._exchange_lengths(time, device) if known is None else known
        if lengths[self.rank] != time:
            raise ValueError(f"rank {self.rank} was to hold {lengths[self.rank]} tokens by its lengths, got {time}")
        if min(lengths) < 1:
            raise ValueError(f"every rank must hold at least one token, got shards of {lengths}; use fewer ranks")
        if any(length % block for length in lengths[:-1]):
            raise ValueError(
                f"all shards but the last must be whole chunks, multiples of {block} tokens, got {lengths}; "
                "cut the sequence where a chunk ends"
            )
        return lengths

    def _exchange_lengths(self, time: int, device: torch.device) -> list[int]:
        own = torch.tensor([time], device=device)
        others = [rank for rank in range(self.size) if rank != self.rank]
        received = {rank: [torch.empty_like(own)] for rank in others}
        self.exchange({rank: [own] for rank in others}, received)
        return [time if rank == self.rank else int(received[rank][0]) for rank in range(self.size)]

    def exchange(self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[Tensor]]) -> None:
        """Sends tensors to other ranks and receives theirs, all at once, so that no cycle of ranks can deadlock.

        Args:
            outgoing: the tensors for each receiving rank.
            incoming: tensors to fill for each sending rank, as many and of the same shapes as that rank sends.
        """
        messages: list[dist.P2POp] = []
        for direction, peers in ((dist.irecv, incoming), (dist.isend, outgoing)):
            for peer, tensors in peers.items():
                peer = peer if self.group is None else dist.get_global_rank(self.group, peer)
                # Empty tensors are not sent: both sides know that they are empty.
                tagged = [(tag, tensor) for tag, tensor in enumerate(tensors) if tensor.numel()]
                messages += [dist.P2POp(direction, tensor, peer, self.group, tag) for tag, tensor in tagged]
        self.sent_bytes += sum(tensor.nbytes for tensors in outgoing.values() for tensor in tensors)
        if messages:
            for request in dist.batch_isend_irecv(messages):
                request.wait()


def split_evenly(seq_len: int, ranks: int, block: int) -> list[int]:
    """Lengths of shards of whole blocks, as equal as possible, the longer ones first; the last block may be incomplete.

    Raises:
        ValueError: if there are fewer blocks than ranks.
    """
    blocks = -(-seq_len // block)
    if blocks < ranks:
        raise ValueError(f"{seq_len} tokens are {blocks} chunks of {block}, too few for {ranks} ranks")
    ends = accumulate(blocks // ranks + (rank < blocks % ranks) for rank in range(ranks))
    return [stop - start for start, stop in pairwise([0, *(min(end * block, seq_len) for end in ends)])]


def ring_sent_bytes(lengths: Sequence[int], rank: int, *, kv_heads: int, head_dim: int, itemsize: int, batch_size: int = 1) -> int:
    """Bytes that `rank` sends in a forward pass of ring attention: the K and V of all shards except the next rank's own.

    With P shards of n/P tokens that is 2·(P − 1)·(n/P)·kv_heads·head_dim numbers per sequence (arXiv:2310.01889, section 3).
    """
    passed_on = sum(lengths) - lengths[(rank + 1) % len(lengths)]
    return 2 * passed_on * batch_size * kv_heads * head_dim * itemsize
