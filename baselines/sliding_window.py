"""Sliding-window attention: every token sees itself and a fixed number of tokens before it.

Beltagy et al. 2020, "Longformer: The Long-Document Transformer", arXiv:2004.05150.
"""

import math
from functools import cache, partial

import torch
from torch import Tensor

from baselines.kernels import flex, key_ranges
from bsbr.backends.sdpa import sdpa
from bsbr.backends.selection import check_impl, select
from bsbr.interface import (
    MultiHeadAttention,
    State,
    check_heads,
    check_hidden_states,
    next_position,
    position_counter,
    require_positive,
)


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, dropout_p: float = 0.0, impl: str = "auto"
) -> Tensor:
    """Sliding window: o_i = Σ_t softmax_t(q_i·k_t/√head_dim) v_t over t = i − window_size + 1 … i  (arXiv:2004.05150, sec. 3.1).

    Args:
        q: [batch, heads, m, head_dim]; its rows are the last m positions.
        k, v: [batch, kv_heads, n, head_dim], m <= n, kv_heads a divisor of heads; v may have another head_dim.
        window_size: tokens that a token sees, itself included; n or more gives softmax attention.
        dropout_p: dropout probability of the weights.
        impl: "torch"; "cpp" for the C++ kernels, which run on a CPU and have no dropout; or "auto" for C++ where it can run.

    Returns:
        [batch, heads, m, head_dim of v]. Costs O(m·window_size·head_dim) per head; memory is linear in m and window_size.

    Raises:
        ValueError: if the shapes do not fit, or window_size is not a positive integer.
        NotImplementedError: if `impl` names a backend that cannot take these tensors.
    """
    require_positive(window_size=window_size)
    check_heads(q, k, v)
    out_of_reach = max(0, k.shape[2] - q.shape[2] - window_size + 1)
    k, v = k[:, :, out_of_reach:], v[:, :, out_of_reach:]
    unsupported = partial(key_ranges.KERNELS.unsupported, q, k, v, dropout_p=dropout_p)
    if select(check_impl(impl, "cpp"), {"cpp": unsupported}) == "cpp" and q.shape[2] > 1:
        return _compiled(q, k, v, None, None, key_ranges.Ranges(window=window_size))
    return _sliding_window(q, k, v, window_size, dropout_p)


def _sliding_window(q: Tensor, k: Tensor, v: Tensor, window_size: int, dropout_p: float) -> Tensor:
    """`sliding_window_attention` by torch operations; k and v begin with the first key that the first query sees."""
    m, n = q.shape[2], k.shape[2]

    # The first w positions see all positions before them: causal attention. Every later query has a full window, so blocks of
    # queries share one mask, and the keys of blocks are overlapping views: nothing is padded.
    w = min(window_size, n)
    head = m - (n - w)
    pieces = [_causal(q[:, :, :head], k[:, :, :w], v[:, :, :w], dropout_p)]
    block = _query_block(window_size)
    body = (m - head) // block * block
    if body:
        visible = slice(1, w + body)
        pieces.append(_blocked(q[:, :, head : head + body], k[:, :, visible], v[:, :, visible], w, block, dropout_p))
    if head + body < m:
        rest = slice(1 + body, None)
        pieces.append(_banded(q[:, :, head + body :], k[:, :, rest], v[:, :, rest], w, dropout_p))
    # Joined as [batch, time, heads, head_dim], the layout that the kernels write and out_proj reads.
    return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1).transpose(1, 2)


_compiled = key_ranges.attention(lambda q, k, v, _, __, ranges: _sliding_window(q, k, v, ranges.window, 0.0))
"""`_sliding_window` by C++ kernels, see `key_ranges.attention`."""


