"""An attention that is slower than another and otherwise the same: what `evals.validate` wants found."""

import time
import types
from typing import Any

from hydra.utils import instantiate
from torch import Tensor

from bsbr.interface import Attention


def slowed(factor: float, of: dict[str, Any], hidden_dim: int, num_heads: int) -> Attention:
    """An attention whose `forward` takes `factor` times as long."""
    attention: Attention = instantiate(of, hidden_dim=hidden_dim, num_heads=num_heads)
    if factor == 1:
        return attention
    whole = type(attention).forward

    def forward(self: Attention, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        start = time.perf_counter()
        output = whole(self, hidden_states, attention_mask)
        end = start + factor * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return output

    attention.forward = types.MethodType(forward, attention)  # type: ignore[method-assign]
    return attention
