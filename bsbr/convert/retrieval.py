"""Retrieval of a converted attention: its learned parts, and BSBR from the queries, keys and values of a pretrained attention.

Notation as in `bsbr.bsbr_attention`. A pretrained attention passes on heads but no hidden states. So retrieval projects from heads,
with one matrix per head each: the meta query r_t from a query, the meta key h_s from the mean of a chunk's keys, and the features φ
from queries and keys. Imports torch only.
"""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsbr.attention import bsbr_attention
from bsbr.backends import dispatch, pytorch
from bsbr.backends.retrieval import retrieve
from bsbr.cost import HeadSizes, attention_flops
from bsbr.inputs import BSBRInputs, BSBROptions, ChunkMemory
from bsbr.interface import require_positive


class ChunkSummaries(NamedTuple):
    """Meta keys and states of complete chunks, from which later chunks retrieve.

    Attributes:
        meta_keys: h, [batch, kv_heads, chunks, head_dim].
        states: F and, as the last column, F' = Σ φ(k), [batch, kv_heads, chunks, d_r, head_dim + 1].
    """

    meta_keys: Tensor
    states: Tensor


class Retrieval(nn.Module):
    """Learned parts of one converted attention: at most (2·head_dim + 2·d_r + 1)·head_dim + 2 parameters per head.

    φ(k) = softmax(P k), which is positive and can be sharp, as softmax attention is (arXiv:2402.04347).
    φ(q) = a softmax(P' q), where the per-query gate a = 2 σ(w·q + b) · (number of chunks mixed) scales the retrieved term.
    In one softmax over local and retrieved tokens, more weight for the latter is less for the former. Here the sum of both terms is
    divided by its total weight to the same effect, as in linear attention (arXiv:2006.16236, eq. 5):

        (softmax(QKᵀ/√d ⊙ M_in) V + g φ(Q) F̄) / (1 + |g φ(Q) F̄'|),

    where F̄' is F̄ for values that are 1, and g = gate · d_r / chunk_size: with uniform features and a gate of 1, each retrieved
    chunk weighs as much as all local tokens together.

    The gate begins at 0, so a converted model first attends inside chunks only. The projections begin as the identity, except that
    of r_t, which begins at 0, as w and b do: then all chunks are mixed equally. The query of a chunk's first token would be a
    misleading first guess, because it says little about the queries of the other tokens.

    Args:
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads.
        head_dim: width of a head.
        chunk_size, chunk_overlap, retrieval_top_k: as in `bsbr_attention`.
        compression_factor: head_dim / d_r, a divisor of head_dim.

    Raises:
        ValueError: for invalid options.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        chunk_size: int,
        chunk_overlap: int = 0,
        retrieval_top_k: int | None = None,
        compression_factor: int = 1,
    ) -> None:
        super().__init__()
        self.options = BSBROptions(chunk_size, chunk_overlap, retrieval_top_k)
        require_positive(compression_factor=compression_factor)
        if head_dim % compression_factor:
            raise ValueError(f"compression_factor must divide the model's head_dim = {head_dim}, got {compression_factor}")
        self.chunk_size = chunk_size
        self.chunk_overlap = chunk_overlap
        self.top_k = retrieval_top_k
        identity = torch.eye(head_dim)
        features = identity[:, : head_dim // compression_factor]
        self.meta_query = nn.Parameter(torch.zeros(num_heads, head_dim, head_dim))
        self.meta_key = nn.Parameter(identity.repeat(num_kv_heads, 1, 1))
        self.query_features = nn.Parameter(features.repeat(num_heads, 1, 1))
        self.key_features = nn.Parameter(features.repeat(num_kv_heads, 1, 1))
        self.query_weight = nn.Parameter(torch.zeros(num_heads, head_dim, 1))
        self.query_bias = nn.Parameter(torch.zeros(num_heads, 1, 1))
        self.gate = nn.Parameter(torch.zeros(num_heads))

    # --- projections ------------------------------------------------------------------------------

    @property
    def gain(self) -> Tensor:
        """g, one factor per head."""
        return self.gate * (self.query_features.shape[-1] / self.chunk_size)

    def map_queries(self, q: Tensor, visible_chunks: Tensor | None = None) -> Tensor:
        """Query features φ(q), scaled by the per-query gate.

        Args:
            q: [batch, heads, time, head_dim].
            visible_chunks: number of chunks that a token can retrieve, broadcastable to [batch, 1, time, 1]; at most top_k of
                them are mixed. None means all chunks before the token's own.

        Returns:
            [batch, heads, time, d_r].
        """
        if visible_chunks is None:
            positions = torch.arange(q.shape[2], device=q.device)
            visible_chunks = positions.div(self.chunk_size, rounding_mode="floor").unsqueeze(-1)
        mixed_chunks = visible_chunks if self.top_k is None else visible_chunks.clamp(max=self.top_k)
        query_gate = 2 * torch.sigmoid(q @ self.query_weight + self.query_bias) * mixed_chunks
        return torch.softmax(q @ self.query_features, dim=-1) * query_gate

    def map_keys(self, k: Tensor) -> Tensor:
        """Key features φ(k): [batch, kv_heads, time, head_dim] -> [batch, kv_heads, time, d_r]."""
        return torch.softmax(k @ self.key_features, dim=-1)

    def project(self, q: Tensor, k: Tensor, v: Tensor) -> BSBRInputs:
        """Inputs of BSBR for a whole causal sequence.

        Args:
            q: [batch, heads, time, head_dim].
            k, v: [batch, kv_heads, time, head_dim].
        """
        size, earlier_chunks = self.chunk_size, (q.shape[2] - 1) // self.chunk_size
        means = k[:, :, : earlier_chunks * size].unflatten(2, (earlier_chunks, size)).mean(dim=3)
        meta_query, meta_key = q[:, :, ::size] @ self.meta_query, means @ self.meta_key
        return BSBRInputs(q, k, v, meta_query, meta_key, self.map_queries(q), self.map_keys(k), gain=self.gain)

    def summarize_chunks(self, k: Tensor, v: Tensor, num_chunks: int) -> ChunkSummaries:
        """Meta keys and states of the first `num_chunks` chunks of k and v, [batch, kv_heads, time, head_dim] each."""
        tokens = num_chunks * self.chunk_size
        means = k[:, :, :tokens].unflatten(2, (num_chunks, self.chunk_size)).mean(dim=3)
        states = pytorch.chunk_states(self.map_keys(k[:, :, :tokens]), append_one(v[:, :, :tokens]), self.chunk_size, num_chunks)
        return ChunkSummaries(means @ self.meta_key, states)

    # --- attention --------------------------------------------------------------------------------

    def causal_attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        """BSBR of a whole causal sequence.

        Args:
            q: [batch, heads, time, head_dim].
            k, v: [batch, kv_heads, time, head_dim].
            bias: [1, heads, chunk_size, chunk_size], added to the scores q·k/√d within each chunk; None for 0.
            dropout_p: dropout, as in `bsbr_attention`.

        Returns:
            [batch, heads, time, head_dim].
        """
        size, earlier_chunks = self.chunk_size, (q.shape[2] - 1) // self.chunk_size
        if bias is None:
            inputs = self.project(q, k, v)
            attended = bsbr_attention(
                **inputs._asdict(), chunk_size=size, chunk_overlap=self.chunk_overlap, top_k=self.top_k, dropout_p=dropout_p
            )
            return attended / (1 + self._retrieved_weight(inputs).abs())
        visible = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
        attended = self._within_chunks(q, k, v, bias.masked_fill(~visible, -torch.inf), dropout_p)
        if not earlier_chunks:
            return attended
        summaries = self.summarize_chunks(k, v, earlier_chunks)
        r = q[:, :, ::size] @ self.meta_query
        memory = ChunkMemory([summaries.meta_keys], [summaries.states])
        retrieved = retrieve(r, memory, top_k=self.top_k, gain=self.gain, dropout_p=dropout_p)
        return normalized_sum(attended, pytorch.read_out(self.map_queries(q), retrieved, size))

    def bidirectional_attention(
        self, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor | None, bias: Tensor | None = None, dropout_p: float = 0.0
    ) -> Tensor:
        """BSBR of an encoder: a token sees its whole chunk, and retrieves from every other chunk, on both sides.

        r_t is projected from the mean of a chunk's queries, since an encoder knows all of them. An incomplete last chunk is
        retrieved like the others.

        Args:
            q, k, v, bias, dropout_p: as in `causal_attention`.
            token_mask: [batch, time], True for tokens, which come before the padding of their row; None if all are tokens.

        Returns:
            [batch, heads, time, head_dim].
        """
        batch, _, time, _ = q.shape
        size, chunks = self.chunk_size, -(-time // self.chunk_size)
        is_token = torch.ones(batch, time, dtype=torch.bool, device=q.device) if token_mask is None else token_mask
        is_token = F.pad(is_token, (0, chunks * size - time)).view(batch, 1, chunks, size)
        # Padding sees itself, so that no row of the softmax is empty.
        visible = is_token.unsqueeze(3) | torch.eye(size, dtype=torch.bool, device=q.device)
        zero = torch.zeros(1, dtype=q.dtype, device=q.device)
        scores = (zero if bias is None else bias.unsqueeze(2)).where(visible, -torch.inf)
        attended = self._within_chunks(q, k, v, scores, dropout_p)
        if chunks == 1:
            return attended
        weight = is_token.unsqueeze(-1).to(q.dtype)
        counts = weight.sum(dim=3).clamp(min=1)
        r = (self._to_chunks(q, chunks) * weight).sum(dim=3) / counts @ self.meta_query
        h = (self._to_chunks(k, chunks) * weight).sum(dim=3) / counts @ self.meta_key
        states = (self._to_chunks(self.map_keys(k), chunks) * weight).mT @ self._to_chunks(append_one(v), chunks)
        others = ~torch.eye(chunks, dtype=torch.bool, device=q.device) & is_token.any(dim=3).unsqueeze(2)
        retrieved = self.retrieve(r, h, states, others)
        visible_chunks = others.sum(dim=-1).repeat_interleave(size, dim=2)[:, :, :time].unsqueeze(-1)
        q_features = self.map_queries(q, visible_chunks)
        return normalized_sum(attended, pytorch.read_out(q_features, retrieved * self.gain.view(-1, 1, 1, 1), size))

    def retrieve(self, r: Tensor, h: Tensor, states: Tensor, visible: Tensor) -> Tensor:
        """Mixes the states of the visible chunks: F̄ and, as the last column, F̄'.

        Args:
            r: [batch, heads, rows, head_dim], meta queries.
            h: [batch, kv_heads, chunks, head_dim], meta keys.
            states: [batch, kv_heads, chunks, d_r, head_dim + 1].
            visible: M_out, boolean, broadcastable to [batch, 1, rows, chunks].

        Returns:
            [batch, heads, rows, d_r, head_dim + 1]; zero for a row that sees no chunk.
        """
        batch, heads, rows, head_dim = r.shape
        kv_heads, chunks = h.shape[1:3]
        wide = torch.promote_types(r.dtype, torch.float32)
        grouped = r.reshape(batch, kv_heads, heads // kv_heads * rows, head_dim).to(wide) / math.sqrt(head_dim)
        scores = (grouped @ h.mT.to(wide)).view(batch, heads, rows, chunks)
        scores = scores.masked_fill(~visible, torch.finfo(wide).min)
        if self.top_k is not None and self.top_k < chunks:
            dropped = scores.argsort(dim=-1, descending=True, stable=True)[..., self.top_k :]
            scores = scores.scatter(-1, dropped, torch.finfo(wide).min)
        weights = (torch.softmax(scores, dim=-1) * visible).to(states.dtype)
        mixed = weights.reshape(batch, kv_heads, heads // kv_heads * rows, chunks) @ states.flatten(3)
        return mixed.view(batch, heads, rows, *states.shape[3:])

    def _retrieved_weight(self, inputs: BSBRInputs) -> Tensor:
        """Weight of what each token retrieves, g φ(Q) F̄': [batch, heads, time, 1]."""
        assert inputs.q_features is not None
        assert inputs.k_features is not None
        size, earlier_chunks = self.chunk_size, inputs.meta_key.shape[2]
        tokens = inputs.k_features[:, :, : earlier_chunks * size]
        states = tokens.unflatten(2, (earlier_chunks, size)).sum(dim=3).unsqueeze(-1)
        memory = ChunkMemory([inputs.meta_key], [states])
        retrieved = retrieve(inputs.meta_query, memory, top_k=self.top_k, gain=self.gain)
        return pytorch.read_out(inputs.q_features, retrieved, size)

    def _within_chunks(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, dropout_p: float) -> Tensor:
        """softmax(qkᵀ/√d + scores) v inside each chunk; scores broadcasts to [batch, heads, (chunks,) chunk_size, chunk_size]."""
        batch, heads, time, head_dim = q.shape
        chunks, group = -(-time // self.chunk_size), heads // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        if scores.dim() == 4:
            scores = scores.unsqueeze(2)
        q, k, v = (self._to_chunks(x, chunks).flatten(1, 2) for x in (q, k, v))
        mask = scores.expand(batch, heads, chunks, self.chunk_size, self.chunk_size).flatten(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
        return attended.view(batch, heads, -1, head_dim)[:, :, :time]

    def _to_chunks(self, x: Tensor, chunks: int) -> Tensor:
        """[batch, heads, time, dim] -> [batch, heads, chunks, chunk_size, dim], with zeros at the end."""
        padded = F.pad(x, (0, 0, 0, chunks * self.chunk_size - x.shape[2]))
        return cast(Tensor, padded.unflatten(2, (chunks, self.chunk_size)))

    # --- cost -------------------------------------------------------------------------------------

    def flops(self, seq_len: int) -> int:
        """FLOPs of `causal_attention` for one sequence without bias: matrix products only, a multiply-add counted as 2."""
        heads, head_dim, feature_dim = self.query_features.shape
        kv_heads, chunks = self.meta_key.shape[0], -(-seq_len // self.chunk_size)
        meta = 2 * head_dim * head_dim * (heads * chunks + kv_heads * (chunks - 1))
        features = 2 * seq_len * head_dim * ((heads + kv_heads) * feature_dim + heads)
        attended = attention_flops(seq_len, HeadSizes(heads, kv_heads, head_dim, feature_dim), self.options)
        earlier_chunks = chunks - 1
        mixed = sum(chunk if self.top_k is None else min(chunk, self.top_k) for chunk in range(chunks))
        read = max(0, seq_len - self.chunk_size)
        retrieved_weight = 2 * heads * (feature_dim * (mixed + read) + head_dim * chunks * earlier_chunks // 2)
        return meta + features + attended + retrieved_weight

    def state_elements(self, seq_len: int) -> int:
        """Number of elements of one sequence's decoding state after `seq_len` tokens; see `bsbr.convert.streaming`."""
        heads, head_dim, feature_dim = self.query_features.shape
        kv_heads = self.meta_key.shape[0]
        local = 2 * kv_heads * min(seq_len, self.chunk_size + self.chunk_overlap) * head_dim
        chunks = seq_len // self.chunk_size * kv_heads * (head_dim + feature_dim * (head_dim + 1))
        return local + chunks + heads * feature_dim * (head_dim + 1)

    def implementation(self) -> str:
        """Backend that `causal_attention` runs on without bias, for tensors of the parameters' device and dtype."""
        heads, head_dim, _ = self.query_features.shape
        shapes = ((1, num, self.chunk_size + 1, head_dim) for num in (heads, self.meta_key.shape[0]))
        q, k = (self.gate.new_zeros(shape) for shape in shapes)
        return dispatch.select_backend("auto", self.project(q, k, k), self.options)


def append_one(v: Tensor) -> Tensor:
    """Appends a 1 to each value, whose weighted sum is the total weight: [batch, kv_heads, time, head_dim + 1]."""
    return F.pad(v, (0, 1), value=1.0)


def normalized_sum(local: Tensor, retrieved: Tensor) -> Tensor:
    """Divides the sum of the local and the retrieved term by 1 + |weight of the retrieved term|.

    Args:
        local: [..., head_dim].
        retrieved: [..., head_dim + 1], with its weight as the last column; see `append_one`.
    """
    return (local + retrieved[..., :-1]) / (1 + retrieved[..., -1:].abs())
