"""A slowed copy of an attention, which `evals.validate slowdown` expects to get the verdict `slower`."""

import time
import types
from typing import Any

from hydra.utils import instantiate
from torch import Tensor

from bsbr.interface import Attention


def slowed(factor: float, of: dict[str, Any], hidden_dim: int, num_heads: int) -> Attention:
    """Builds an attention and lets its `forward` take longer, by waiting.

    Args:
        factor: how many times as long it takes.
        of: node of the attention's config.
        hidden_dim, num_heads: passed to the attention.
    """
    attention: Attention = instantiate(of, hidden_dim=hidden_dim, num_heads=num_heads)
    if factor == 1:
        return attention
    original_forward = type(attention).forward

    def forward(self: Attention, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        start = time.perf_counter()
        output = original_forward(self, hidden_states, attention_mask)
        end = start + factor * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return output

    attention.forward = types.MethodType(forward, attention)  # type: ignore[method-assign]
    return attention
