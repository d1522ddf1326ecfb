"""One token of BSBR that continues a chunk, as one C++ operator: small operations of torch take most of the time of decoding."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsbr.backends.cpp.calls import Kernels

KERNELS = Kernels(Path(__file__).with_name("decode.cpp"), "bsbr_decode")
"""The function of decode.cpp."""


class TokenSizes(NamedTuple):
    """`TokenSizes` of decode.cpp."""

    batch: int
    heads: int
    kv_heads: int
    cached: int
    head_dim: int
    factors: int
    features: int
    quadratic: bool


class Token(NamedTuple):
    """Projections of one token.

    Attributes:
        q: [batch, heads, 1, head_dim].
        k, v: [batch, kv_heads, 1, head_dim].
        q_factors, k_factors: φ(q) and φ(k), or if `quadratic` the factors of `bsbr.features.quadratic_features`:
            [batch, heads or kv_heads, 1, any size].
        beta: β [batch, kv_heads, 1, 1], or None for states that are plain sums.
        quadratic: see q_factors.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_factors: Tensor
    k_factors: Tensor
    beta: Tensor | None
    quadratic: bool


class OpenChunk(NamedTuple):
    """The part of `bsbr.streaming.StreamingState` that a token of an open chunk reads; the fields have the same names."""

    keys: Tensor
    values: Tensor
    retrieved: Tensor
    open_state: Tensor


def continue_chunk(token: Token, chunk: OpenChunk) -> tuple[Tensor, OpenChunk]:
    """`bsbr.streaming.continue_chunk` for one token, without gradients.

    Returns:
        [batch, heads, 1, head_dim], stored as [batch, heads · head_dim], and the open chunk after the token. All cached keys stay.

    Raises:
        ValueError: if the state is not that of such tokens.
    """
    q, k, v, q_factors, k_factors, beta, quadratic = token
    keys, values, retrieved, open_state = chunk
    (batch, heads, _, head_dim), kv_heads, (cached, features) = q.shape, k.shape[1], (keys.shape[2], open_state.shape[2])
    expected = (
        (batch, kv_heads, cached, head_dim),
        (batch, kv_heads, cached, head_dim),
        (batch, heads, features, head_dim),
        (batch, kv_heads, features, head_dim),
    )
    if tuple(x.shape for x in chunk) != expected:
        raise ValueError(f"the state must be that of {batch} sequences of this attention, got {[list(x.shape) for x in chunk]}")
    after = OpenChunk(
        k.new_empty(batch, kv_heads, cached + 1, head_dim),
        k.new_empty(batch, kv_heads, cached + 1, head_dim),
        retrieved,
        torch.empty_like(open_state, memory_format=torch.contiguous_format),
    )
    out = q.new_empty(batch, heads, 1, head_dim)
    torch.ops.bsbr_decode.token(
        q, k, v, q_factors, k_factors, beta, keys, values, retrieved.contiguous(), open_state.contiguous(),
        out, after.keys, after.values, after.open_state, quadratic,
    )  # fmt: skip
    return out, after


@KERNELS.operator(
    "token(Tensor q, Tensor k, Tensor v, Tensor q_factors, Tensor k_factors, Tensor? beta, Tensor keys, Tensor values, "
    "Tensor retrieved, Tensor open_state, Tensor(a!) out, Tensor(b!) new_keys, Tensor(c!) new_values, Tensor(d!) new_state, "
    "bool quadratic) -> int"
)
def _token(q: Tensor, k: Tensor, *rest: Any) -> int:
    """Writes `out`, and the open chunk after the token."""
    *tensors, quadratic = rest
    q_factors, keys, state = tensors[1], tensors[4], tensors[7]
    (batch, heads, _, head_dim), kv_heads = q.shape, k.shape[1]
    sizes = TokenSizes(batch, heads, kv_heads, keys.shape[2], head_dim, q_factors.shape[3], state.shape[2], quadratic)
    return KERNELS.call("token", sizes, q, k, *tensors)
