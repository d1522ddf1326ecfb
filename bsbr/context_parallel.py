"""BSBR over a sequence that is cut into shards, one per rank: ranks send meta keys and chunk states instead of keys and values.

A rank attends inside its own chunks and computes their states without the others. Of each earlier chunk it only needs h_s and
F_s, per kv head (d_r + 1)·d numbers instead of the 2·B·d of the chunk's keys and values. Messages are point to point: forward to
later ranks only, in the backward pass to earlier ranks only.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bsbr.backends.pytorch import chunk_states, local_attention, read_out, unit_norm
from bsbr.backends.retrieval import retrieve
from bsbr.inputs import BSBRInputs, BSBROptions, ChunkMemory
from bsbr.interface import Attention
from bsbr.process_group import SequenceGroup
from bsbr.validation import check_inputs

if TYPE_CHECKING:  # builds of torch without distributed support lack the name
    from torch.distributed import ProcessGroup


def context_parallel_bsbr_attention(
    inputs: BSBRInputs,
    options: BSBROptions,
    group: "ProcessGroup | SequenceGroup | None" = None,
    *,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Computes this rank's shard of `bsbr_attention` over the shards of all ranks, joined along time, on the torch backend.

    Every rank must call it and, for gradients, every rank must call backward: each gets the gradient of the sum of all ranks'
    losses. Differentiable once. A rank holds the states of all chunks before its shard and sends `sent_bytes` bytes.

    Args:
        inputs: the tensors of this rank's shard. Every shard but the last consists of whole chunks; none is empty. There is a
            meta key for every chunk, except that it may be missing for the last chunk of the last rank.
        options: see `BSBROptions`, the same on all ranks.
        group: the ranks in the order of their shards; None is the default process group. A `SequenceGroup` counts sent bytes.
        lengths: tokens of each rank's shard; if neither this nor `group` gives them, the ranks exchange them.

    Returns:
        [batch, heads, time of the shard, head_dim].

    Raises:
        RuntimeError: if there is no process group.
        ValueError: if shards are not whole chunks (on all ranks), or as `bsbr_attention`.
    """
    group = group if isinstance(group, SequenceGroup) else SequenceGroup(group)
    lengths = group.shard_lengths(inputs.q.shape[-2], inputs.q.device, options.chunk_size, lengths)
    chunks = options.num_chunks(inputs.q.shape[-2])
    retrievable = chunks - 1 if group.rank == group.size - 1 else chunks
    check_inputs(inputs, options, retrievable=retrievable)
    q, k, v = inputs.q, inputs.k, inputs.v
    q_features = unit_norm(q) if inputs.q_features is None else inputs.q_features
    k_features = unit_norm(k) if inputs.k_features is None else inputs.k_features

    states = chunk_states(k_features, v, options.chunk_size, retrievable, inputs.beta)
    shared = [inputs.meta_key[:, :, :retrievable], states, *([k, v] if options.chunk_overlap else [])]
    local = [q, inputs.meta_query, q_features, *([] if inputs.gain is None else [inputs.gain])]
    routes = _routes(lengths, options)
    exchanged = cast(tuple[Tensor, ...], _Exchange.apply(group, routes, len(shared), *shared, *local))  # type: ignore[no-untyped-call]
    q, meta_query, q_features, *gain = exchanged[: len(local)]
    earlier = _by_kind(exchanged[len(local) :], len(shared))

    if options.chunk_overlap:
        k, v = torch.cat([*earlier.keys, k], dim=2), torch.cat([*earlier.values, v], dim=2)
    output = local_attention(
        q, k, v, chunk_size=options.chunk_size, chunk_overlap=options.chunk_overlap, dropout_p=options.dropout_p
    )
    first = sum(lengths[: group.rank]) // options.chunk_size
    if first + chunks == 1:
        return output
    # The shard's own last chunk is retrieved by later ranks only, so its meta key is left out here.
    memory = ChunkMemory(earlier.meta_keys, earlier.states).followed_by(inputs.meta_key[:, :, : chunks - 1], states)
    retrieved = retrieve(
        meta_query,
        memory,
        first=first,
        top_k=options.top_k,
        gain=gain[0] if gain else None,
        normalise=options.normalise,
        dropout_p=options.dropout_p,
    )
    return output + read_out(q_features, retrieved, options.chunk_size)


class ContextParallel(nn.Module):
    """An attention over a sequence cut into shards: `ContextParallel(attention)(shard)` is the shard of `attention(sequence)`.

    A rank's parameters get the gradient of its own part. The sum over ranks is the gradient of the whole sequence, and the caller
    has to take it: by all_reduce of every `grad`, or by DistributedDataParallel around this module. DistributedDataParallel
    takes the mean, so multiply each rank's loss by the number of ranks. Give it a separate process group, so that its messages
    cannot be confused with those of this module.

    Args:
        attention: one that implements `Attention.context_parallel_forward`, with the same parameters on every rank.
        group: a `SequenceGroup`, or the process group to make one from; None is the default process group.
    """

    def __init__(self, attention: Attention, group: "ProcessGroup | SequenceGroup | None" = None) -> None:
        super().__init__()
        self.attention = attention
        self.group = group if isinstance(group, SequenceGroup) else SequenceGroup(group)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, time of this rank's shard, hidden_dim] -> the same shape."""
        return self.attention.context_parallel_forward(hidden_states, self.group)


# --- messages -------------------------------------------------------------------------------------


