"""Retrieval per token by C++ functions, and the torch operators torch.ops.bsbr_token.* over them; without gradients.

Tensors are [batch, heads or kv_heads, time, dim] unless a docstring says otherwise. The caller allocates what an operator writes.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.backends.cpp.calls import Kernels
from bsbr.backends.cpp.functions import empty_like_heads
from bsbr.backends.cpp.operators import ChunkSizes
from bsbr.token_retrieval.inputs import (
    ChunkTable,
    Memory,
    TokenRetrievalInputs,
    TokenRetrievalOptions,
    TokenSegment,
)
from bsbr.token_retrieval.pytorch import Readers

KERNELS = Kernels(Path(__file__).with_name("kernels.cpp"), "bsbr_token")
"""The functions of kernels.cpp."""


class TokenSizes(NamedTuple):
    """`TokenSizes` of kernels.cpp."""

    batch: int
    heads: int
    kv_heads: int
    time: int
    chunk_size: int
    seen: int
    chunks: int
    head_dim: int
    features: int
    candidates: int


class PageSizes(NamedTuple):
    """`PageSizes` of kernels.cpp."""

    batch: int
    heads: int
    kv_heads: int
    pages: int
    page: int
    last: int
    head_dim: int
    features: int
    candidates: int
    type: int


def unsupported(inputs: TokenRetrievalInputs, options: TokenRetrievalOptions) -> str | None:
    """Why C++ cannot take these inputs, as a sentence; None if it can. May compile the library."""
    if options.router != "energy":
        return f'the C++ backend has the router "energy", got router="{options.router}"'
    tensors = [x for x in inputs if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "the C++ backend of retrieval per token computes no gradients"
    return KERNELS.unsupported(*(x for x in tensors if x is not inputs.beta), dropout_p=options.dropout_p)


def segment(inputs: TokenRetrievalInputs, options: TokenRetrievalOptions, chunks: int, past: Memory = ()) -> TokenSegment:
    """`bsbr.token_retrieval.pytorch.segment` of inputs that are supported."""
    q, k, v, q_features, k_features, beta, *_ = inputs
    (batch, _, time, head_dim), kv_heads, features = q.shape, k.shape[1], q_features.shape[3]
    before, size = k.shape[2] - time, options.chunk_size
    rates = None if beta is None else beta.to(v.dtype).unsqueeze(3)
    keys = v.new_empty(batch, kv_heads, chunks, features)
    states = v.new_empty(batch, kv_heads, chunks, features, head_dim)
    torch.ops.bsbr_token.stored(k_features, v[:, :, before:], rates, states, keys, size)
    table = ChunkTable.rounded(keys, states, options.state_dtype)
    exact = table.exact(v.dtype)  # as they are read: rounded
    if past:
        keys = torch.cat([*(one.keys for one in past), keys], dim=2)
        exact = torch.cat([*(one.exact(v.dtype) for one in past), exact], dim=2)
    out = empty_like_heads(q)
    torch.ops.bsbr_token.local(q, k, v, out, size, options.chunk_overlap)
    seen = sum(one.num_chunks for one in past)
    candidates = exact.shape[2] if options.candidates is None else min(options.candidates, exact.shape[2])
    parameters = [x.detach().view(1, 1, -1, 1) for x in (inputs.gain, inputs.exponent) if x is not None]
    torch.ops.bsbr_token.retrieve(q_features, keys, exact, *parameters, out, size, seen, candidates)
    return TokenSegment(out, table)


@KERNELS.operator("stored(Tensor keys, Tensor v, Tensor? beta, Tensor(a!) states, Tensor(b!) ones, int chunk_size) -> int")
def _stored(keys: Tensor, v: Tensor, beta: Tensor | None, states: Tensor, ones: Tensor, chunk_size: int) -> int:
    """Writes F_s and z_s of as many chunks as `states` [batch, kv_heads, chunks, d_r, head_dim] has; beta: [.., time, 1]."""
    (batch, kv_heads, time, features), chunks = keys.shape, states.shape[2]
    sizes = ChunkSizes(batch, kv_heads, kv_heads, time, 0, chunk_size, 0, chunks, 0, v.shape[3], features, False, False, False)
    return KERNELS.call("stored", sizes, keys, v, beta, states, ones)


@KERNELS.operator("local(Tensor q, Tensor k, Tensor v, Tensor(a!) out, int chunk_size, int overlap) -> int")
def _local(q: Tensor, k: Tensor, v: Tensor, out: Tensor, chunk_size: int, overlap: int) -> int:
    """Writes softmax(QKᵀ/√d ⊙ M_in) V to `out`; k and v may begin before q."""
    batch, heads, time, head_dim = q.shape
    before, chunks = k.shape[2] - time, -(-time // chunk_size)
    sizes = ChunkSizes(batch, heads, k.shape[1], time, before, chunk_size, overlap, chunks, 0, head_dim, 0, False, False, False)
    return KERNELS.call("local", sizes, q, k, v, out)


@KERNELS.operator(
    "retrieve(Tensor features, Tensor keys, Tensor states, Tensor gain, Tensor exponent, Tensor(a!) out, int chunk_size, int seen, "
    "int candidates) -> int"
)
def _retrieve(features: Tensor, keys: Tensor, states: Tensor, gain: Tensor, exponent: Tensor, out: Tensor, *options: int) -> int:
    """Adds what tokens retrieve to `out`.

    features: φ(q); keys: z [batch, kv_heads, chunks, d_r]; states: F [batch, kv_heads, chunks, d_r, head_dim]; gain and exponent:
    [1, 1, heads, 1]. Token i sees the first seen + i // chunk_size chunks.
    """
    chunk_size, seen, candidates = options
    (batch, heads, time, d_r), (_, kv_heads, chunks, _, head_dim) = features.shape, states.shape
    sizes = TokenSizes(batch, heads, kv_heads, time, chunk_size, seen, chunks, head_dim, d_r, candidates)
    return KERNELS.call("retrieve", sizes, features, keys, states, gain, exponent, out)


# --- decoding -----------------------------------------------------------------------------------


def decodes(token: Readers, options: TokenRetrievalOptions) -> bool:
    """Whether `retrieve_token` can take a token."""
    tensors = token.q_features, token.gain, token.exponent
    return (
        options.router == "energy"
        and not torch.is_grad_enabled()
        and KERNELS.unsupported(*(x for x in tensors if x is not None), dropout_p=options.dropout_p) is None
    )


def retrieve_token(token: Readers, memory: Memory, options: TokenRetrievalOptions, out: Tensor) -> None:
    """Adds what one token retrieves, see `bsbr.token_retrieval.pytorch.retrieve`, to `out` [batch, heads, 1, head_dim].

    memory: all complete chunks, all before the token, in contiguous tables; all but the last have as many chunks as the first.
    """
    memory = [table.each(Tensor.contiguous) for table in memory]
    pages = torch.tensor([[0 if x is None else x.data_ptr() for x in table] for table in memory]).view(1, 1, -1, 3)
    chunks = [memory[0].num_chunks, memory[-1].num_chunks]
    parameters = [x.detach().view(1, 1, -1, 1) for x in (token.gain, token.exponent) if x is not None]
    of_type = (None, "bfloat16", "int8").index(options.state_dtype)
    k = options.candidates or 2**31
    kv_heads = memory[0].keys.shape[1]
    torch.ops.bsbr_token.decode(token.q_features, pages, *parameters, out, kv_heads, *chunks, k, of_type)


@KERNELS.operator(
    "decode(Tensor features, Tensor pages, Tensor gain, Tensor exponent, Tensor(a!) out, int kv_heads, int page, int last, "
    "int candidates, int type) -> int"
)
def _decode(features: Tensor, pages: Tensor, gain: Tensor, exponent: Tensor, out: Tensor, *options: int) -> int:
    """Adds what one token retrieves to `out`. pages: addresses of keys, states and scales of each table [1, 1, tables, 3]."""
    kv_heads, page, last, candidates, kind = options
    (batch, heads, _, d_r), tables = features.shape, pages.shape[2]
    k = min(candidates, (tables - 1) * page + last)
    sizes = PageSizes(batch, heads, kv_heads, tables, page, last, out.shape[3], d_r, k, kind)
    return KERNELS.call("decode", sizes, features, pages, gain, exponent, out)
