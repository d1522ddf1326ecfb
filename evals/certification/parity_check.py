"""Check of parity: `attend` and its gradients against the reference, or without one against float64 and finite differences."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from evals.certification.reference_rows import last_reference_outputs
from evals.certification.subject import Subject

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest |fast − reference| / |reference| (norms), of outputs and of gradients."""

SLOPE = {torch.float64: (1e-7, 1e-4), torch.float32: (1e-3, 1e-2)}
"""Step and tolerance of a slope. A step is small enough to step over few kinks, such as a ReLU's, and the dtype's rounding divided
by it stays below the tolerance. In coarser dtypes there is no such step."""


LARGE = 6.0
"""Factor of inputs whose scores are tens: with ordinary ones a softmax is nearly flat, and what is wrong at its peaks unseen."""

LONG = 600
"""Tokens of a longer run than those of the other lengths, without gradients."""


def parity(subject: Subject) -> str | None:
    """`attend` and its gradients equal the reference's, in float64, float32 and bfloat16.

    A variant without a reference is compared with itself in float64, where its gradient must be its slope. That finds lost
    precision and wrong gradients, but not a function other than the intended one. Kernels that compute in float32 are compared
    with themselves in float32.
    """
    attend, reference = subject.attention.attend, subject.attention.reference
    dtypes = subject.dtypes(*TOLERANCE)
    for time in subject.lengths:
        with torch.no_grad():
            projected = subject.attention.project(subject.inputs(time, batch=2))
        # Inputs that the coarsest dtype holds exactly spare the slow reference a run for each dtype.
        inputs = [tensor.to(torch.bfloat16).to(torch.float64 if reference else subject.finest) for tensor in projected]
        step, allowed = SLOPE.get(subject.finest, (0.0, 0.0))
        if reference is None and step and not (error := _slope_error(attend, inputs, step)) <= allowed:
            return f"the gradient of attend is off its slope by {error:.1e} (n={time}, allowed {allowed:.0e})"
        truth, true_gradients = _value_and_gradients(reference or attend, inputs)
        # A gradient that is zero in truth (a query's, over one key) leaves rounding of the size of the others.
        floor = 0.1 * max(float(gradient.norm()) for gradient in true_gradients)
        for dtype in dtypes:
            value, gradients = _value_and_gradients(subject.in_dtype(dtype).attend, [tensor.to(dtype) for tensor in inputs])
            errors = {"attend": _relative_error(value, truth)} | {
                f"the gradient of attend by its tensor {index}": _relative_error(gradient, true_gradient, floor)
                for index, (gradient, true_gradient) in enumerate(zip(gradients, true_gradients, strict=True))
            }
            for name, error in errors.items():
                if not error <= TOLERANCE[dtype]:
                    against = "its reference" if reference else f"itself in {str(subject.finest).removeprefix('torch.')}"
                    return f"{name} is off {against} by {error:.1e} in {dtype} (n={time}, allowed {TOLERANCE[dtype]:.0e})"
    return _values_only(subject) if reference else None


@torch.no_grad()
def _values_only(subject: Subject) -> str | None:
    """`attend` equals the reference on large inputs and, with the reference's last rows if it computes them alone, on long ones."""
    attention = subject.attention
    assert attention.reference is not None
    tolerance = min(TOLERANCE[dtype] for dtype in subject.dtypes(*TOLERANCE))
    for name, size, time in (("large", LARGE, subject.block + 1), ("long", 1.0, LONG)):
        x, allowed = size * subject.inputs(time), tolerance * size**2  # scores, and their rounding, are squares
        projected = attention.project(x)
        value, truth = attention.attend(*projected), last_reference_outputs(attention, x)
        if truth is None:
            truth = attention.reference(*projected)
        error = _relative_error(value[..., -truth.shape[-2] :, :], truth)
        if not error <= allowed:
            return f"attend is off its reference by {error:.1e} for {name} inputs (n={time}, allowed {allowed:.0e})"
    return None


def _value_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """function(*inputs), and the gradients of its weighted sum by each of them."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    gradients = torch.autograd.grad((value * _noise(value, 6)).sum(), leaves, allow_unused=True)
    return value.detach(), [
        torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


def _slope_error(function: Callable[..., Tensor], inputs: list[Tensor], step: float) -> float:
    """|slope along a random direction − slope that the gradients imply| / |gradients|, of the same weighted sum."""
    _, gradients = _value_and_gradients(function, inputs)
    directions = [_noise(tensor, 7) for tensor in inputs]
    ahead, behind = (
        function(*(tensor + side * direction for tensor, direction in zip(inputs, directions, strict=True))).detach()
        for side in (step, -step)
    )
    slope = float(((ahead - behind) * _noise(ahead, 6)).sum()) / (2 * step)
    implied = sum(float((gradient * direction).sum()) for gradient, direction in zip(gradients, directions, strict=True))
    size = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    return abs(slope - implied) / max(size, 1e-30)


def _relative_error(value: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """|value − truth| / max(|truth|, floor); infinite if the shapes differ."""
    if value.shape != truth.shape:
        return float("inf")
    return float((value.double() - truth.double()).norm()) / max(float(truth.norm()), floor, 1e-30)


def _noise(like: Tensor, seed: int) -> Tensor:
    """Random numbers that every floating dtype holds exactly, in the shape and dtype of `like`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(torch.bfloat16).to(like)