def _causal(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Causal attention of queries at the last positions. Only streaming has fewer queries than keys, all within one window."""
    m, n = q.shape[2], k.shape[2]
    mask = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m) if 1 < m < n else None
    return sdpa(q, k, v, mask, dropout_p, is_causal=m == n > 1)


def _banded(q: Tensor, k: Tensor, v: Tensor, window_size: int, dropout_p: float) -> Tensor:
    """Attention in which query i sees keys i … i + window_size − 1; the keys end where the last query's window ends."""
    return sdpa(q, k, v, _band(q.shape[2], window_size, q.device), dropout_p)


def _blocked(q: Tensor, k: Tensor, v: Tensor, window_size: int, block: int, dropout_p: float) -> Tensor:
    """`_banded` for complete blocks of queries, each with the block + window_size − 1 keys that it sees."""
    batch, kv_heads = k.shape[:2]
    groups = q.shape[1] // kv_heads
    # The kernel's batch are the blocks, its heads are batch · kv_heads, and its rows are the queries that share keys: so the
    # output has the layout [time, heads], and grouped heads need neither repeated keys nor a kernel with group support.
    rows = q.reshape(batch * kv_heads, groups, q.shape[2] // block, block, q.shape[3]).permute(2, 0, 1, 3, 4).flatten(2, 3)
    keys, values = (x.flatten(0, 1).unfold(1, block + window_size - 1, block).permute(1, 0, 3, 2) for x in (k, v))
    mask = _band(block, window_size, q.device).repeat(groups, 1)
    out = sdpa(rows, keys, values, mask, dropout_p)
    out = out.reshape(q.shape[2] // block, batch, kv_heads, groups, block, v.shape[3]).permute(1, 2, 3, 0, 4, 5)
    return out.reshape(*q.shape[:3], v.shape[3])


def _band(num_queries: int, window_size: int, device: torch.device) -> Tensor:
    """Boolean mask of `_banded`: [num_queries, num_queries + window_size − 1]."""
    ones = torch.ones(num_queries, num_queries + window_size - 1, dtype=torch.bool, device=device)
    return ones.triu(0).tril(window_size - 1)


def _query_block(window_size: int) -> int:
    """Number of queries in a block.

    Each query of a block computes block + window_size − 1 scores, of which it uses window_size, so small blocks waste less work.
    Each block reads all its keys and stores gradients for them, so large blocks move fewer bytes. Fastest on a CPU for windows of
    64 … 1024 is a quarter of the window, but enough queries to fill the kernel.
    """
    return min(512, max(32, min(64, window_size // 2), window_size // 4))


@cache
def window_pattern(window_size: int, offset: int) -> flex.MaskFunction:
    """Mask function of the window; query 0 is at position `offset` of the keys."""

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query + offset) & (key > query + offset - window_size)

    return is_visible


def sliding_window_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, window_size: int) -> Tensor:
    """`sliding_window_attention` in float64 with the m×n scores written out."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    m, n = q.shape[2], k.shape[2]
    query = torch.arange(n - m, n, device=q.device)[:, None]
    key = torch.arange(n, device=q.device)[None, :]
    hidden = (key > query) | (key <= query - window_size)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v


class SlidingWindowAttention(MultiHeadAttention):
    """Sliding-window layer: `sliding_window_attention` between projections.

    The decoding state holds the last window_size keys and values. The next token needs one fewer; with all of them, the tensors
    that a token attends to become the next state without a copy.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary, dropout: as in `MultiHeadAttention`.
        window_size: as in `sliding_window_attention`.
        impl: see `Attention`. "cpp" is `baselines.kernels.key_ranges`; "flex" is torch's FlexAttention, made for CUDA. Neither has
            dropout. A single token always takes the torch path.

    Raises:
        ValueError: if an option is out of range or impl is unknown.
    """

    backends = ("cpp",)
    explicit_backends = ("flex",)
    bounded_state = True

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        window_size: int = 128,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        require_positive(window_size=window_size)
        super().__init__(hidden_dim, num_heads, num_kv_heads=num_kv_heads, rotary=rotary, dropout=dropout, impl=impl)
        self.window_size = window_size

    @property
    def block_length(self) -> int:
        return self.window_size

    def unsupported(self, backend: str, *tensors: Tensor) -> str | None:
        if backend == "cpp":
            return key_ranges.KERNELS.unsupported(*tensors, dropout_p=self.dropout_p)
        return f"FlexAttention has no dropout, got dropout={self.dropout}" if self.dropout_p else None

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        backend = self.select_backend(*tensors)
        if backend != "flex":
            return sliding_window_attention(q, k, v, window_size=self.window_size, dropout_p=self.dropout_p, impl=backend)
        if q.shape[2] > 1:
            return flex.masked_attention(window_pattern(self.window_size, k.shape[2] - q.shape[2]), q, k, v)
        return sliding_window_attention(q, k, v, window_size=self.window_size, impl="torch")

    def reference(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return sliding_window_attention_reference(q, k, v, window_size=self.window_size)

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_hidden_states(hidden_states, self.hidden_dim)
        position = next_position(state)
        q, k, v = self.project(hidden_states, position)
        if state is not None:
            expired = max(0, state["keys"].shape[2] - (self.window_size - 1))
            k, v = (torch.cat([state[name][:, :, expired:], x], dim=2) for name, x in (("keys", k), ("values", v)))
        output = self.output(self.attend(q, k, v))
        if k.shape[2] > self.window_size:
            # Cloned: a view would keep all the keys in memory.
            k, v = (x[:, :, -self.window_size :].clone(memory_format=torch.contiguous_format) for x in (k, v))
        new_position = position_counter(position + hidden_states.shape[1])
        return output, {"keys": k.contiguous(), "values": v.contiguous(), "position": new_position}

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        rows = min(seq_len, self.window_size)
        return 2 * batch_size * self.num_kv_heads * rows * self.head_dim * self.dtype.itemsize

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """FLOPs: 4·head_dim per head for each pair of a query and a key in its window."""
        w = min(self.window_size, seq_len)
        pairs = w * (w + 1) // 2 + (seq_len - w) * w
        return 4 * batch_size * self.num_heads * self.head_dim * pairs
