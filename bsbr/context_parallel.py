"""BSBR over a sequence that is cut across ranks: between them travel meta keys and chunk states, not keys and values.

A rank attends inside its own chunks and makes their states as if it were alone. What it needs of the ranks before it is
what `bsbr.attention` keeps of a chunk anyway: h_s and F_s, (d_r + 1)·d numbers in place of the 2·B·d of its keys and
values. Ranks talk point to point, and only to later ones; gradients go the same ways back.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from bsbr.backends.pytorch import chunk_states, local_attention, read_out, retrieve, unit_norm
from bsbr.interface import Attention, check_heads
from bsbr.process_group import SequenceGroup
from bsbr.validation import check_inputs, check_options


def context_parallel_bsbr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    h: Tensor,
    *,
    group: ProcessGroup | SequenceGroup | None = None,
    lengths: Sequence[int] | None = None,
    chunk_size: int,
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    beta: Tensor | None = None,
    gain: Tensor | None = None,
    chunk_overlap: int = 0,
    top_k: int | None = None,
    normalise: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """`bsbr_attention` of the concatenation in time of all ranks' arguments: of its result, this rank's stretch.

    Arguments as there, but of this rank's stretch alone. All stretches are whole chunks, of any number, but for the last
    rank's, which may end in an incomplete one; none is empty. h holds the meta key of every chunk, only on the last rank
    may the last one be missing: it is the only chunk that nobody retrieves.
    group: the ranks in the order of their stretches; None is the default process group, and `Ranks` count what they send.
    lengths: tokens of each rank's stretch, which the ranks ask each other where neither this nor `Ranks` tells them.

    Every rank must call it, and, for gradients, every rank must call backward: each gets the gradient of the sum of all
    ranks' losses. Differentiable once. Sent: see `sent_bytes`. A rank holds the states of all chunks before it.
    Raises ValueError, on all ranks alike, if stretches are not as said; else as `bsbr_attention`.
    """
    check_options(chunk_size, chunk_overlap, top_k)
    ranks = group if isinstance(group, SequenceGroup) else SequenceGroup(group)
    lengths = ranks.shard_lengths(q.shape[-2], q.device, chunk_size, lengths)
    check_heads(q, k, v)
    last = ranks.rank == ranks.size - 1
    chunks = -(-q.shape[2] // chunk_size)
    retrievable = chunks - 1 if last else chunks
    check_inputs(q, k, v, r, h, q_features, k_features, beta, gain, chunk_size=chunk_size, retrievable=retrievable)
    q_features = unit_norm(q) if q_features is None else q_features
    k_features = unit_norm(k) if k_features is None else k_features

    states = chunk_states(k_features, v, chunk_size, retrievable, beta)
    travelling = [h[:, :, :retrievable], states, *([k, v] if chunk_overlap else [])]
    staying = [q, r, q_features, *([] if gain is None else [gain])]
    ways = _ways(lengths, chunk_size, chunk_overlap)
    exchanged = _Exchange.apply(ranks, ways, len(travelling), *travelling, *staying)  # type: ignore[no-untyped-call]
    arrived = cast(tuple[Tensor, ...], exchanged)
    q, r, q_features, *gains = arrived[: len(staying)]
    h_before, states_before, k_before, v_before = _before(arrived[len(staying) :], len(travelling))

    if chunk_overlap:
        k, v = _after(k_before, k), _after(v_before, v)
    local = local_attention(q, k, v, chunk_size=chunk_size, chunk_overlap=chunk_overlap, dropout_p=dropout_p)
    first = sum(lengths[: ranks.rank]) // chunk_size
    if first + chunks == 1:
        return local
    retrieved = retrieve(
        r,
        [*h_before, h[:, :, : chunks - 1]],  # the stretch's own last chunk is for later ranks
        [*states_before, states],
        first=first,
        top_k=top_k,
        gain=gains[0] if gains else None,
        normalise=normalise,
        dropout_p=dropout_p,
    )
    return local + read_out(q_features, retrieved, chunk_size)


class ContextParallel(nn.Module):
    """An attention over a sequence that is cut across ranks: `ContextParallel(attention)(stretch)` is the stretch of
    `attention(sequence)`.

    attention: any that knows `Attention.context_parallel_forward`, with the same parameters on every rank. group: see `Ranks`.
    A rank's parameters get the gradient of its own part; summed over ranks, they are those of the whole sequence. That sum
    is the caller's: all_reduce every `grad`, or DistributedDataParallel around it, whose mean is that sum if each rank's
    loss is taken times the number of ranks; in a process group of its own, so that the two cannot overtake each other.
    """

    def __init__(self, attention: Attention, group: ProcessGroup | SequenceGroup | None = None) -> None:
        super().__init__()
        self.attention = attention
        self.ranks = group if isinstance(group, SequenceGroup) else SequenceGroup(group)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [batch, time of this rank's stretch, hidden_dim]. Returns the same shape."""
        return self.attention.context_parallel_forward(hidden_states, self.ranks)


# --- what goes where ------------------------------------------------------------------------------

