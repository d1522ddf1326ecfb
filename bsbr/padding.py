"""Removal of padding before an attention, so that attentions need no mask."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def token_mask(attention_mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Checks an attention mask, and converts it to booleans.

    The values of a mask that is not boolean are read, which waits for a GPU; a boolean mask costs nothing.

    Args:
        attention_mask: [batch, time], 1 or True for a token, 0 or False for padding.
        shape: the expected [batch, time].

    Returns:
        [batch, time], True for tokens.

    Raises:
        ValueError: for another shape, or for other values, such as those of an additive mask.
    """
    if list(attention_mask.shape) != list(shape):
        raise ValueError(f"attention_mask must be [batch, time] = {list(shape)}, got {list(attention_mask.shape)}")
    check_mask_values(attention_mask)
    return attention_mask.bool()


def check_mask_values(attention_mask: Tensor, name: str = "attention_mask") -> None:
    """Raises ValueError unless every value of a mask is 1 or True for a token, or 0 or False for padding.

    A floating-point mask of zeros alone is refused too: it is an additive mask that hides nothing, and would hide all.
    """
    if attention_mask.dtype == torch.bool or attention_mask.is_meta or not attention_mask.numel():
        return
    if torch._C._functorch.is_batchedtensor(attention_mask):
        raise ValueError(f"{name} must be boolean under torch.vmap, where values cannot be checked, got {attention_mask.dtype}")
    rule = f"{name} must be 1 or True for a token and 0 or False for padding"
    wrong = (attention_mask != 0) & (attention_mask != 1)
    is_wrong = wrong.any()
    if attention_mask.is_floating_point():
        is_wrong = is_wrong | ~attention_mask.any()
    if torch.compiler.is_compiling():  # a branch on values would break the graph
        torch._assert_async(~is_wrong, rule)
    elif is_wrong:
        got = f"{attention_mask[wrong][0].item():g}" if wrong.any() else "zeros alone"
        raise ValueError(f"{rule}, got {got}; if it is additive, pass {name} == 0")


def pack(hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Moves the real tokens of every row to its front, in order, with zeros after them.

    After packing, all padding is in the future of all real tokens, so a causal attention computes for them what it computes without
    padding. No variant needs a mask: each takes its fast causal path, with chunk boundaries as without padding.

    Args:
        hidden_states: [batch, time, ...].
        attention_mask: [batch, time], see `token_mask`; padding may be anywhere in the row.

    Returns:
        The packed tensor, of the same shape; and a function that moves outputs [batch, time, ...] back, with zeros at padding.

    Raises:
        ValueError: if the mask is not [batch, time] of 0 and 1.
    """
    real = token_mask(attention_mask, hidden_states.shape[:2])
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
