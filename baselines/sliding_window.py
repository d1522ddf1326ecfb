"""Sliding-window attention (Beltagy 2020): every token sees itself and the few before it."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.kernels import flex
from bsbr.interface import (
    MultiHeadAttention,
    State,
    check_heads,
    check_hidden_states,
    next_position,
    position_counter,
    require_positive,
)


def sliding_window_attention(q: Tensor, k: Tensor, v: Tensor, *, window_size: int, dropout_p: float = 0.0) -> Tensor:
    """o_i = Σ_t softmax_t(q_i·k_t/√head_dim) v_t over t = i − window_size + 1 … i.   Beltagy 2020, arXiv:2004.05150, sec. 3.1.

    q: [batch, heads, m, head_dim]; k, v: [batch, kv_heads, n, head_dim], m <= n, kv_heads a divisor of heads;
    the rows of q are the last m positions. dropout_p acts on the weights. Returns [batch, heads, m, head_dim].
    Cost O(m·window_size·head_dim), memory linear in m and window_size; a window of n or more is softmax attention.
    Raises ValueError if the shapes of q, k and v do not fit or window_size is no positive integer.
    """
    require_positive(window_size=window_size)
    check_heads(q, k, v)
    beyond = max(0, k.shape[2] - q.shape[2] - window_size + 1)
    k, v = k[:, :, beyond:], v[:, :, beyond:]
    m, n = q.shape[2], k.shape[2]

    # The first w positions see all before them: plain causal attention. Every query after them has a full window, so
    # blocks of queries share one mask, and the keys of a block are a view that overlaps its neighbours': nothing is padded.
    w = min(window_size, n)
    head = m - (n - w)
    pieces = [_causal(q[:, :, :head], k[:, :, :w], v[:, :, :w], dropout_p)]
    block = _query_block(window_size)
    body = (m - head) // block * block
    if body:
        seen = slice(1, w + body)
        pieces.append(_blocked(q[:, :, head : head + body], k[:, :, seen], v[:, :, seen], w, block, dropout_p))
    if head + body < m:
        rest = slice(1 + body, None)
        pieces.append(_banded(q[:, :, head + body :], k[:, :, rest], v[:, :, rest], w, dropout_p))
    # Joined as [batch, time, heads, head_dim], the layout the kernels write and out_proj reads.
    return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1).transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Causal attention of the last positions; fewer queries than keys happen in streaming only, and are within one window."""
    m, n = q.shape[2], k.shape[2]
    mask = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m) if 1 < m < n else None
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=m == n > 1, enable_gqa=grouped)


def _banded(q: Tensor, k: Tensor, v: Tensor, window_size: int, dropout_p: float) -> Tensor:
    """Query i sees keys i … i + window_size − 1, of as many as the last query sees."""
    grouped = q.shape[1] != k.shape[1]
    mask = _band(q.shape[2], window_size, q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, enable_gqa=grouped)


def _blocked(q: Tensor, k: Tensor, v: Tensor, window_size: int, block: int, dropout_p: float) -> Tensor:
    """`_banded` for whole blocks of queries, each against the block + window_size − 1 keys that it reaches."""
    batch, kv_heads = k.shape[:2]
    groups = q.shape[1] // kv_heads
    # Blocks are the batch of the kernel, batch · kv_heads its heads, and the queries that share keys its rows: the
    # output then lies as [time, heads], and grouped heads need neither repeated keys nor a kernel that knows of groups.
    rows = q.reshape(batch * kv_heads, groups, -1, block, q.shape[3]).permute(2, 0, 1, 3, 4).flatten(2, 3)
    keys, values = (x.flatten(0, 1).unfold(1, block + window_size - 1, block).permute(1, 0, 3, 2) for x in (k, v))
    mask = _band(block, window_size, q.device).repeat(groups, 1)
    out = F.scaled_dot_product_attention(rows, keys, values, mask, dropout_p)
    out = out.reshape(-1, batch, kv_heads, groups, block, v.shape[3]).permute(1, 2, 3, 0, 4, 5)
    return out.reshape(*q.shape[:3], v.shape[3])


def _band(num_queries: int, window_size: int, device: torch.device) -> Tensor:
    ones = torch.ones(num_queries, num_queries + window_size - 1, dtype=torch.bool, device=device)
    return ones.triu(0).tril(window_size - 1)


def _query_block(window_size: int) -> int:
    """The queries of a block. A block computes block + window_size − 1 columns of which window_size count, so small is

    less work; and it reads them once, and its backward pass holds gradients of them, so large is fewer bytes. Measured
    on a CPU for windows 64 … 1024: a quarter of the window, and no fewer than fill the kernel.
    """
    return min(512, max(32, min(64, window_size // 2), window_size // 4))


@cache
def within(window_size: int, ahead: int) -> flex.Sees:
    """Query i, at position `ahead` + i, sees itself and the window_size − 1 keys before it."""

    def sees(batch: Tensor, head: Tensor, i: Tensor, t: Tensor) -> Tensor:
        return (t <= i + ahead) & (t > i + ahead - window_size)

    return sees


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
    """`sliding_window_attention` between projections. Decoding keeps the last window_size keys and values: one more than the next
    token needs, so that what a token attends to is, as it stands, the state behind it.

    impl: "torch", or "flex" for torch's FlexAttention, which is made for CUDA; a single token needs no pattern, and does without.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        window_size: int = 128,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        dropout: float = 0.0,
        impl: str = "torch",
    ) -> None:
        require_positive(window_size=window_size)
        super().__init__(hidden_dim, num_heads, num_kv_heads=num_kv_heads, rotary=rotary, dropout=dropout)
        self.window_size = window_size
        self.impl = flex.checked(impl)

    @property
    def block_length(self) -> int:
        return self.window_size

    def implementation(self, *_: Tensor) -> str:
        return self.impl

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        if self.impl == "flex" and q.shape[2] > 1:
            if self.dropout_p:
                raise NotImplementedError(f"impl=flex has no dropout, got dropout={self.dropout}: use impl=torch")
            return flex.attention_where(within(self.window_size, k.shape[2] - q.shape[2]), q, k, v)
        return sliding_window_attention(q, k, v, window_size=self.window_size, dropout_p=self.dropout_p)

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
            # Cloned: a view would keep all the keys alive.
            k, v = (x[:, :, -self.window_size :].clone(memory_format=torch.contiguous_format) for x in (k, v))
        kept = {"keys": k.contiguous(), "values": v.contiguous()}
        return output, {**kept, "position": position_counter(position + hidden_states.shape[1])}

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        kept = min(seq_len, self.window_size)
        return 2 * batch_size * self.num_kv_heads * kept * self.head_dim * self.dtype.itemsize

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        w = min(self.window_size, seq_len)
        pairs = w * (w + 1) // 2 + (seq_len - w) * w
        return 4 * batch_size * self.num_heads * self.head_dim * pairs