class Route(NamedTuple):
    """The part of its shard that a rank sends to a later one: chunks (h and F), and tokens of the overlap (k and v)."""

    chunks: slice
    tokens: slice

    def parts(self, number: int) -> list[slice]:
        """Slices along dimension 2 of the first `number` of the shared tensors h, F, k and v."""
        return [self.chunks, self.chunks, self.tokens, self.tokens][:number]


Routes = dict[tuple[int, int], Route]
"""Routes by (sender, receiver)."""


def _routes(lengths: Sequence[int], options: BSBROptions) -> Routes:
    starts = [0, *accumulate(lengths)]

    def route(sender: int, receiver: int) -> Route:
        chunks, time = lengths[sender] // options.chunk_size, lengths[sender]
        earliest_visible = starts[receiver] - options.chunk_overlap - starts[sender]
        return Route(slice(0, chunks), slice(min(max(0, earliest_visible), time), time))

    return {(sender, receiver): route(sender, receiver) for receiver in range(len(lengths)) for sender in range(receiver)}


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
    """Bytes that `rank` sends in a forward and in a backward pass.

    Forward, `rank` sends to each later rank (d_r + 1)·d numbers per own chunk and kv head, and 2·d per own token in that rank's
    overlap. Backward, it sends to each earlier rank the gradients of what it received from it. If shard lengths are not known,
    8 bytes to each other rank are added.

    Args:
        lengths: tokens of each rank's shard.
        rank: the sender.
        chunk_size, chunk_overlap: see `BSBROptions`.
        kv_heads, head_dim, feature_dim, batch_size: sizes of the tensors; feature_dim is d_r.
        itemsize: bytes of a number.

    Returns:
        (forward, backward), without the exchange of lengths.
    """
    forward = backward = 0
    for (sender, receiver), (chunks, tokens) in _routes(lengths, BSBROptions(chunk_size, chunk_overlap)).items():
        numbers = (chunks.stop - chunks.start) * (feature_dim + 1) * head_dim + (tokens.stop - tokens.start) * 2 * head_dim
        size = batch_size * kv_heads * numbers * itemsize
        forward += size if sender == rank else 0
        backward += size if receiver == rank else 0
    return forward, backward


class _Exchange(torch.autograd.Function):
    """Sends parts of the shared tensors to later ranks and returns the local tensors and the parts of all earlier ranks.

    Shared tensors [batch, heads, chunks or tokens, ...] are h, F and, if there is an overlap, k and v. Backward sends the
    gradient of each part to the rank that sent the part, and sums the gradients that come back.

    The local tensors are returned unchanged. They make every output depend on this function, so that its backward runs on every
    rank. Without them it would not run on the first rank, which receives nothing, and the other ranks would wait for it. As a
    consequence every rank has a gradient for all parameters, zero for those without influence.
    """

    @staticmethod
    def forward(ctx: Any, group: SequenceGroup, routes: Routes, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The local tensors, then the `number` parts of each earlier rank; `tensors` are the shared ones, then the local ones."""
        shared, local = tensors[:number], tensors[number:]
        ctx.group = group
        ctx.senders = {rank: routes[rank, group.rank].parts(number) for rank in range(group.rank)}
        ctx.receivers = {rank: routes[group.rank, rank].parts(number) for rank in range(group.rank + 1, group.size)}
        ctx.shared = [(tensor.new_empty(0), tensor.shape) for tensor in shared]
        outgoing = {
            receiver: [tensor[:, :, part].contiguous() for tensor, part in zip(shared, parts, strict=True)]
            for receiver, parts in ctx.receivers.items()
        }
        incoming = {sender: _empty_parts(ctx.shared, parts) for sender, parts in ctx.senders.items()}
        group.exchange(outgoing, incoming)
        return *local, *(part for parts in incoming.values() for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        number = len(ctx.shared)
        num_local = len(gradients) - number * len(ctx.senders)
        parts_of_gradients = iter(gradients[num_local:])
        outgoing = {sender: [next(parts_of_gradients).contiguous() for _ in range(number)] for sender in ctx.senders}
        incoming = {receiver: _empty_parts(ctx.shared, parts) for receiver, parts in ctx.receivers.items()}
        ctx.group.exchange(outgoing, incoming)
        shared_gradients = []
        for index, (like, shape) in enumerate(ctx.shared):
            total = like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))
            for receiver, parts in ctx.receivers.items():
                total[:, :, parts[index]] += incoming[receiver][index]
            shared_gradients.append(total.to(like.dtype))
        return None, None, None, *shared_gradients, *gradients[:num_local]


class _Earlier(NamedTuple):
    """The parts of all earlier ranks in their order; keys and values are empty where there is no overlap."""

    meta_keys: Sequence[Tensor]
    states: Sequence[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


def _by_kind(received: Sequence[Tensor], number: int) -> _Earlier:
    """Sorts `received`, which holds `number` parts per rank, rank after rank."""
    return _Earlier(*(received[index::number] if index < number else () for index in range(4)))


def _empty_parts(shared: Sequence[tuple[Tensor, torch.Size]], parts: Sequence[slice]) -> list[Tensor]:
    """Uninitialised tensors for parts along dimension 2 of the shared tensors."""
    sizes = (part.stop - part.start for part in parts)
    return [like.new_empty(*shape[:2], size, *shape[3:]) for (like, shape), size in zip(shared, sizes, strict=True)]
