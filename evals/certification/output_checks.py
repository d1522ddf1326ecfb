"""Checks of outputs and their gradients: determinism, contract, causality, padding, batch, finite values."""

from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.interface import Attention
from evals.certification.subject import ROUNDING, Subject, first_difference


def determinism(subject: Subject) -> str | None:
    """In eval mode the same input gives the same bits."""
    x = subject.inputs(subject.lengths[-1], batch=2)
    if not torch.equal(subject.attention(x), subject.attention(x)):
        return f"two calls on the same input differ in eval mode (n={x.shape[1]})"
    return None


def contract(subject: Subject) -> str | None:
    """Shapes and types are kept; forward is output(attend(project(x))); neither changes what it is given."""
    for time in subject.lengths:
        x = subject.inputs(time, batch=2)
        given = x.clone()
        output = subject.attention(x)
        if not torch.equal(x, given):
            return f"forward changes its input (n={time})"
        if output.shape != x.shape or output.dtype != x.dtype:
            return f"forward returns {list(output.shape)} {output.dtype} for {list(x.shape)} {x.dtype}"
        if type(output) is not Tensor:
            return f"forward returns a {type(output).__name__}: only a plain tensor is known to be computed when the call returns"
        if vars(output):
            return f"forward returns a tensor with attributes of its own: {', '.join(vars(output))}"
        if any(size > 1 and not stride for size, stride in zip(output.shape, output.stride(), strict=True)):
            return f"forward returns a view that repeats its elements: strides {list(output.stride())} of {list(output.shape)}"
        projected = subject.attention.project(x)
        copies = [tensor.clone() for tensor in projected]
        composed = subject.attention.output(subject.attention.attend(*projected))
        if changed := [index for index, copy in enumerate(copies) if not torch.equal(projected[index], copy)]:
            return f"attend changes its tensor {changed[0]} (n={time})"
        if where := first_difference(composed, output):
            return f"forward is not output(attend(project(x))): they differ in {where} (n={time})"
    return None


def causality(subject: Subject) -> str | None:
    """Output t does not change with inputs after t, in value or in gradient."""
    time = subject.lengths[-1]
    x = subject.inputs(time).requires_grad_()
    output = subject.attention(x)
    with torch.no_grad():
        for t in subject.boundaries:
            changed = torch.cat([x[:, : t + 1], subject.inputs(time, seed=1)[:, t + 1 :]], dim=1)
            if where := first_difference(subject.attention(changed)[:, : t + 1], output[:, : t + 1]):
                return f"changing the inputs after {t} changes {where} (n={time})"
    weights = subject.inputs(time, seed=2)
    for t in subject.boundaries:
        (gradient,) = torch.autograd.grad((output[:, t] * weights[:, t]).sum(), x, retain_graph=True)
        future = gradient[0, t + 1 :].abs().amax(dim=1)
        if not future.max() <= ROUNDING[x.dtype] * gradient.abs().max():  # negated, so that NaN is wrong
            return f"output {t} has a gradient of {future.max():.1e} at input {t + 1 + int(future.argmax())} (n={time})"
    return None


def padding(subject: Subject) -> str | None:
    """A padded sequence gives what it gives alone, wherever the padding is and whatever it contains; outputs at padding are 0."""
    pads = subject.block // 2 + 1
    for time in subject.lengths:
        x = subject.inputs(time)
        alone = subject.attention(x)
        real = torch.ones(4, pads + time, dtype=torch.bool, device=x.device)
        real[0, :pads] = False
        real[1, time:] = False
        real[2, : pads // 2], real[2, pads // 2 + time :] = False, False
        real[3, torch.linspace(0, pads + time - 1, pads, device=x.device).long()] = False
        for content in (1.0, 1e4, torch.nan):
            padded = content * subject.inputs(pads + time, batch=4, seed=3)
            padded[real] = x.repeat(4, 1, 1).flatten(0, 1)
            output = subject.attention(padded, real.to(x.dtype))
            for row, place in enumerate(("to the left", "to the right", "on both sides", "between the tokens")):
                if where := first_difference(output[row : row + 1, real[row]], alone):
                    return f"{pads} padded positions {place} change {where} (n={time})"
            if not (output[~real] == 0).all():
                return f"the outputs at {pads} padded positions are not 0 (n={time})"
    return None


def batch(subject: Subject) -> str | None:
    """A sequence gives the same alone as in a batch."""
    for time in subject.lengths:
        x = subject.inputs(time, batch=3)
        together = subject.attention(x)
        for item in range(3):
            if where := first_difference(together[item : item + 1], subject.attention(x[item : item + 1])):
                return f"item {item} of a batch of 3 differs from itself alone in {where} (n={time})"
    return None


def finite(subject: Subject) -> str | None:
    """Huge, tiny, zero and constant inputs, and rows without any token, give finite outputs and gradients."""
    half = [torch.float16] if subject.timed_in == torch.float16 else []
    for dtype in subject.dtypes(torch.float32, torch.bfloat16, *half):
        attention = subject.in_dtype(dtype)
        # bfloat16 has the range of float32, so both overflow at the same lengths: here the shortest and the longest are enough.
        # Without instructions for bfloat16 a backward pass is 60 times as slow.
        for time in subject.lengths if dtype == torch.float32 else sorted({1, subject.lengths[-1]}):
            for case in _extreme_inputs(subject.inputs(time, batch=2, dtype=dtype)):
                if failure := _not_finite(attention, case):
                    return f"{case.name}: {failure} (n={time}, {dtype})"
    return None


class _Case(NamedTuple):
    name: str
    inputs: Tensor
    attention_mask: Tensor | None = None


def _extreme_inputs(x: Tensor) -> list[_Case]:
    """Cases from two rows [2, time, hidden_dim] of normal inputs.

    1e3 makes scores of a million. With 1e4 float32 would round scores to a few units: too coarse for the backward pass of a
    softmax, which computes the weights again. float16 ends at 65504, which squares of scores pass from 16 on.
    """
    huge = "8" if x.dtype == torch.float16 else "1e3"
    one_empty = torch.stack([torch.zeros(x.shape[1]), torch.ones(x.shape[1])]).to(x.device)
    return [
        _Case(f"inputs of size {huge}", float(huge) * x[:1]),
        _Case("inputs of size 1e-3", 1e-3 * x[:1]),
        _Case("inputs that are all 0", 0 * x[:1]),
        _Case("inputs that are all 1", torch.ones_like(x[:1])),
        _Case("a row that is all padding", x, one_empty),
    ]


def _not_finite(attention: Attention, case: _Case) -> str | None:
    """Names the first output or gradient with NaN or infinity."""
    leaf = case.inputs.clone().requires_grad_()
    output = attention(leaf, case.attention_mask)
    leaves: dict[str, Tensor] = {"the inputs": leaf}
    if case.attention_mask is not None:  # a mask may hide a NaN from the inputs, but not from the parameters
        leaves |= dict(attention.named_parameters())
    gradients = torch.autograd.grad(output.sum(), list(leaves.values()), allow_unused=True)
    tensors = {"an output": output} | {
        f"a gradient by {name}": gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            return f"{name} with {'NaN' if tensor.isnan().any() else 'infinity'}{_first_position(tensor)}"
    return None


def _first_position(values: Tensor) -> str:
    """Position of the first value that is not finite, if `values` are [batch, time, hidden_dim]."""
    if values.dim() != 3:
        return ""
    return f", first at position {int((~values.isfinite()).any(dim=2).any(dim=0).nonzero()[0])}"