Ways = dict[tuple[int, int], tuple[slice, slice]]
"""(sender, receiver) -> which of the sender's chunks, and which of its tokens, go there."""


def _ways(lengths: Sequence[int], chunk_size: int, chunk_overlap: int) -> Ways:
    starts = [0, *accumulate(lengths)]

    def way(sender: int, receiver: int) -> tuple[slice, slice]:
        earliest = starts[receiver] - chunk_overlap - starts[sender]
        return slice(0, lengths[sender] // chunk_size), slice(min(max(0, earliest), lengths[sender]), lengths[sender])

    return {(sender, receiver): way(sender, receiver) for receiver in range(len(lengths)) for sender in range(receiver)}


def sent_bytes(
    lengths: Sequence[int],
    rank: int,
    *,
    chunk_size: int,
    kv_heads: int,
    head_dim: int,
    feature_dim: int,
    itemsize: int,
    batch_size: int = 1,
    chunk_overlap: int = 0,
) -> tuple[int, int]:
    """Bytes that `rank` sends forward and backward: (d_r + 1)·d numbers a chunk and head to each later rank, or as gradients
    to each earlier, and 2·d for each token that a later rank's overlap sees.

    By itself a rank tells each other its length besides, 8 bytes each, where `lengths` are not given.
    """
    forward = backward = 0
    for (sender, receiver), (chunks, tokens) in _ways(lengths, chunk_size, chunk_overlap).items():
        numbers = (chunks.stop - chunks.start) * (feature_dim + 1) * head_dim + (tokens.stop - tokens.start) * 2 * head_dim
        size = batch_size * kv_heads * numbers * itemsize
        forward += size if sender == rank else 0
        backward += size if receiver == rank else 0
    return forward, backward


class _Exchange(torch.autograd.Function):
    """Gives each travelling tensor's parts to later ranks, and returns theirs from every earlier one.

    travelling: [batch, heads, chunks or tokens, ...]: h, F and, where there is an overlap, k and v. Backward sends each
    part's gradient to where it came from, and sums what comes back.
    The tensors that stay come out as they went in. They tie this node to every output and every parameter: were there a
    rank on which it had no part in the result, such as the first, which receives nothing, its backward would not run,
    and the others would wait for it. So has every rank a gradient for all parameters, zero where it had no part.
    """

    @staticmethod
    def forward(ctx: Any, ranks: SequenceGroup, ways: Ways, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors that stay, then `number` from each earlier rank."""
        travelling, staying = tensors[:number], tensors[number:]
        ctx.ranks = ranks
        ctx.senders = {one: _parts(ways[one, ranks.rank], number) for one in range(ranks.rank)}
        ctx.receivers = {one: _parts(ways[ranks.rank, one], number) for one in range(ranks.rank + 1, ranks.size)}
        ctx.travelling = [(tensor.new_empty(0), tensor.shape) for tensor in travelling]
        outgoing = {
            receiver: [tensor[:, :, part].contiguous() for tensor, part in zip(travelling, parts, strict=True)]
            for receiver, parts in ctx.receivers.items()
        }
        incoming = {sender: _empty(ctx.travelling, parts) for sender, parts in ctx.senders.items()}
        ranks.exchange(outgoing, incoming)
        return *staying, *(piece for pieces in incoming.values() for piece in pieces)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        number = len(ctx.travelling)
        stayed = len(gradients) - number * len(ctx.senders)
        pieces = iter(gradients[stayed:])
        outgoing = {sender: [next(pieces).contiguous() for _ in range(number)] for sender in ctx.senders}
        incoming = {receiver: _empty(ctx.travelling, parts) for receiver, parts in ctx.receivers.items()}
        ctx.ranks.exchange(outgoing, incoming)
        returned = []
        for index, (like, shape) in enumerate(ctx.travelling):
            total = like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))
            for receiver, parts in ctx.receivers.items():
                total[:, :, parts[index]] += incoming[receiver][index]
            returned.append(total.to(like.dtype))
        return None, None, None, *returned, *gradients[:stayed]


def _before(arrived: Sequence[Tensor], number: int) -> tuple[Sequence[Tensor], ...]:
    """h, F, k and v of all earlier ranks in their order; k and v are empty where they do not travel."""
    return tuple(arrived[index::number] if index < number else () for index in range(4))


def _after(before: Sequence[Tensor], own: Tensor) -> Tensor:
    return torch.cat([*before, own], dim=2) if before else own


def _parts(way: tuple[slice, slice], number: int) -> list[slice]:
    """Of h and F the chunks, of k and v, where they travel, the tokens."""
    chunks, tokens = way
    return [chunks, chunks, tokens, tokens][:number]


def _empty(travelling: Sequence[tuple[Tensor, torch.Size]], parts: Sequence[slice]) -> list[Tensor]:
    """Room for these parts in time of tensors like these."""
    sizes = (part.stop - part.start for part in parts)
    return [like.new_empty(*shape[:2], size, *shape[3:]) for (like, shape), size in zip(travelling, sizes, strict=True)]
