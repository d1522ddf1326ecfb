"""The contract of every attention that is certified, compared and stacked into a model.

`Attention` is the contract itself. `MultiHeadAttention` adds the query, key and value projections that nearly every variant
shares, so that a new variant only has to define `attend` and `flops`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from bsbr.backends.selection import check_impl, is_transformed, select
from bsbr.padding import pack
from bsbr.paging import append_to_pages, state_pages
from bsbr.precision import device_for_float64
from bsbr.process_group import SequenceGroup

State = dict[str, Tensor]
"""What decoding keeps between calls: a flat dictionary of tensors.

`safetensors.torch.save_file(state, path)` and `load_file(path)` therefore store and load a prefix. A state is a value: `extend`
never changes the state that it is given, so that many continuations can start from one prefix.
"""


SEGMENT = 2048
"""Tokens that are processed together without gradients. With fewer, the parts of a segment cost more than the rest of it saves."""


class Attention(nn.Module, ABC):
    """A causal map [batch, time, hidden_dim] -> [batch, time, hidden_dim]: output t depends on inputs up to t.

    A variant is built as `cls(hidden_dim=..., num_heads=..., **its own options)`, implements `project`, `attend`, `extend`, `flops`
    and `state_bytes`, and has an `out_proj`. It need not handle padding: `forward` moves the real tokens to the front, see
    `bsbr.padding.pack`, so that a padded sequence gives what the sequence gives without padding.

    Args:
        hidden_dim: width of the hidden states.
        num_heads: query heads.
        impl: the backend that computes it: "torch", one of `backends` or `explicit_backends`, or "auto" for the first of `backends`
            that supports the inputs, or else "torch".

    Raises:
        ValueError: if a size is not a positive integer, or the attention has no such backend.
    """

    backends: ClassVar[tuple[str, ...]] = ()
    """Backends beside "torch", the fastest first; `impl="auto"` selects among them."""

    explicit_backends: ClassVar[tuple[str, ...]] = ()
    """Further backends, which run only if `impl` names them: kernels of other projects."""

    reference: ClassVar[Callable[..., Tensor] | None] = None
    """Slow float64 implementation of `attend` that follows the definition and shares no code with it, called as
    `reference(self, *tensors)`. If a variant has one, the certificate compares `attend` with it."""

    bounded_state: ClassVar[bool] = False
    """Whether the state of `extend` is much smaller than all keys and values. If so, without gradients a long sequence is processed
    in segments, and apart from input, output and state no memory grows with its length."""

    computes_in: torch.dtype | None = None
    """The precision of the kernels if it does not follow the tensors: torch.float32 if they compute in float32 whatever they are
    given. The certificate then allows the rounding of that precision, and every row of results names it."""

    out_proj: nn.Module

    def __init__(self, hidden_dim: int, num_heads: int, *, impl: str = "auto") -> None:
        super().__init__()
        require_positive(hidden_dim=hidden_dim, num_heads=num_heads)
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.impl = check_impl(impl, *self.backends, *self.explicit_backends)

    @property
    def block_length(self) -> int:
        """Length of the variant's chunk, window or block; 64 for a variant without one. The certificate tests lengths around it."""
        return 64

    @property
    def segment_length(self) -> int:
        """Tokens of a segment, if `bounded_state`: whole blocks, at least `SEGMENT`."""
        return -(-SEGMENT // self.block_length) * self.block_length

    @abstractmethod
    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """Projects hidden states [batch, time, hidden_dim] to the tensors that `attend` takes; `start` is the first position."""

    @abstractmethod
    def attend(self, *tensors: Tensor) -> Tensor:
        """Computes the attention without its projections. A kernel benchmark times this method."""

    def unsupported(self, backend: str, *tensors: Tensor) -> str | None:
        """Why one of `backends` or `explicit_backends` cannot take the tensors of `attend`, as a sentence; None if it can."""
        return None

    def select_backend(self, *tensors: Tensor) -> str:
        """Name of the backend that `attend` runs for these tensors.

        Raises:
            NotImplementedError: if `impl` names a backend that does not support the tensors.
        """
        names = self.backends if self.impl == "auto" else {self.impl} - {"torch"}
        return select(self.impl, {name: partial(self.unsupported, name, *tensors) for name in names})

    def implementation(self, *tensors: Tensor) -> str:
        """Name of the implementation that `attend` runs for these tensors, as results record it."""
        return self.select_backend(*tensors)

    @abstractmethod
    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Computes the outputs of tokens that follow those of `state`.

        However a sequence is split into calls, the outputs are those of `forward` on the whole sequence.

        Args:
            hidden_states: new tokens, [batch, new, hidden_dim].
            state: the state that an earlier call returned, which is not changed; None at the beginning of a sequence.

        Returns:
            [batch, new, hidden_dim], and the state after the new tokens.
        """

    @abstractmethod
    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """Floating point operations of `attend`: matrix products only, a multiply-add counted as 2, causal work only."""

    @abstractmethod
    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        """Bytes that `extend` must keep after `seq_len` tokens, in the precision of the parameters."""

    def context_parallel_forward(self, hidden_states: Tensor, group: SequenceGroup) -> Tensor:
        """Computes this rank's shard of the output of a sequence that is cut into shards, one shard per rank.

        Every rank must call it, with the same parameters. Not every variant implements it.

        Args:
            hidden_states: [batch, time of this rank's shard, hidden_dim].
            group: the ranks that share the sequence.

        Raises:
            NotImplementedError: if the variant does not run across ranks.
        """
        raise NotImplementedError(f"{type(self).__name__} does not run across ranks: it has no method `context_parallel_forward`")

    def output(self, attended: Tensor) -> Tensor:
        """Applies the output projection to what `attend` returns: [batch, time, hidden_dim]."""
        return cast(Tensor, self.out_proj(attended))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """output(attend(*project(hidden_states))).

        Args:
            hidden_states: [batch, time, hidden_dim].
            attention_mask: [batch, time], 1 or True for a token, 0 or False for padding, anywhere in the row.

        Returns:
            [batch, time, hidden_dim], 0 at padding.

        Raises:
            ValueError: if a shape does not fit, or the mask has other values.
        """
        check_hidden_states(hidden_states, self.hidden_dim)
        if attention_mask is None:
            return self._forward(hidden_states)
        packed, unpack = pack(hidden_states, attention_mask)
        return unpack(self._forward(packed))

    def _forward(self, hidden_states: Tensor) -> Tensor:
        if self._takes_segments(hidden_states):
            return self.extend_in_segments(hidden_states)[0]
        return self.output(self.attend(*self.project(hidden_states)))

    def extend_in_segments(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """`extend`, segment by segment if `bounded_state`, the input is long and no gradients are asked for."""
        if not self._takes_segments(hidden_states):
            return self.extend(hidden_states, state)
        output = torch.empty_like(hidden_states)
        for segment in self._segments(hidden_states.shape[1], next_position(state)):
            output[:, segment], state = self.extend(hidden_states[:, segment], state)
        assert state is not None
        return output, state

    def _segments(self, time: int, position: int = 0) -> Iterator[slice]:
        """Segments of `time` tokens that begin at a position; all but the last end at block boundaries."""
        length = self.segment_length
        for start, stop in pairwise([0, *range(length - position % length, time, length), time]):
            yield slice(start, stop)

    def _takes_segments(self, hidden_states: Tensor) -> bool:
        return (
            self.bounded_state
            and hidden_states.shape[1] > self.segment_length
            and not (torch.is_grad_enabled() or is_transformed() or torch.compiler.is_compiling())
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype


class MultiHeadAttention(Attention):
    """Query, key and value projections around an `attend(q, k, v)`, with optional grouped heads and rotary positions.

    `attend` takes q [batch, num_heads, time, head_dim] and k, v [batch, num_kv_heads, time, head_dim] and returns the shape of q.
    If q has fewer rows than k and v, its rows are the last positions.

    `extend` stores every key and value; a variant that needs fewer overrides it. The store is split into pages, and successive
    states share most pages. `attend_pages` concatenates the pages for `attend`; a variant that can read them one by one
    overrides it.

    Args:
        hidden_dim: width of the hidden states, a multiple of num_heads.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads; None means num_heads.
        rotary: whether q and k are rotated by their positions, see `rotate`; needs an even head_dim.
        dropout: dropout probability of attention weights in training, in [0, 1).
        impl: see `Attention`.

    Raises:
        ValueError: if a size does not divide as above, or an option is out of range.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(hidden_dim, num_heads, impl=impl)
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim must be a multiple of num_heads, got hidden_dim={hidden_dim}, num_heads={num_heads}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        require_positive(num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got num_heads={num_heads}, num_kv_heads={num_kv_heads}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.head_dim = hidden_dim // num_heads
        if rotary and self.head_dim % 2:
            raise ValueError(f"rotary=True needs an even head_dim, got {self.head_dim} = {hidden_dim} / {num_heads}")
        self.num_kv_heads = num_kv_heads
        self.rotary = rotary
        self.dropout = dropout
        self.q_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.k_proj = nn.Linear(hidden_dim, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_dim, num_kv_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)

    @property
    def dropout_p(self) -> float:
        """The current dropout probability: `dropout` in training mode, 0 in eval mode."""
        return self.dropout if self.training else 0.0

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """q, k and v of hidden_states [batch, time, hidden_dim], rotated if `rotary`; see `Attention.project`."""
        q, k, v = self.project_heads(hidden_states)
        if self.rotary:
            q, k = rotate(q, start), rotate(k, start)
        return q, k, v

    def project_heads(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v before any rotation."""
        return (
            split_heads(self.q_proj(hidden_states), self.num_heads),
            split_heads(self.k_proj(hidden_states), self.num_kv_heads),
            split_heads(self.v_proj(hidden_states), self.num_kv_heads),
        )

    def output(self, attended: Tensor) -> Tensor:
        """Joins the heads [batch, heads, time, head_dim] and applies the output projection: [batch, time, hidden_dim]."""
        return cast(Tensor, self.out_proj(merge_heads(attended)))

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `Attention.extend`; the state holds all keys and values, in pages."""
        check_hidden_states(hidden_states, self.hidden_dim)
        position = next_position(state)
        q, k, v = self.project(hidden_states, position)
        keys, values = (append_to_pages(state_pages(state, name), new) for name, new in (("keys", k), ("values", v)))
        attended = self.attend(q, k, v) if state is None else self.attend_pages(q, keys, values)
        pages = {f"{name}.{i}": page for name, cache in (("keys", keys), ("values", values)) for i, page in enumerate(cache)}
        return self.output(attended), {**pages, "position": position_counter(position + hidden_states.shape[1])}

    def attend_pages(self, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Attention of queries at the last positions, with keys and values in pages that follow each other in time."""
        return self.attend(q, *(pages[0] if len(pages) == 1 else torch.cat(pages, dim=2) for pages in (keys, values)))

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        """Bytes of all keys and values."""
        return 2 * batch_size * self.num_kv_heads * seq_len * self.head_dim * self.dtype.itemsize


# --- heads and positions ------------------------------------------------------------------------


def split_heads(hidden_states: Tensor, num_heads: int) -> Tensor:
    """[batch, time, heads · head_dim] -> [batch, heads, time, head_dim], a view."""
    batch, time, width = hidden_states.shape
    return hidden_states.view(batch, time, num_heads, width // num_heads).transpose(1, 2)


def merge_heads(heads: Tensor) -> Tensor:
    """[batch, heads, time, head_dim] -> [batch, time, heads · head_dim]."""
    return heads.transpose(1, 2).flatten(2)


def rotate(x: Tensor, start: int = 0, *, base: float = 10_000.0) -> Tensor:
    """Rotary positions: rotates the pair (x_i, x_{i + d/2}) at position p by p·base^(−2i/d) radians (arXiv:2104.09864, eq. 34).

    Args:
        x: [..., time, head_dim] with an even head_dim = d.
        start: position of row 0. Angles are computed and not looked up, so any position works.
        base: base of the frequencies.
    """
    half = x.shape[-1] // 2
    cos, sin = position_waves(x, start, base)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def position_waves(like: Tensor, start: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles p·base^(−2i/d) of positions p.

    Args:
        like: [..., time, d], which gives sizes, dtype and device.
        start: p of row 0.
        base: base of the frequencies.

    Returns:
        Two of [time, ⌈d/2⌉].
    """
    time, dim = like.shape[-2:]
    # In float64: an angle reaches `position` radians, and at a million radians float32 rounds by up to 0.03.
    arange = partial(torch.arange, device=device_for_float64(like.device), dtype=torch.float64)
    angles = torch.outer(arange(start, start + time), base ** (-arange(0, dim, 2) / dim))
    return angles.cos().to(like.dtype).to(like.device), angles.sin().to(like.dtype).to(like.device)


def position_counter(position: int) -> Tensor:
    """A position as an int64 tensor, because a state holds only tensors; on the CPU, so that reading it never waits for a GPU."""
    return torch.tensor(position, dtype=torch.int64, device="cpu")


def next_position(state: State | None) -> int:
    """Position of the token after those of `state`."""
    return 0 if state is None else int(state["position"])


# --- checks -------------------------------------------------------------------------------------


def require_positive(**options: int) -> None:
    """Raises ValueError naming the first option that is not a positive integer."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_hidden_states(hidden_states: Tensor, hidden_dim: int) -> None:
    """Raises ValueError unless hidden_states is [batch, time >= 1, hidden_dim]."""
    if hidden_states.dim() != 3 or hidden_states.shape[1] < 1 or hidden_states.shape[2] != hidden_dim:
        raise ValueError(f"hidden_states must be [batch, time >= 1, hidden_dim = {hidden_dim}], got {list(hidden_states.shape)}")


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless q is [batch, heads, time, head_dim] and k and v fit it.

    k must have the batch size and head_dim of q, a divisor of its heads, and at least its time; v may differ from k in head_dim.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        problem = "q, k and v must be [batch, heads, time, head_dim]"
    elif not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one floating point dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    elif k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        problem = "q, k and v must agree in batch and head_dim, and k and v in heads and time"
    elif not q.shape[1] or not k.shape[1] or q.shape[1] % k.shape[1]:
        problem = "there must be heads, and the heads of q must be a multiple of those of k and v"
    elif not q.shape[3] or not v.shape[3]:
        problem = "head_dim must be at least 1"
    elif not 1 <= q.shape[2] <= k.shape[2]:
        problem = "q must hold at least one position and no more than k and v"
    else:
        return
    raise ValueError(f"{problem}, got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
