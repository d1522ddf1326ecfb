"""The contract: what an attention must offer to be certified, compared and stacked into a model.

`Attention` is the contract itself; `MultiHeadAttention` adds the query, key and value projections
that nearly every variant shares, so that a new variant is an `attend` and the truth about its cost.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from bsbr.process_group import SequenceGroup

State = dict[str, Tensor]
"""What decoding keeps between calls: a flat dictionary of tensors, and nothing else.

`safetensors.torch.save_file(state, path)` and `load_file(path)` are therefore all it takes to keep
a prefix on disk. A state is a value: `extend` never changes the one it is given, so that many
continuations can start from one prefix.
"""


class Attention(nn.Module, ABC):
    """A causal map [batch, time, hidden_dim] -> [batch, time, hidden_dim]: output t depends on inputs <= t.

    A variant is built as `cls(hidden_dim=..., num_heads=..., **its own options)` and implements
    `project`, `attend`, `extend`, `flops` and `state_bytes`; it owns an `out_proj`. Padding is not its
    business: `forward` moves the real tokens to the front, where causality alone keeps them from
    seeing the padding, so that a padded sequence gives what the sequence gives without it.
    """

    reference: ClassVar[Callable[..., Tensor] | None] = None
    """`attend` as the mathematics reads (slow, float64, no shared code): `reference(self, *tensors)`.
    The certificate compares `attend` with it where there is one."""

    out_proj: nn.Module

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        require_positive(hidden_dim=hidden_dim, num_heads=num_heads)
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads

    @property
    def block_length(self) -> int:
        """The length at whose multiples the computation changes (chunk, window, block).

        The certificate tests around it; 64, a length like any other, where there is none.
        """
        return 64

    @abstractmethod
    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """The tensors `attend` takes, from [batch, time, hidden_dim]; the first token stands at position `start`."""

    @abstractmethod
    def attend(self, *tensors: Tensor) -> Tensor:
        """The attention alone, projections apart: what a kernel benchmark times."""

    def implementation(self, *tensors: Tensor) -> str:
        """Which of several implementations `attend` runs for such tensors, as results record it."""
        return "torch"

    @abstractmethod
    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Output for new tokens [batch, new, hidden_dim] that follow those `state` has seen, and the state after them.

        Any split of a sequence into calls gives what `forward` gives for the whole. `state` is left as it was.
        """

    @abstractmethod
    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """Floating point operations of `attend`: matrix products only, multiply-add = 2, causal work only."""

    @abstractmethod
    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        """Bytes that `extend` must keep after `seq_len` tokens, in the precision of the parameters."""

    def context_parallel_forward(self, hidden_states: Tensor, group: SequenceGroup) -> Tensor:
        """`forward` of a sequence that is cut across ranks, on this rank's stretch of it. Not every variant can.

        hidden_states: [batch, time of the stretch, hidden_dim]. Every rank must call it, with the same parameters.
        Raises NotImplementedError where the variant does not run across ranks.
        """
        raise NotImplementedError(f"{type(self).__name__} does not run across ranks: it has no method `context_parallel_forward`")

    def output(self, attended: Tensor) -> Tensor:
        """What `attend` returns -> [batch, time, hidden_dim]."""
        return cast(Tensor, self.out_proj(attended))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """out_proj(attend(project(x))).

        hidden_states: [batch, time, hidden_dim]. attention_mask: [batch, time], nonzero for a token, 0 for
        padding, anywhere in the row; outputs at padding are 0. Returns [batch, time, hidden_dim].
        Raises ValueError if a shape is not as said.
        """
        check_hidden_states(hidden_states, self.hidden_dim)
        if attention_mask is None:
            return self.output(self.attend(*self.project(hidden_states)))
        packed, unpack = pack(hidden_states, attention_mask)
        return unpack(self.output(self.attend(*self.project(packed))))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class MultiHeadAttention(Attention):
    """Query, key and value projections around an `attend(q, k, v)`; optional grouped heads and rotary positions.

    q: [batch, num_heads, time, head_dim]; k, v: [batch, num_kv_heads, time, head_dim]. `attend` returns the
    shape of q. Where q is shorter in time than k and v, its rows are the last positions of them.

    `extend` keeps every key and value, which is right for any such attention and cheapest for few:
    override it where less will do. They are kept in pages, most of which one state shares with the next; `attend_pages`
    joins them for `attend`, and a variant that can read them where they lie overrides it.

    rotary=True turns q and k by angles that grow with position (Su 2021, arXiv:2104.09864), computed
    for any length without a table. dropout acts on attention weights in training.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(hidden_dim, num_heads)
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
        """The dropout that acts now: 0 in eval mode."""
        return self.dropout if self.training else 0.0

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q, k, v = self.project_heads(hidden_states)
        if self.rotary:
            q, k = rotate(q, start), rotate(k, start)
        return q, k, v

    def project_heads(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v without positions."""
        return (
            split_heads(self.q_proj(hidden_states), self.num_heads),
            split_heads(self.k_proj(hidden_states), self.num_kv_heads),
            split_heads(self.v_proj(hidden_states), self.num_kv_heads),
        )

    def output(self, attended: Tensor) -> Tensor:
        return cast(Tensor, self.out_proj(merge_heads(attended)))

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_hidden_states(hidden_states, self.hidden_dim)
        position = next_position(state)
        q, k, v = self.project(hidden_states, position)
        keys, values = (append_to_pages(state_pages(state, name), new) for name, new in (("keys", k), ("values", v)))
        attended = self.attend(q, k, v) if state is None else self.attend_pages(q, keys, values)
        kept = {f"{name}.{i}": page for name, pages in (("keys", keys), ("values", values)) for i, page in enumerate(pages)}
        return self.output(attended), {**kept, "position": position_counter(position + hidden_states.shape[1])}

    def attend_pages(self, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """`attend` of the last positions to keys and values that lie in pages, one after the other in time."""
        return self.attend(q, *(pages[0] if len(pages) == 1 else torch.cat(pages, dim=2) for pages in (keys, values)))

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        return 2 * batch_size * self.num_kv_heads * seq_len * self.head_dim * self.dtype.itemsize


# --- heads and positions ------------------------------------------------------------------------


def split_heads(hidden_states: Tensor, num_heads: int) -> Tensor:
    """[batch, time, heads * head_dim] -> [batch, heads, time, head_dim], a view."""
    return cast(Tensor, hidden_states.unflatten(-1, (num_heads, -1)).transpose(1, 2))


def merge_heads(heads: Tensor) -> Tensor:
    """[batch, heads, time, head_dim] -> [batch, time, heads * head_dim]."""
    return heads.transpose(1, 2).flatten(2)


def rotate(x: Tensor, start: int = 0, *, base: float = 10_000.0) -> Tensor:
    """Rotary positions: the pair (x_i, x_{i + d/2}) of the token at position p turns by p * base^(-2i/d).

    x: [..., time, head_dim], head_dim even; row 0 stands at position `start`. arXiv:2104.09864, eq. 34.
    """
    half = x.shape[-1] // 2
    # Angles reach `position` radians, which float32 holds to 1e-3 at a million tokens: take them in float64.
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    positions = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float64)
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


