"""Any attention, compiled by torch.compile."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bsbr.interface import Attention, State


class CompiledAttention(Attention):
    """An attention on its torch backend, whose `attend` and `forward` torch.compile compiles.

    `extend` is not compiled, because its state has the position as a number, and each position would be compiled anew.

    Args:
        hidden_dim, num_heads: see `Attention`.
        attention: builds the attention: a class, or a partial of one with its options.
        **options: further options of the attention.
    """

    def __init__(self, hidden_dim: int, num_heads: int, *, attention: Callable[..., Attention], **options: object) -> None:
        super().__init__(hidden_dim, num_heads)
        self.attention = attention(hidden_dim=hidden_dim, num_heads=num_heads, **options)

    @property
    def reference(self) -> Callable[..., Tensor] | None:  # type: ignore[override]
        """See `Attention.reference`."""
        return self.attention.reference

    @property
    def block_length(self) -> int:
        """See `Attention.block_length`."""
        return self.attention.block_length

    def implementation(self, *tensors: Tensor) -> str:
        """See `Attention.implementation`."""
        return "compile"

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """See `Attention.project`."""
        return self.attention.project(hidden_states, start)

    def attend(self, *tensors: Tensor) -> Tensor:
        """See `Attention.attend`."""
        return _compiled("attend")(self.attention, *tensors)

    def output(self, attended: Tensor) -> Tensor:
        """See `Attention.output`."""
        return self.attention.output(attended)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """See `Attention.forward`."""
        return _compiled("forward")(self.attention, hidden_states, attention_mask)

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `Attention.extend`."""
        return self.attention.extend(hidden_states, state)

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """See `Attention.flops`."""
        return self.attention.flops(seq_len, batch_size)

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        """See `Attention.state_bytes`."""
        return self.attention.state_bytes(seq_len, batch_size)


@functools.cache
def _compiled(method: str) -> Callable[..., Tensor]:
    # Beyond this many shapes, dtypes and attentions in a process, torch would go on without compiling, and without a word.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000

    def call(attention: Attention, *arguments: Tensor | None) -> Tensor:
        result: Tensor = getattr(attention, method)(*arguments)
        return result

    return torch.compile(call)
