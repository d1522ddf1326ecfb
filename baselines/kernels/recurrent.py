"""Building blocks of recurrent attentions: chunks, grouped queries, cost, and the module that decodes with a matrix state.

`linear`, `delta_net` and `gated_delta_net` use them. These compute all tokens of a chunk in parallel, as attention does, and carry
a state S [head_dim, value columns] per key head from chunk to chunk.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsbr.interface import (
    MultiHeadAttention,
    State,
    check_heads,
    check_hidden_states,
    next_position,
    position_counter,
    require_positive,
)

# --- functions --------------------------------------------------------------------------------------


def check_inputs(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, **per_token: Tensor) -> None:
    """Checks the arguments of a recurrent attention.

    Args:
        q: [batch, heads, time, head_dim].
        k, v: [batch, kv_heads, time, head_dim].
        chunk_size: tokens computed together.
        per_token: further tensors [batch, kv_heads, time], such as β; errors name them by their keywords.

    Raises:
        ValueError: if a shape does not fit, or chunk_size is not a positive integer.
    """
    check_heads(q, k, v)
    require_positive(chunk_size=chunk_size)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q must have as many positions as k and v, got {q.shape[2]} and {k.shape[2]}: to go on from a prefix, use extend"
        )
    for name, x in per_token.items():
        if x.shape != k.shape[:3]:
            raise ValueError(f"{name} must be [batch, kv_heads, time] = {list(k.shape[:3])}, got {list(x.shape)}")


def to_chunks(x: Tensor, size: int) -> Tensor:
    """[batch, heads, time, dim] -> [batch, heads, chunks, size, dim], contiguous, with zeros after the last token."""
    chunks = -(-x.shape[2] // size)
    missing = chunks * size - x.shape[2]
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    return padded.reshape(*x.shape[:2], chunks, size, x.shape[3]).contiguous()


def group_queries(queries: Tensor, kv_heads: int) -> Tensor:
    """[batch, heads, chunks, size, dim] -> [batch, kv_heads, chunks, group · size, dim], with group = heads / kv_heads.

    Queries that share keys become rows of one matrix: one product with the keys serves all of them, and no key is copied.
    """
    grouped: Tensor = queries.unflatten(1, (kv_heads, queries.shape[1] // kv_heads)).transpose(2, 3).flatten(3, 4)
    return grouped


def ungroup_outputs(outputs: Tensor, group: int, time: int) -> Tensor:
    """Inverse of `group_queries` and the padding: [batch, kv_heads, chunks, group · size, dim] -> [batch, heads, time, dim]."""
    ungrouped: Tensor = outputs.unflatten(3, (group, outputs.shape[3] // group)).transpose(2, 3)
    return ungrouped.flatten(1, 2).flatten(2, 3)[:, :, :time]


def scan(apply: Callable[[Tensor, Tensor], Tensor], maps: Tensor, writes: Tensor, first: Tensor) -> Tensor:
    """All states S_0 … S_m of S_0 = first, S_{i+1} = A_i(S_i) + N_i, in O(log m) steps and O(m) work.

    Two maps in a row are one: A₂ A₁ and A₂(N₁) + N₂. So the scan composes them in pairs, solves for every second state, and takes
    one step from each of those (Blelloch 1990).

    Args:
        apply: `torch.matmul` for maps [batch, heads, m, d, d], `torch.mul` for diagonal ones [batch, heads, m, d or 1, 1].
        maps: A_0 … A_{m-1}.
        writes: N_0 … N_{m-1}, [batch, heads, m, d, e].
        first: [batch, heads, 1, d, e].

    Returns:
        [batch, heads, m + 1, d, e].
    """
    if maps.shape[2] == 0:
        return first
    early, late = maps[:, :, 0::2], maps[:, :, 1::2]
    pairs = late.shape[2]
    pair_writes = apply(late, writes[:, :, 0::2][:, :, :pairs]) + writes[:, :, 1::2]
    evens = scan(apply, apply(late, early[:, :, :pairs]), pair_writes, first)
    steps = early.shape[2]
    odds = apply(early, evens[:, :, :steps]) + writes[:, :, 0::2]
    states = torch.stack([evens[:, :, :steps], odds], dim=3).flatten(2, 3)
    return torch.cat([states, evens[:, :, steps:]], dim=2)


def unit_norm(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last dimension, and 0 where x is 0."""
    # In float32 or better: the square of a float16 overflows at 256.
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-6).to(x.dtype)


