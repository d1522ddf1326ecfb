"""BSBR as the attention "bsbr" of transformers: attention function, mask function, and the hook that passes the cache layer.

Importing this module registers both functions with transformers.
"""

import inspect
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from bsbr.convert.retrieval import Retrieval
from bsbr.convert.streaming import StreamingLayer
from bsbr.padding import check_mask_values, pack

ATTENTION_NAME = "bsbr"
"""Name of the attention in `config._attn_implementation`."""

LAYER_KEYWORD = "bsbr_cache_layer"
"""Keyword argument that carries the cache layer through the library's attention module to the attention function."""


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
    """Attention function of a converted model, called by the library's attention modules.

    Padding does not change the outputs of tokens: chunks begin where they would without it. A module without a `Retrieval` is a
    cross-attention and computes softmax attention.

    Args:
        module: the library's attention module; a converted one has a `retrieval`.
        query: [batch, heads, time, head_dim].
        key, value: [batch, kv_heads, time, head_dim].
        attention_mask: [batch, time], from `padding_mask`, True for tokens, anywhere in a row. In T5, whose bias depends on
            distances, the tokens of a row must be contiguous.
        scaling: factor on the scores; None for 1/√head_dim.
        dropout: dropout probability.
        position_bias: T5's relative bias, [1, heads, time, time].
        kwargs: under `LAYER_KEYWORD`, the cache layer; the rest is ignored.

    Returns:
        [batch, time, heads, head_dim], and None for the weights.

    Raises:
        NotImplementedError: for a mask that is not padding, padding after a cached prefix, or padding between tokens of a T5 row.
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
        return _softmax_attention(query, key, value, attention_mask, position_bias, dropout), None
    layer: StreamingLayer | None = kwargs.get(LAYER_KEYWORD)
    if layer is not None:
        key, value = layer.take_new()
    token_mask = None if attention_mask is None else attention_mask[:, -query.shape[2] :]
    if layer is not None and not layer.is_empty:
        if token_mask is not None and not bool(token_mask.all()):
            raise NotImplementedError("behind a cache a converted model takes tokens and no padding: put it before them")
        return layer.attend(retrieval, query, key, value, position_bias).transpose(1, 2), None
    return _attend_whole(module, retrieval, layer, query, key, value, token_mask, position_bias, dropout), None


def _attend_whole(
    module: nn.Module,
    retrieval: Retrieval,
    layer: StreamingLayer | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor | None,
    position_bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """BSBR of whole sequences, stored in the cache layer if there is one: [batch, time, heads, head_dim]."""
    if token_mask is None:
        attended = _bsbr(module, retrieval, q, k, v, None, position_bias, dropout)
        if layer is not None:
            layer.store_prompt(q, k, v, None, retrieval.chunk_size)
        return attended.transpose(1, 2)
    starts_of_tokens = (token_mask[:, 1:] & ~token_mask[:, :-1]).sum(dim=1) + token_mask[:, 0]
    if position_bias is not None and bool((starts_of_tokens > 1).any()):
        raise NotImplementedError("a converted T5 takes padding at the ends of a row, not between its tokens")
    packed, unpack = pack(torch.cat([q, k, v], dim=1).transpose(1, 2), token_mask)
    q, k, v = packed.transpose(1, 2).split([x.shape[1] for x in (q, k, v)], dim=1)
    packed_mask = token_mask.sort(dim=1, descending=True, stable=True).values
    attended = _bsbr(module, retrieval, q, k, v, packed_mask, position_bias, dropout)
    if layer is not None:
        layer.store_prompt(q, k, v, token_mask, retrieval.chunk_size)
    return unpack(attended.transpose(1, 2))


def _bsbr(
    module: nn.Module,
    retrieval: Retrieval,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor | None,
    position_bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """BSBR of tokens at the front of their rows, causal or not as the module is."""
    bias = None
    if position_bias is not None:  # it depends on distances only, so all chunks have the bias of the first
        size = retrieval.chunk_size
        bias = position_bias[:, :, :size, :size]
        bias = F.pad(bias, (0, size - bias.shape[3], 0, size - bias.shape[2]))
    if module.is_causal:
        return retrieval.causal_attention(q, k, v, bias, dropout)
    return retrieval.bidirectional_attention(q, k, v, token_mask, bias, dropout)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor | None, bias: Tensor | None, dropout: float) -> Tensor:
    """Softmax attention over all tokens of another sequence, for cross-attention: [batch, time, heads, head_dim]."""
    visible = None if token_mask is None else token_mask[:, None, None, :]
    if bias is not None:
        visible = bias if visible is None else bias.where(visible, -torch.inf)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
    return attended.transpose(1, 2)


def padding_mask(
    *, q_length: int, kv_length: int, q_offset: int | Tensor = 0, mask_function: Any, attention_mask: Tensor | None, **_: Any
) -> Tensor | None:
    """Mask function of a converted model: the library calls it to build the mask that `attention` takes.

    Returns:
        [batch, kv_length], True for tokens; None if all are tokens.

    Raises:
        NotImplementedError: for a mask other than causal or bidirectional with padding, or a cache other than DynamicCache.
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


def check_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a stack of layers: refuses arguments that the library would let pass.

    Raises:
        NotImplementedError: if attention weights are asked for.
        ValueError: for a mask of other values than 0 and 1, such as an additive mask, which the library makes boolean.
    """
    asked = kwargs.get("output_attentions")
    if cast(PreTrainedModel, module).config.output_attentions if asked is None else asked:
        raise NotImplementedError("a converted model has no attention weights to output: leave output_attentions False")
    arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    for name in ("attention_mask", "encoder_attention_mask"):
        mask = arguments.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:  # `attention` refuses others
            check_mask_values(mask, name)


def pass_cache_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of each converted attention: passes its cache layer, as a `StreamingLayer`, to `attention`."""
    cache = kwargs.get("cache")
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        return args, kwargs
    return args, {**kwargs, LAYER_KEYWORD: _streaming_layer(cache, module.layer_idx)}  # type: ignore[arg-type]


def _streaming_layer(cache: Cache, index: int) -> StreamingLayer:
    """Layer `index` of the cache, replaced by a `StreamingLayer` while it is empty."""
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


AttentionInterface.register(ATTENTION_NAME, attention)
AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)
