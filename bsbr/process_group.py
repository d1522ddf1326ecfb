"""The wire between ranks that share one sequence: who holds which stretch of it, and messages that are counted."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # builds of torch without ranks have no such name, and every attention names `Ranks`
    from torch.distributed import ProcessGroup


class SequenceGroup:
    """The ranks that share a sequence, in the order of their stretches, seen from one of them.

    group: a process group of torch.distributed (gloo, NCCL); None is the default one. lengths: how many tokens each
    rank holds, where that is known; otherwise the ranks tell each other in every call, 8 bytes to each.

    sent_bytes: of all tensors that this rank has handed to torch.distributed, once for every rank that they went to.
    Raises RuntimeError if there is no process group, or this process is not in it.
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
        """How many tokens each rank holds, this one `time`: multiples of `block` on all ranks but the last, nowhere none.

        lengths: what they are, if that is known here. Raises ValueError, on all ranks alike, if they are not as said.
        """
        known = self.lengths if lengths is None else list(lengths)
        lengths = self._ask(time, device) if known is None else known
        if lengths[self.rank] != time:
            raise ValueError(f"rank {self.rank} was to hold {lengths[self.rank]} tokens by its lengths, got {time}")
        if min(lengths) < 1:
            raise ValueError(f"every rank must hold at least one token, got stretches of {lengths}; use fewer ranks")
        if any(length % block for length in lengths[:-1]):
            raise ValueError(
                f"all stretches but the last must be whole chunks, multiples of {block} tokens, got {lengths}; "
                "cut the sequence where a chunk ends"
            )
        return lengths

    def _ask(self, time: int, device: torch.device) -> list[int]:
        mine = torch.tensor([time], device=device)
        others = [rank for rank in range(self.size) if rank != self.rank]
        theirs = {rank: [torch.empty_like(mine)] for rank in others}
        self.exchange({rank: [mine] for rank in others}, theirs)
        return [time if rank == self.rank else int(theirs[rank][0]) for rank in range(self.size)]

    def exchange(self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[Tensor]]) -> None:
        """Sends to each rank its tensors, and fills those that come from each; both sides name as many, of the same shapes.

        Everything is under way at once, so that no order of ranks can make them wait for each other in a circle.
        """
        messages: list[dist.P2POp] = []
        for direction, peers in ((dist.irecv, incoming), (dist.isend, outgoing)):
            for peer, tensors in peers.items():
                peer = peer if self.group is None else dist.get_global_rank(self.group, peer)
                # An empty tensor is not sent: both sides know that there is none.
                numbered = [(tag, tensor) for tag, tensor in enumerate(tensors) if tensor.numel()]
                messages += [dist.P2POp(direction, tensor, peer, self.group, tag) for tag, tensor in numbered]
        self.sent_bytes += sum(tensor.nbytes for tensors in outgoing.values() for tensor in tensors)
        if messages:
            for request in dist.batch_isend_irecv(messages):
                request.wait()


def split_evenly(seq_len: int, ranks: int, block: int) -> list[int]:
    """Lengths of the stretches that share a sequence's blocks as evenly as whole blocks can be, the larger ones first."""
    blocks = -(-seq_len // block)
    if blocks < ranks:
        raise ValueError(f"{seq_len} tokens are {blocks} chunks of {block}, too few for {ranks} ranks")
    ends = accumulate(blocks // ranks + (rank < blocks % ranks) for rank in range(ranks))
    return [stop - start for start, stop in pairwise([0, *(min(end * block, seq_len) for end in ends)])]


def ring_sent_bytes(lengths: Sequence[int], rank: int, *, kv_heads: int, head_dim: int, itemsize: int, batch_size: int = 1) -> int:
    """Bytes that `rank` sends forward in ring attention: every stretch of K and V passes it, but for the next rank's own.

    2·(P − 1)·(n/P)·kv_heads·head_dim numbers where all stretches are alike. Liu 2023, arXiv:2310.01889, section 3.
    """
    passing = sum(lengths) - lengths[(rank + 1) % len(lengths)]
    return 2 * passing * batch_size * kv_heads * head_dim * itemsize