def decay_parameters(num_rates: int, num_steps: int) -> tuple[nn.Parameter, nn.Parameter]:
    """a and b of log α = −exp(a) · softplus(… + b), initialised as in Mamba-2 (arXiv:2405.21060).

    Args:
        num_rates: numbers of a, with exp(a) uniform in 1 … 16.
        num_steps: numbers of b, with softplus(b) log-uniform in 0.001 … 0.1.
    """
    steps = torch.empty(num_steps).uniform_(math.log(0.001), math.log(0.1)).exp()
    rates = torch.empty(num_rates).uniform_(1, 16)
    return nn.Parameter(rates.log()), nn.Parameter(steps + torch.log(-torch.expm1(-steps)))


# --- the module -------------------------------------------------------------------------------------


class RecurrentAttention(MultiHeadAttention):
    """Multi-head attention with one matrix per key head as its decoding state, of the same size at any context length.

    A subclass implements `attend_after` and `step`, and extends `project` if it needs more than q, k and v. Decoding costs
    O(head_dim²) per token and head.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary: as in `MultiHeadAttention`.
        chunk_size: tokens computed together; changes the speed, not the result.
        impl: see `Attention`; "fla" is the kernel of flash-linear-attention, which needs CUDA. `extend` by a single token always
            takes the torch path.

    Raises:
        ValueError: for a chunk_size that is not a positive integer, or an unknown impl.
    """

    explicit_backends: ClassVar[tuple[str, ...]] = ("fla",)
    bounded_state = True

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        chunk_size: int = 64,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(hidden_dim, num_heads, num_kv_heads=num_kv_heads, rotary=rotary, impl=impl)
        require_positive(chunk_size=chunk_size)
        self.chunk_size = chunk_size

    @abstractmethod
    def attend_after(self, total: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Computes the attention of tokens that follow the state `total`.

        Args:
            total: [batch, num_kv_heads, head_dim, value_columns] in float32 or better, or None at the start of a sequence.
            tensors: the tensors that `project` returns.

        Returns:
            The output, shaped as q, and the state after the last token, which may be None if `total` is None.
        """

    @abstractmethod
    def step(self, total: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """`attend_after` for a single token, by the recurrence itself."""

    @property
    def value_columns(self) -> int:
        """Columns of the state matrix."""
        return self.head_dim

    @property
    def block_length(self) -> int:
        return self.chunk_size

    def attend(self, *tensors: Tensor) -> Tensor:
        return self.attend_after(None, *tensors)[0]

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_hidden_states(hidden_states, self.hidden_dim)
        position = next_position(state)
        tensors = self.project(hidden_states, position)
        if state is None:
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            sizes = (hidden_states.shape[0], self.num_kv_heads, self.head_dim, self.value_columns)
            total = torch.zeros(sizes, dtype=dtype, device=hidden_states.device)
        else:
            total = state["total"]
        new_tokens = hidden_states.shape[1]
        attended, final = self.step(total, *tensors) if new_tokens == 1 else self.attend_after(total, *tensors)
        assert final is not None
        return self.output(attended), {"total": final, "position": position_counter(position + new_tokens)}

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        """Bytes of the state, which is in float32 or better for parameters of any dtype."""
        itemsize = torch.promote_types(self.dtype, torch.float32).itemsize
        return batch_size * self.num_kv_heads * self.head_dim * self.value_columns * itemsize
