"""Named arguments of BSBR: the tensors, the options, and the chunks that a later chunk retrieves from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from bsbr.interface import require_positive


class BSBRInputs(NamedTuple):
    """The tensors of one call of BSBR. Time is cut into C = ⌈time / chunk_size⌉ chunks, the last one of any length.

    Attributes:
        q: queries [batch, heads, time, head_dim].
        k: keys [batch, kv_heads, time, head_dim]; kv_heads divides heads.
        v: values, of the shape of k.
        meta_query: r [batch, heads, C, head_dim], one per chunk; to be causal it may depend on tokens up to the chunk's first.
        meta_key: h [batch, kv_heads, C − 1 or more, head_dim], one for each chunk that a later chunk can retrieve.
        q_features: φ(q) [batch, heads, time, d_r]; None means the unit norm of q.
        k_features: φ(k) [batch, kv_heads, time, d_r]; None means the unit norm of k.
        beta: β [batch, kv_heads, time], the write strength of the delta rule; None means that states are plain sums.
        gain: g [heads], the weight of the retrieved term; None means 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    meta_query: Tensor
    meta_key: Tensor
    q_features: Tensor | None = None
    k_features: Tensor | None = None
    beta: Tensor | None = None
    gain: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are given, in the order of the fields."""
        return tuple(tensor for tensor in self if tensor is not None)

    def typed_tensors(self) -> tuple[Tensor, ...]:
        """The given tensors but β: those that a compiled backend needs in one dtype. β is cast where it is used."""
        return self._replace(beta=None).tensors()

    def require_grad(self) -> bool:
        """Whether any of the tensors requires a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors())


class TokenInputs(NamedTuple):
    """The tensors of `BSBRInputs` that have one row per token; the tokens may begin inside a chunk."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_features: Tensor
    k_features: Tensor
    beta: Tensor | None = None

    def with_meta(self, meta_query: Tensor, meta_key: Tensor) -> BSBRInputs:
        """Adds meta queries and meta keys; the tokens must begin at a chunk boundary."""
        return BSBRInputs(self.q, self.k, self.v, meta_query, meta_key, self.q_features, self.k_features, self.beta)


@dataclass(frozen=True)
class BSBROptions:
    """The settings of one call of BSBR.

    Attributes:
        chunk_size: B, tokens in a chunk.
        chunk_overlap: number of tokens before its chunk that a token also attends to.
        top_k: how many chunks each chunk retrieves, those with the highest scores, the earliest of equals; None means all.
        normalise: whether the retrieved state F̄ is scaled to the Frobenius norm √head_dim.
        dropout_p: dropout probability of the weights of both softmaxes.

    Raises:
        ValueError: if chunk_size or top_k is below 1, or chunk_overlap below 0.
    """

    chunk_size: int
    chunk_overlap: int = 0
    top_k: int | None = None
    normalise: bool = False
    dropout_p: float = 0.0

    def __post_init__(self) -> None:
        require_positive(chunk_size=self.chunk_size)
        if self.top_k is not None:
            require_positive(retrieval_top_k=self.top_k)
        overlap = self.chunk_overlap
        if isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 0:
            raise ValueError(f"chunk_overlap must be an integer of at least 0, got {overlap!r}")

    def num_chunks(self, time: int) -> int:
        """C = ⌈time / chunk_size⌉, an incomplete last chunk included."""
        return -(-time // self.chunk_size)

    def cached_tokens(self, position: int) -> int:
        """Number of earlier tokens that the token at `position` attends to: those of its chunk and of the overlap before it."""
        in_chunk = position % self.chunk_size
        return in_chunk + min(self.chunk_overlap, position - in_chunk)


class ChunkMemory(NamedTuple):
    """Meta keys and states of consecutive chunks from the first chunk on, in pages that follow each other along dimension 2.

    Attributes:
        meta_keys: pages of h [batch, kv_heads, chunks, head_dim].
        states: pages of F [batch, kv_heads, chunks, d_r, head_dim]; a page may have room for more chunks than meta keys.
    """

    meta_keys: Sequence[Tensor] = ()
    states: Sequence[Tensor] = ()

    @property
    def num_chunks(self) -> int:
        """Chunks in all pages."""
        return sum(page.shape[2] for page in self.meta_keys)

    def followed_by(self, meta_key: Tensor, states: Tensor) -> "ChunkMemory":
        """This memory with one more page."""
        return ChunkMemory([*self.meta_keys, meta_key], [*self.states, states])


EMPTY_MEMORY = ChunkMemory()


@dataclass
class ChunkRoom:
    """Room for the meta keys and states of all chunks of a sequence in segments: no segment copies those before it.

    Attributes:
        meta_keys: [batch, kv_heads, chunks, head_dim].
        states: [batch, kv_heads, chunks, d_r, head_dim].
        filled: number of chunks that are stored.
    """

    meta_keys: Tensor
    states: Tensor
    filled: int = 0

    def memory(self) -> ChunkMemory:
        """The stored chunks, as one page of views."""
        if not self.filled:
            return EMPTY_MEMORY
        return ChunkMemory([self.meta_keys[:, :, : self.filled]], [self.states[:, :, : self.filled]])


class Segment(NamedTuple):
    """Result of a backend for a segment: tokens that begin at a chunk boundary and may follow earlier chunks.

    Attributes:
        output: [batch, heads, time, head_dim].
        states: F of as many chunks as there are meta keys [batch, kv_heads, chunks, d_r, head_dim].
        retrieved: g F̄ of the last chunk [batch, heads, d_r, head_dim].
    """

    output: Tensor
    states: Tensor
    retrieved: Tensor
