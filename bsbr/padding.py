"""Removal of padding before an attention, so that attentions need no mask."""

from collections.abc import Callable

import torch
from torch import Tensor


def pack(hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Moves the real tokens of every row to its front, in order, with zeros after them.

    After packing, all padding is in the future of all real tokens, so a causal attention computes for them what it computes without
    padding. No variant needs a mask: each takes its fast causal path, with chunk boundaries as without padding.

    Args:
        hidden_states: [batch, time, ...].
        attention_mask: [batch, time], nonzero for a token, 0 for padding, anywhere in the row.

    Returns:
        The packed tensor, of the same shape; and a function that moves outputs [batch, time, ...] back, with zeros at padding.

    Raises:
        ValueError: if the mask is not [batch, time].
    """
    if attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask must be [batch, time] = {list(hidden_states.shape[:2])}, got {list(attention_mask.shape)}"
        )
    real = attention_mask != 0
    order = torch.argsort(real.logical_not().to(torch.uint8), dim=1, stable=True)
    real_packed = real.gather(1, order)

    def expand(index: Tensor, like: Tensor) -> Tensor:
        return index.reshape(*index.shape, *(1,) * (like.dim() - 2)).expand_as(like)

    packed = hidden_states.gather(1, expand(order, hidden_states))
    # Selected, not multiplied: 0·NaN at a padded position would be NaN.
    packed = packed.where(expand(real_packed, packed), 0)

    def unpack(outputs: Tensor) -> Tensor:
        outputs = outputs.where(expand(real_packed, outputs), 0)
        return torch.zeros_like(outputs).scatter(1, expand(order, outputs), outputs)

    return packed, unpack
