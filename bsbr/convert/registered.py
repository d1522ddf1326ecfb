"""BSBR as transformers' attention "bsbr": the attention function, the mask function, and the hook that brings the cache along."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from bsbr.convert.retrieval import Retrieval
from bsbr.convert.streaming import StreamingLayer
from bsbr.interface import pack

NAME = "bsbr"
"""Of the attention, as `config._attn_implementation` has it."""

LAYER = "bsbr_cache_layer"
"""The keyword by which an attention's cache layer reaches the attention function, past the library's own code."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a pretrained model calls for its attention: [batch, time, heads, head_dim], and no weights.

    query: [batch, heads, time, head_dim]; key, value: [batch, kv_heads, …]. attention_mask: of `mask`, True for tokens, which
    may stand anywhere in a row, but in T5, whose bias counts distances, only together. Padding changes nothing: chunks begin
    where they would without it. Attention to another sequence stays as it was.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(
            f"a converted model takes an attention_mask [batch, time] of padding, got one of {list(attention_mask.shape)}"
        )
    factor = 1.0 if scaling is None else scaling * math.sqrt(query.shape[-1])
    if abs(factor - 1.0) > 1e-12:  # the scores of BSBR are q·k/√d
        query = query * factor
    retrieval = getattr(module, "retrieval", None)
    if retrieval is None:
        return _whole(query, key, value, attention_mask, position_bias, dropout), None
    layer: StreamingLayer | None = kwargs.get(LAYER)
    if layer is not None:
        key, value = layer.take()
    time = query.shape[2]
    real = None if attention_mask is None else attention_mask[:, -time:]
    if layer is not None and not layer.empty:
        if real is not None and not bool(real.all()):
            raise NotImplementedError("behind a cache a converted model takes tokens and no padding: put it before them")
        return layer.attend(retrieval, query, key, value, position_bias).transpose(1, 2), None
    if real is None:
        attended = _attended(retrieval, module, query, key, value, None, position_bias, dropout)
        if layer is not None:
            layer.remember(query, key, value, None, retrieval.chunk_size)
        return attended.transpose(1, 2), None
    if position_bias is not None and bool(((real[:, 1:] & ~real[:, :-1]).sum(dim=1) + real[:, 0] > 1).any()):
        raise NotImplementedError("a converted T5 takes padding at the ends of a row, not between its tokens")
    joined, unpack = pack(torch.cat([query, key, value], dim=1).transpose(1, 2), real)
    q, k, v = joined.transpose(1, 2).split([x.shape[1] for x in (query, key, value)], dim=1)
    in_front = real.sort(dim=1, descending=True, stable=True).values
    attended = _attended(retrieval, module, q, k, v, in_front, position_bias, dropout)
    if layer is not None:
        layer.remember(q, k, v, real, retrieval.chunk_size)
    return unpack(attended.transpose(1, 2)), None


def _attended(
    retrieval: Retrieval,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    position_bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """BSBR of tokens that stand in front of their rows."""
    bias = None
    if position_bias is not None:  # of distances alone: that of the first chunk is every chunk's
        size = retrieval.chunk_size
        bias = position_bias[:, :, :size, :size]
        bias = F.pad(bias, (0, size - bias.shape[3], 0, size - bias.shape[2]))
    if module.is_causal:
        return retrieval.causal(q, k, v, bias, dropout)
    return retrieval.bidirectional(q, k, v, real, bias, dropout)


def _whole(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, bias: Tensor | None, dropout: float) -> Tensor:
    """Softmax over all of another sequence."""
    visible = None if real is None else real[:, None, None, :]
    if bias is not None:
        visible = bias if visible is None else bias.where(visible, -torch.inf)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
    return attended.transpose(1, 2)


def mask(
    *, q_length: int, kv_length: int, q_offset: int | Tensor = 0, mask_function: Any, attention_mask: Tensor | None, **_: Any
) -> Tensor | None:
    """What the library makes of a mask before it calls `attention`: tokens are True, [batch, kv_length]; None, all are.

    Raises NotImplementedError for a mask of anything but padding: BSBR has an order of its own, and would ignore it.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise NotImplementedError(
            "a converted model knows causal and bidirectional attention with padding: for packed sequences or custom masks, give "
            "each sequence a row of its own, with an attention_mask [batch, time]"
        )
    if mask_function is causal_mask_function and (isinstance(q_offset, Tensor) or q_offset + q_length != kv_length):
        raise NotImplementedError("a converted model decodes with a DynamicCache, which is what generate makes by default")
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return F.pad(attention_mask.bool(), (0, kv_length - attention_mask.shape[1]))


def bring_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook of each converted attention: makes its layer of the cache a `StreamingLayer`, and hands it on."""
    cache = kwargs.get("cache")
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        return args, kwargs
    return args, {**kwargs, LAYER: _layer(cache, module.layer_idx)}  # type: ignore[arg-type]


def _layer(cache: Cache, index: int) -> StreamingLayer:
    while len(cache.layers) <= index:
        cache.layers.append(StreamingLayer())
    layer = cache.layers[index]
    if type(layer) is DynamicLayer and not layer.is_initialized:
        layer = cache.layers[index] = StreamingLayer()
    if not isinstance(layer, StreamingLayer):
        raise NotImplementedError(
            f"a converted model decodes with a DynamicCache that it has filled itself, got {type(cache).__name__} "
            f"of {type(layer).__name__}"
        )
    return layer


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
