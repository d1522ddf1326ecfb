"""BSBR over a sequence that is cut into shards, one a rank: ranks send meta keys and chunk states instead of keys and values.

A rank attends inside its own chunks and makes their states as if it were alone. What it needs of earlier ranks is what BSBR
keeps of a chunk anyway, h_s and F_s: (d_r + 1)·d numbers instead of the 2·B·d of its keys and values. Ranks send point to
point and only to later ranks; gradients go the opposite way.
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
    """`bsbr_attention` of all ranks' inputs joined along time; returns this rank's shard of the result.

    Every rank must call it and, for gradients, every rank must call backward: each gets the gradient of the sum of all ranks'
    losses. Differentiable once. A rank holds the states of all chunks before it; `sent_bytes` is what it sends.

    Args:
        inputs: the tensors of this rank's shard. Every shard but the last is whole chunks; none is empty. There is a meta key
            for every chunk; only on the last rank may that of the last chunk be missing, which no chunk retrieves.
        options: see `BSBROptions`, the same on all ranks.
        group: the ranks in the order of their shards; None is the default process group. A `SequenceGroup` counts sent bytes.
        lengths: tokens of each rank's shard; if neither this nor `group` gives them, the ranks exchange them.

    Returns:
        [batch, heads, time of the shard, head_dim].

    Raises:
        ValueError: on all ranks alike, if shards are not whole chunks; else as `bsbr_attention`.
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

    A rank's parameters get the gradient of its own part; summed over ranks these are the gradients of the whole sequence. The
    caller sums them: by all_reduce of every `grad`, or by DistributedDataParallel around this module, whose mean is that sum
    if each rank's loss is multiplied by the number of ranks. It must have a process group of its own, so that its messages and
    these cannot overtake each other.

    Args:
        attention: any that implements `Attention.context_parallel_forward`, with the same parameters on every rank.
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
    """What a rank sends to a later one: which of its chunks, and, for the overlap, which of its tokens."""

    chunks: slice
    tokens: slice

    def parts(self, number: int) -> list[slice]:
        """Along time, for the first `number` of the shared tensors h, F, k and v."""
        return [self.chunks, self.chunks, self.tokens, self.tokens][:number]


Routes = dict[tuple[int, int], Route]
"""By sender and receiver."""


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

    For each chunk and kv head (d_r + 1)·d numbers go to each later rank, and as gradients to each earlier one; so do 2·d numbers
    for each token that a later rank's overlap sees. Shard lengths, 8 bytes to each other rank, come on top if they are exchanged.

    Args:
        lengths: tokens of each rank's shard.
        rank: the sender.
        chunk_size, chunk_overlap: see `BSBROptions`.
        kv_heads, head_dim, feature_dim, batch_size: sizes of the tensors; feature_dim is d_r.
        itemsize: bytes of a number.
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
    gradient of each part to where the part came from, and sums the gradients that come back.

    The local tensors are returned unchanged. They tie this function to every output and every parameter: on a rank where it had
    no part in the result, such as the first, which receives nothing, its backward would not run, and the other ranks would wait
    for it. So every rank also has a gradient for all parameters, zero where it had no part.
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
    """Sorts `received`, which has `number` parts of one rank after those of another."""
    return _Earlier(*(received[index::number] if index < number else () for index in range(4)))


def _empty_parts(shared: Sequence[tuple[Tensor, torch.Size]], parts: Sequence[slice]) -> list[Tensor]:
    """Uninitialised tensors for these parts along time of tensors like these."""
    sizes = (part.stop - part.start for part in parts)
    return [like.new_empty(*shape[:2], size, *shape[3:]) for (like, shape), size in zip(shared, sizes, strict=True)]
