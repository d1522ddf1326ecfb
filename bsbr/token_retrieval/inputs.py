"""Named arguments of retrieval per token: the tensors, the options, and the memory of complete chunks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bsbr.inputs import BSBROptions
from bsbr.interface import require_positive

Router = Literal["energy", "key", "meta"]
StateDtype = Literal["bfloat16", "int8"]

EPSILON = 1e-6
"""ε of the weights (e + ε)^p: a read of zero has a finite logarithm and gradient."""


class TokenRetrievalInputs(NamedTuple):
    """The tensors of one call. Time is cut into C = ⌈time / chunk_size⌉ chunks, the last one of any length.

    Attributes:
        q: queries [batch, heads, time, head_dim].
        k, v: keys and values [batch, kv_heads, time, head_dim]; kv_heads divides heads.
        q_features: φ(q) [batch, heads, time, d_r].
        k_features: φ(k) [batch, kv_heads, time, d_r].
        beta: β [batch, kv_heads, time], the write strength of the delta rule; None means that states are plain sums.
        meta_query: x [batch, heads, time, head_dim], what chooses among chunks; None means φ(q).
        meta_key: h [batch, kv_heads, complete chunks, head_dim], by which chunks are chosen; None means z_s.
        gain: g [heads], the weight of the retrieved term.
        exponent: p [heads], of the weights; None if the router is "meta".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_features: Tensor
    k_features: Tensor
    beta: Tensor | None
    meta_query: Tensor | None
    meta_key: Tensor | None
    gain: Tensor
    exponent: Tensor | None

    @property
    def selector(self) -> Tensor:
        """What is compared with the keys of chunks: the meta queries, or else φ(q)."""
        return self.q_features if self.meta_query is None else self.meta_query


@dataclass(frozen=True)
class TokenRetrievalOptions:
    """The settings of one call.

    Attributes:
        chunk_size: B, tokens in a chunk.
        chunk_overlap: number of tokens before its chunk that a token also attends to.
        router: what the weights of the candidates are made of: "energy", the squared norm of what is read; "key", the square of
            φ(q)·z_s; "meta", the softmax of x·h_s/√d.
        candidates: k, how many chunks a token reads, those whose keys fit its selector best; None means all.
        state_dtype: what complete states are rounded to, "bfloat16" or "int8"; None leaves them as they are.
        dropout_p: dropout probability of the weights of both softmaxes.

    Raises:
        ValueError: if an option is out of range; the message names it.
    """

    chunk_size: int
    chunk_overlap: int = 0
    router: Router = "energy"
    candidates: int | None = 4
    state_dtype: StateDtype | None = None
    dropout_p: float = 0.0

    def __post_init__(self) -> None:
        BSBROptions(self.chunk_size, self.chunk_overlap)  # raises for options out of range
        if self.candidates is not None:
            require_positive(candidates=self.candidates)
        for option, value, known in (
            ("router", self.router, get_args(Router)),
            ("state_dtype", self.state_dtype, (None, *get_args(StateDtype))),
        ):
            if value not in known:
                raise ValueError(f"{option} must be one of {', '.join(map(str, known))}, got {value!r}")

    def cached_tokens(self, position: int) -> int:
        """See `BSBROptions.cached_tokens`."""
        return BSBROptions(self.chunk_size, self.chunk_overlap).cached_tokens(position)


class ChunkTable(NamedTuple):
    """Keys and states of consecutive complete chunks.

    Attributes:
        keys: z_s [batch, kv_heads, chunks, d_r] or h_s [batch, kv_heads, chunks, head_dim], in float32 or wider.
        states: F_s [batch, kv_heads, chunks, d_r, head_dim], rounded to `state_dtype`.
        scales: of int8 states, what each column is multiplied with [batch, kv_heads, chunks, 1, head_dim]; else None.
    """

    keys: Tensor
    states: Tensor
    scales: Tensor | None = None

    @classmethod
    def rounded(cls, keys: Tensor, states: Tensor, dtype: StateDtype | None) -> "ChunkTable":
        """The table of new states [batch, kv_heads, chunks, d_r, head_dim]."""
        if dtype == "int8":
            scales = states.abs().amax(dim=-2, keepdim=True).float() / 127
            quantised = (states / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
            return cls(keys, quantised, scales)
        return cls(keys, states if dtype is None else states.to(torch.bfloat16))

    def exact(self, dtype: torch.dtype) -> Tensor:
        """The states as they are read, in `dtype`."""
        if self.scales is None:
            return self.states.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return (self.states.to(wide) * self.scales.to(wide)).to(dtype)

    def each(self, change: Callable[[Tensor], Tensor]) -> "ChunkTable":
        """The table with every tensor changed."""
        return ChunkTable(change(self.keys), change(self.states), None if self.scales is None else change(self.scales))

    @property
    def num_chunks(self) -> int:
        """Chunks in the table."""
        return self.keys.shape[2]


Memory = Sequence[ChunkTable]
"""All complete chunks from the first one on, in tables that follow each other."""


class TokenSegment(NamedTuple):
    """Result for tokens that begin at a chunk boundary.

    Attributes:
        output: [batch, heads, time, head_dim].
        table: the complete chunks among the tokens.
    """

    output: Tensor
    table: ChunkTable
