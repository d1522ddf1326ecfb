"""BSBR of a segment by the C++ operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bsbr.backends.cpp.functions import (
    SequenceResult,
    chunk_states,
    empty_like_heads,
    gain_column,
    output,
    run_sequence,
    whole_sequence,
)
from bsbr.backends.cpp.operators import KERNELS
from bsbr.backends.retrieval import mix_states, norm_factors, retrieve
from bsbr.inputs import EMPTY_MEMORY, BSBRInputs, BSBROptions, ChunkMemory, ChunkRoom, Segment

GROUP = 64
"""Number of chunks that are stored, mixed and read out together without gradients. A smaller group reads all earlier states more
often; a larger one evicts new states from the cache before it reads them."""

FEW_ROWS = 24
"""Fewer rows than this, as in decoding, are mixed by torch's matrix product: packing the states would cost more than it saves."""


def unsupported(inputs: BSBRInputs, options: BSBROptions) -> str | None:
    """Why the C++ backend cannot take these inputs, as a sentence; None if it can. May compile the library."""
    return KERNELS.unsupported(*inputs.typed_tensors(), dropout_p=options.dropout_p)


def attend(inputs: BSBRInputs, options: BSBROptions) -> Tensor:
    """BSBR of a whole sequence of inputs that are supported: [batch, heads, time, head_dim]; differentiable."""
    if options.top_k is not None:
        return segment(inputs, options).output
    if _needs_gradients(inputs, EMPTY_MEMORY):
        return whole_sequence(*inputs, options)
    return run_sequence(inputs, options, GROUP).output


def segment(inputs: BSBRInputs, options: BSBROptions, past: ChunkMemory = EMPTY_MEMORY) -> Segment:
    """`bsbr.backends.pytorch.segment` of inputs that are supported; differentiable."""
    if _needs_gradients(inputs, past):
        return _differentiable_segment(inputs, options, past)
    if past.num_chunks or options.top_k is not None:
        return _segment_in_groups(inputs, options, past)
    return _segment_of(run_sequence(inputs, options, GROUP), inputs, options, 0)


def segment_in_room(inputs: BSBRInputs, options: BSBROptions, room: ChunkRoom) -> Segment:
    """`segment` in one operator, without gradients and `top_k`, after the chunks of `room`, which receives its states."""
    stored = room.filled + inputs.meta_key.shape[2]
    memory = room.meta_keys[:, :, :stored], room.states[:, :, :stored]
    return _segment_of(run_sequence(inputs, options, GROUP, memory, room.filled), inputs, options, room.filled)


def _segment_of(sequence: SequenceResult, inputs: BSBRInputs, options: BSBROptions, first: int) -> Segment:
    last = sequence.mixed[:, :, (inputs.meta_query.shape[2] - 1) % sequence.mixed.shape[2]]
    if first + inputs.meta_query.shape[2] == 1:  # the first chunk retrieves nothing
        last = torch.zeros_like(last)
    return Segment(sequence.output, sequence.states[:, :, first:], _scaled(last.unsqueeze(2), inputs, options).squeeze(2))


def _needs_gradients(inputs: BSBRInputs, past: ChunkMemory) -> bool:
    earlier = (*past.meta_keys, *past.states)
    return torch.is_grad_enabled() and (inputs.require_grad() or any(page.requires_grad for page in earlier))


def _differentiable_segment(inputs: BSBRInputs, options: BSBROptions, past: ChunkMemory) -> Segment:
    keys, values = _stored(inputs)
    size, chunks = options.chunk_size, inputs.meta_key.shape[2]
    states = chunk_states(keys, values, inputs.beta, size, chunks, inputs.k_features is None)
    retrieved = retrieve(
        inputs.meta_query,
        past.followed_by(inputs.meta_key, states),
        first=past.num_chunks,
        top_k=options.top_k,
        gain=inputs.gain,
        normalise=options.normalise,
        select=_select_top_k,
    )
    attended = inputs.q, inputs.k, inputs.v, inputs.q_features, retrieved
    return Segment(output(*attended, size, options.chunk_overlap, past.num_chunks), states, retrieved[:, :, -1])