# --- streaming ----------------------------------------------------------------------------------


def position_counter(number: int) -> Tensor:
    """A counter as a state holds it: a tensor, so that a state is tensors only; on the CPU, so that reading waits for no GPU."""
    return torch.tensor(number, dtype=torch.int64)


def next_position(state: State | None) -> int:
    """How many tokens `state` has seen."""
    return 0 if state is None else int(state["position"])


SMALLEST_PAGE, LARGEST_PAGE = 256, 1024
"""Tokens in a page of a cache: powers of two. Smaller ones are less to copy for a token; larger ones, fewer to go through."""


def page_lengths(time: int) -> list[int]:
    """How a cache of `time` tokens is cut: the largest pages, then the halves of them that fit, then the open page.

    So a new token copies the open page alone, and in between equal pages become one of twice their length, as the digits of a
    counter carry: every token is copied log₂(LARGEST_PAGE / SMALLEST_PAGE) times more, however long the context.
    """
    lengths, rest, length = [LARGEST_PAGE] * (time // LARGEST_PAGE), time % LARGEST_PAGE, LARGEST_PAGE // 2
    while length >= SMALLEST_PAGE:
        if rest & length:
            lengths.append(length)
        length //= 2
    return lengths + [rest % SMALLEST_PAGE] * (rest % SMALLEST_PAGE > 0)


def append_to_pages(pages: list[Tensor], new: Tensor) -> list[Tensor]:
    """`pages` with `new` [batch, heads, time, dim] behind them, each contiguous; full ones go on as the tensors that they are."""
    before = [page.shape[2] for page in pages]
    after = page_lengths(sum(before) + new.shape[2])
    same = 0
    while same < len(before) and before[same] == after[same]:
        same += 1
    moved = torch.cat([*pages[same:], new], dim=2) if same < len(pages) else new
    if same + 1 == len(after):
        return [*pages[:same], moved.contiguous()]
    # Cloned: a view would keep all of them alive.
    cut = moved.split(after[same:], dim=2)
    return [*pages[:same], *(page.clone(memory_format=torch.contiguous_format) for page in cut)]


def state_pages(state: State | None, name: str) -> list[Tensor]:
    """The pages `name.0`, `name.1`, … of a state."""
    pages: list[Tensor] = []
    while state is not None and (page := state.get(f"{name}.{len(pages)}")) is not None:
        pages.append(page)
    return pages


# --- padding ------------------------------------------------------------------------------------


def pack(hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Moves the real tokens of every row to its front, in order, zeros after them; and the way back.

    hidden_states: [batch, time, ...]; attention_mask: [batch, time]. Behind the last real token nothing
    can reach a real output of a causal attention, so this is all the masking there is: no variant ever
    sees a mask, every one takes its fast causal path, and chunk boundaries fall where they would
    without padding. The way back puts zeros at padding.
    """
    if attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask must be [batch, time] = {list(hidden_states.shape[:2])}, got {list(attention_mask.shape)}"
        )
    real = attention_mask != 0
    order = torch.argsort(real.logical_not().to(torch.uint8), dim=1, stable=True)
    real_packed = real.gather(1, order)

    def along_time(index: Tensor, like: Tensor) -> Tensor:
        return index.reshape(*index.shape, *(1,) * (like.dim() - 2)).expand_as(like)

    packed = hidden_states.gather(1, along_time(order, hidden_states))
    # Selecting, not multiplying: a NaN at a padded position must vanish.
    packed = packed.where(along_time(real_packed, packed), 0)

    def unpack(outputs: Tensor) -> Tensor:
        outputs = outputs.where(along_time(real_packed, outputs), 0)
        return torch.zeros_like(outputs).scatter(1, along_time(order, outputs), outputs)

    return packed, unpack


# --- checks -------------------------------------------------------------------------------------


def require_positive(**options: int) -> None:
    """Raises ValueError naming the first option that is no positive integer."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_hidden_states(hidden_states: Tensor, hidden_dim: int) -> None:
    """Raises ValueError unless hidden_states is [batch, time >= 1, hidden_dim]."""
    if hidden_states.dim() != 3 or hidden_states.shape[1] < 1 or hidden_states.shape[2] != hidden_dim:
        raise ValueError(f"hidden_states must be [batch, time >= 1, hidden_dim = {hidden_dim}], got {list(hidden_states.shape)}")


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless q is [batch, heads, time, head_dim] and k, v fit it.

    k and v agree in all but head_dim, share q's batch size, have a divisor of its heads, and at least its time.
    """
    shapes = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must be [batch, heads, time, head_dim], {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must agree in batch and head_dim, and k and v in heads and time, {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, {shapes}")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(f"q must hold at least one position and no more than k and v, {shapes}")
