"""Checks of the gradients that a timed call computes: against a short run, and against the slope of all outputs."""

import math

import torch
from torch import Tensor, nn

from evals.benchmark.modules import Module, attentions_of, build_module
from evals.benchmark.workloads import loss_of
from evals.certification.parity_check import SLOPE
from evals.certification.subject import coarser, no_dropout, threads
from evals.config import Candidate, Comparison

SLOPE_ALLOWED = 1e-2
"""Largest error of a slope, relative to the gradient, beside the gradient's own rounding."""


def first_gradients(outputs: Tensor, inputs: Tensor, part: nn.Module, new: nn.Module, count: int, allowed: float) -> str:
    """How the gradients of the first `count` outputs differ from those of a short run, or by which later inputs they are not 0.

    Args:
        outputs: [batch, time, features], of `part` on `inputs`, with their graph.
        inputs: hidden states or token ids [batch, time, …].
        part, new: two modules with the same weights; `new` makes the short run.
        count: length of the short run.
        allowed: largest difference by rounding, relative to the largest gradient.

    Returns:
        The failure; empty if there is none.
    """
    weights = torch.randn(outputs[:, :count].shape, generator=torch.Generator().manual_seed(1)).to(outputs)
    leaf = inputs.detach()[:, :count].clone().requires_grad_(inputs.is_floating_point())
    with threads(1):
        short = _gradients_of((new(leaf) * weights).sum(), {"an input": leaf, **dict(new.named_parameters())})
    whole = _gradients_of((outputs[:, :count] * weights).sum(), {"an input": inputs, **dict(part.named_parameters())})
    if "an input" in whole:
        late = whole["an input"][:, count:]
        if late.numel() and float(late.abs().max()) > allowed * float(whole["an input"].abs().max()):
            return f"the first {count} outputs have a gradient of {float(late.abs().max()):.1e} at a later input"
        whole["an input"] = whole["an input"][:, :count]
    size = max((float(gradient.abs().max()) for gradient in short.values()), default=0.0)
    for name in short | whole:
        zero = torch.zeros_like((short | whole)[name])
        error = float((short.get(name, zero) - whole.get(name, zero)).abs().max())
        if not error <= 3 * allowed * size:
            return f"the gradient by {name} of the first {count} outputs is off the certified one by {error:.1e} of {size:.1e}"
    return ""


@torch.no_grad()
def slope_difference(
    comparison: Comparison, candidate: Candidate, module: Module, inputs: Tensor, gradients: list[Tensor | None], allowed: float
) -> str | None:
    """How far the gradients of a call are from the slope of its loss, along a random direction of inputs and parameters.

    The slope is a central difference of two passes without gradients, in float64 where the kernels compute in it.

    Args:
        comparison, candidate: what is timed.
        module, inputs: what the call was made with.
        gradients: what it returned: by the inputs, then by the parameters.
        allowed: largest difference by rounding, relative to the largest gradient.

    Returns:
        The failure; empty if there is none, None if the kernels take no dtype that is fine enough.
    """
    dtype = torch.float64
    for attention in attentions_of(module):
        dtype = coarser(dtype, attention.computes_in)
    if dtype not in SLOPE:
        return None
    step = SLOPE[dtype][0]
    moved = build_module(comparison, candidate).to(comparison.device.kind, dtype).train()
    moved.load_state_dict(module.state_dict())
    place = inputs.detach().to(dtype, copy=True) if inputs.is_floating_point() else inputs
    implied, squares, directions = 0.0, 0.0, []
    generator = torch.Generator().manual_seed(2)
    for leaf, gradient in zip([place, *moved.parameters()], gradients, strict=True):
        if not leaf.is_floating_point():
            continue
        scale = leaf.square().mean().sqrt()  # all leaves change by the same share of themselves
        direction = scale * torch.randn(leaf.shape, generator=generator).to(leaf)
        directions.append((leaf, direction))
        if gradient is not None:
            implied += float((gradient.to(dtype) * direction).sum())
            squares += float((gradient.to(dtype) * scale).square().sum())
    losses = []
    try:
        with no_dropout(moved):
            for factor in (step, -2 * step):
                for leaf, direction in directions:
                    leaf.add_(direction, alpha=factor)
                losses.append(float(loss_of(moved, place)))
    except NotImplementedError:  # kernels of a GPU may take float32 or less only
        return None
    error, size = abs((losses[0] - losses[1]) / (2 * step) - implied), math.sqrt(squares)
    if not error <= (SLOPE_ALLOWED + 3 * allowed) * size:
        return f"the slope of the loss along a random direction is off what the gradients say by {error:.1e} of {size:.1e}"
    return ""


def _gradients_of(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients by those leaves that have one."""
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