def _segment_in_groups(inputs: BSBRInputs, options: BSBROptions, past: ChunkMemory) -> Segment:
    """Stores, mixes and reads out `GROUP` chunks at a time, without gradients."""
    q, k, v = inputs.q, inputs.k, inputs.v
    keys, values = _stored(inputs)
    size, time, before = options.chunk_size, q.shape[2], k.shape[2] - q.shape[2]
    rows, chunks = inputs.meta_query.shape[2], inputs.meta_key.shape[2]
    states = v.new_empty(*v.shape[:2], chunks, keys.shape[3], v.shape[3])
    beta = None if inputs.beta is None else inputs.beta.to(v.dtype).unsqueeze(3)
    gain = gain_column(inputs.gain)
    written = empty_like_heads(q)
    for start in range(0, rows, GROUP):
        stop = min(rows, start + GROUP)
        stored = min(stop, chunks)  # chunks that have a state when this group is done
        tokens = slice(start * size, min(time, stop * size))
        complete = slice(tokens.start, stored * size)
        new = keys[:, :, complete], values[:, :, complete], None if beta is None else beta[:, :, complete]
        torch.ops.bsbr.chunk_states(*new, states[:, :, start:stored], size, inputs.k_features is None)
        retrieved = retrieve(
            inputs.meta_query[:, :, start:stop],
            past.followed_by(inputs.meta_key[:, :, :stored], states),
            first=past.num_chunks + start,
            top_k=options.top_k,
            select=_select_top_k,
            mix=_mix_states,
        )
        features = None if inputs.q_features is None else inputs.q_features[:, :, tokens]
        visible = slice(max(0, before + tokens.start - options.chunk_overlap), before + tokens.stop)
        attended = q[:, :, tokens], k[:, :, visible], v[:, :, visible], features, retrieved, gain, written[:, :, tokens]
        seen = past.num_chunks + start
        torch.ops.bsbr.attend(*attended, size, options.chunk_overlap, seen, options.normalise)
    return Segment(written, states, _scaled(retrieved[:, :, -1:], inputs, options).squeeze(2))


def _scaled(mixed: Tensor, inputs: BSBRInputs, options: BSBROptions) -> Tensor:
    """g F̄ of sums of states [batch, heads, rows, d_r, head_dim]."""
    if options.normalise:
        mixed = mixed * norm_factors(mixed)
    return mixed if inputs.gain is None else mixed * inputs.gain.view(-1, 1, 1, 1)


def _stored(inputs: BSBRInputs) -> tuple[Tensor, Tensor]:
    """Keys and values from which the segment's states are computed, without the overlap; keys are φ(k) if given."""
    before = inputs.k.shape[2] - inputs.q.shape[2]
    return inputs.k[:, :, before:] if inputs.k_features is None else inputs.k_features, inputs.v[:, :, before:]


def _select_top_k(scores: Tensor, top_k: int, first: int) -> Tensor:
    """`bsbr.backends.retrieval.select_top_k` in one pass over the visible chunks of each row."""
    selected = torch.empty(*scores.shape[:3], top_k, dtype=torch.int64, device="cpu")
    torch.ops.bsbr.select_top_k(scores, selected, first)
    return selected


def _mix_states(weights: Tensor, sizes: Sequence[int], states: Sequence[Tensor], first: int) -> Tensor:
    """`bsbr.backends.retrieval.mix_states` over the visible chunks of each row only."""
    if weights.shape[2] < FEW_ROWS:
        return mix_states(weights, sizes, states, first)
    mixed = weights.new_empty(*weights.shape[:3], states[0].shape[3])
    start = 0
    for part, chunks, page in zip(weights.split([*sizes], dim=-1), sizes, states, strict=True):
        torch.ops.bsbr.mix_states(part, page[:, :, :chunks].to(part.dtype), mixed, first - start, start > 0)
        start += chunks
    return mixed
