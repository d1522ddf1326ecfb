"""What a converted attention has beside its own weights, and BSBR from the queries, keys and values that it hands over. Torch only.

Notation as in `bsbr.bsbr_attention`. A pretrained attention shows heads and no hidden states, so here all that retrieval
needs is projected from them, a matrix a head: r_t from a query, h_s from the mean of a chunk's keys, φ from both.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsbr.attention import bsbr_attention
from bsbr.backends import dispatch, pytorch
from bsbr.cost import attention_flops
from bsbr.interface import require_positive
from bsbr.validation import check_options


class Retrieval(nn.Module):
    """The learned parts of one converted attention: (2·head_dim + 2·d_r + 1)·head_dim numbers a head at most, and two more.

    φ(k) = softmax(P k): positive and able to be sharp, as the attention that it stands in for (arXiv:2402.04347).
    φ(q) = a softmax(P' q), a = 2 σ(w·q + b) · the number of chunks that are mixed: a sum of near and far
    needs a token's own word on how much it asks of the latter. One softmax over both takes from the near what it gives to the
    far, so the sum is divided by all that it weighs, as linear attention is (arXiv:2006.16236, eq. 5):

        (softmax(QKᵀ/√d ⊙ M_in) V + g φ(Q) F̄) / (1 + |g φ(Q) F̄'|),

    F̄' being F̄ of values that are 1. Projections begin as the identity, but that of r_t at 0, as w and b do: the query of a
    chunk's first token is no guess at what the others look for, and as a first guess it misleads them. The gate begins at 0, so
    that a converted model begins as its own chunks alone; g = gate · d_r / chunk_size, with which flat features and a gate of 1
    weigh a chunk as much as all that is near.

    chunk_size, chunk_overlap, top_k: see `bsbr_attention`; d_r = head_dim / compression_factor, which must divide.
    Raises ValueError for options that cannot be.
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
        check_options(chunk_size, chunk_overlap, retrieval_top_k)
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

    @property
    def gain(self) -> Tensor:
        """g, one factor a head."""
        return self.gate * (self.query_features.shape[-1] / self.chunk_size)

    def phi_q(self, q: Tensor, chunks: Tensor | None = None) -> Tensor:
        """chunks: how many a token can retrieve, like [batch, 1, time, 1], of which top_k are mixed; None: those before its own."""
        if chunks is None:
            chunks = torch.arange(q.shape[2], device=q.device).div(self.chunk_size, rounding_mode="floor").unsqueeze(-1)
        mixed = chunks if self.top_k is None else chunks.clamp(max=self.top_k)
        asked = 2 * torch.sigmoid(q @ self.query_weight + self.query_bias) * mixed
        return torch.softmax(q @ self.query_features, dim=-1) * asked

    def phi_k(self, k: Tensor) -> Tensor:
        return torch.softmax(k @ self.key_features, dim=-1)

    def summaries(self, k: Tensor, v: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
        """h [batch, kv_heads, chunks, head_dim] and F, F' [batch, kv_heads, chunks, d_r, head_dim + 1] of the first chunks."""
        tokens = chunks * self.chunk_size
        means = k[:, :, :tokens].unflatten(2, (chunks, self.chunk_size)).mean(dim=3)
        states = pytorch.chunk_states(self.phi_k(k[:, :, :tokens]), weighed(v[:, :, :tokens]), self.chunk_size, chunks)
        return means @ self.meta_key, states

    def projected(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """r, h, φ(q) and φ(k), as `bsbr_attention` takes them, of a whole sequence."""
        size, before = self.chunk_size, (q.shape[2] - 1) // self.chunk_size
        means = k[:, :, : before * size].unflatten(2, (before, size)).mean(dim=3)
        return q[:, :, ::size] @ self.meta_query, means @ self.meta_key, self.phi_q(q), self.phi_k(k)

    def mass(self, r: Tensor, h: Tensor, q_features: Tensor, k_features: Tensor) -> Tensor:
        """g φ(Q) F̄' [batch, heads, time, 1], from what `projected` gave."""
        size, before = self.chunk_size, h.shape[2]
        sums = k_features[:, :, : before * size].unflatten(2, (before, size)).sum(dim=3).unsqueeze(-1)
        return pytorch.read_out(q_features, pytorch.retrieve(r, [h], [sums], top_k=self.top_k, gain=self.gain), size)

    def causal(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        """BSBR of a whole sequence, softmax scores q·k/√d plus, inside a chunk, `bias` [1, heads, chunk_size, chunk_size].

        q: [batch, heads, time, head_dim]; k, v: [batch, kv_heads, time, head_dim]. Returns the shape of q.
        """
        size, before = self.chunk_size, (q.shape[2] - 1) // self.chunk_size
        if bias is None:
            r, h, q_features, k_features = self.projected(q, k)
            attended = bsbr_attention(
                *(q, k, v, r, h),
                chunk_size=size,
                q_features=q_features,
                k_features=k_features,
                gain=self.gain,
                chunk_overlap=self.chunk_overlap,
                top_k=self.top_k,
                dropout_p=dropout_p,
            )
            return attended / (1 + self.mass(r, h, q_features, k_features).abs())
        visible = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
        attended = self._within_chunks(q, k, v, bias.masked_fill(~visible, -torch.inf), dropout_p)
        if not before:
            return attended
        h, states = self.summaries(k, v, before)
        r = q[:, :, ::size] @ self.meta_query
        retrieved = pytorch.retrieve(r, [h], [states], top_k=self.top_k, gain=self.gain, dropout_p=dropout_p)
        return joined(attended, pytorch.read_out(self.phi_q(q), retrieved, size))

    def bidirectional(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, bias: Tensor | None = None, dropout_p: float = 0.0
    ) -> Tensor:
        """The same where tokens see what follows too: all of their chunk, and M_out every chunk but the own one.

        r_t is projected from the mean of a chunk's queries: nothing about it need be known early. real: [batch, time],
        True for the tokens, which stand in front; None: all are. An incomplete last chunk is retrieved as the others are.
        """
        batch, _, time, _ = q.shape
        size, chunks = self.chunk_size, -(-time // self.chunk_size)
        real = torch.ones(batch, time, dtype=torch.bool, device=q.device) if real is None else real
        real = F.pad(real, (0, chunks * size - time)).view(batch, 1, chunks, size)
        # Padding sees itself, so that no row of the softmax is empty.
        visible = real.unsqueeze(3) | torch.eye(size, dtype=torch.bool, device=q.device)
        zero = torch.zeros(1, dtype=q.dtype, device=q.device)
        scores = (zero if bias is None else bias.unsqueeze(2)).where(visible, -torch.inf)
        attended = self._within_chunks(q, k, v, scores, dropout_p)
        if chunks == 1:
            return attended
        weight = real.unsqueeze(-1).to(q.dtype)
        counts = weight.sum(dim=3).clamp(min=1)
        r = (self._chunked(q, chunks) * weight).sum(dim=3) / counts @ self.meta_query
        h = (self._chunked(k, chunks) * weight).sum(dim=3) / counts @ self.meta_key
        states = (self._chunked(self.phi_k(k), chunks) * weight).mT @ self._chunked(weighed(v), chunks)
        others = ~torch.eye(chunks, dtype=torch.bool, device=q.device) & real.any(dim=3).unsqueeze(2)
        retrieved = self.retrieve(r, h, states, others)
        q_features = self.phi_q(q, others.sum(dim=-1).repeat_interleave(size, dim=2)[:, :, :time].unsqueeze(-1))
        return joined(attended, pytorch.read_out(q_features, retrieved * self.gain.view(-1, 1, 1, 1), size))

    def retrieve(self, r: Tensor, h: Tensor, states: Tensor, visible: Tensor) -> Tensor:
        """F̄, F̄' where M_out is `visible`, which broadcasts to [batch, 1, rows, chunks]: [batch, heads, rows, d_r, head_dim + 1].

        r: [batch, heads, rows, head_dim]; h, states: of kv_heads and all chunks. A row that sees no chunk retrieves zero.
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

    # --- what it costs and keeps ---

    def flops(self, seq_len: int) -> int:
        """Of `causal` for one sequence without bias: matrix products only, multiply-add = 2."""
        heads, head_dim, feature_dim = self.query_features.shape
        kv_heads, chunks = self.meta_key.shape[0], -(-seq_len // self.chunk_size)
        meta = 2 * head_dim * head_dim * (heads * chunks + kv_heads * (chunks - 1))
        features = 2 * seq_len * head_dim * ((heads + kv_heads) * feature_dim + heads)
        attended = attention_flops(
            *(seq_len, heads, kv_heads, head_dim, feature_dim, self.chunk_size),
            chunk_overlap=self.chunk_overlap,
            top_k=self.top_k,
        )
        before = chunks - 1
        mixed = chunks * before // 2 if self.top_k is None else sum(min(chunk, self.top_k) for chunk in range(chunks))
        read = max(0, seq_len - self.chunk_size)
        mass = 2 * heads * (feature_dim * (mixed + read) + head_dim * chunks * before // 2)
        return meta + features + attended + mass

    def state_numbers(self, seq_len: int) -> int:
        """How many numbers decoding keeps of one sequence; see `bsbr.convert.streaming`."""
        heads, head_dim, feature_dim = self.query_features.shape
        kv_heads = self.meta_key.shape[0]
        local = 2 * kv_heads * min(seq_len, self.chunk_size + self.chunk_overlap) * head_dim
        chunks = seq_len // self.chunk_size * kv_heads * (head_dim + feature_dim * (head_dim + 1))
        return local + chunks + heads * feature_dim * (head_dim + 1)

    def implementation(self) -> str:
        """Which implementation `causal` runs, where no bias is given, for tensors of the parameters' device and type."""
        heads, head_dim, _ = self.query_features.shape
        q, k = (self.gate.new_zeros(1, one, self.chunk_size + 1, head_dim) for one in (heads, self.meta_key.shape[0]))
        r, h, q_features, k_features = self.projected(q, k)
        return dispatch.select_backend("auto", q, k, k, r, h, q_features, k_features, gain=self.gain)

    # --- parts ---

    def _chunked(self, x: Tensor, chunks: int) -> Tensor:
        """[batch, heads, time, dim] -> [batch, heads, chunks, chunk_size, dim], zeros at the end."""
        padded = F.pad(x, (0, 0, 0, chunks * self.chunk_size - x.shape[2]))
        return cast(Tensor, padded.unflatten(2, (chunks, self.chunk_size)))

    def _within_chunks(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, dropout_p: float) -> Tensor:
        """softmax(qkᵀ/√d + scores) v inside each chunk; scores broadcasts to [batch, heads, (chunks,) chunk_size, chunk_size]."""
        batch, heads, time, head_dim = q.shape
        chunks, group = -(-time // self.chunk_size), heads // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        if scores.dim() == 4:
            scores = scores.unsqueeze(2)
        q, k, v = (self._chunked(x, chunks).flatten(1, 2) for x in (q, k, v))
        mask = scores.expand(batch, heads, chunks, self.chunk_size, self.chunk_size).flatten(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
        return attended.view(batch, heads, -1, head_dim)[:, :, :time]


def weighed(v: Tensor) -> Tensor:
    """Values with a 1 behind each: [batch, kv_heads, time, head_dim + 1]."""
    return F.pad(v, (0, 1), value=1.0)


def joined(near: Tensor, far: Tensor) -> Tensor:
    """What is near and what is retrieved, by what both weigh; far: of `weighed` values."""
    return (near + far[..., :-1]) / (1 + far[..., -1:].abs())
