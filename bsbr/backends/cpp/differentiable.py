"""Differentiation of C++ kernels: the first derivative is a kernel, and further derivatives are torch's."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from bsbr.backends.selection import is_transformed

Outputs = TypeVar("Outputs", bound=Tensor | tuple[Tensor, ...])


class Differentiable(NamedTuple, Generic[Outputs]):
    """A function of tensors and options with kernels for its value and its first derivative.

    A second derivative (create_graph=True) is that of `torch_form`, which is computed again from the arguments; so are gradients
    of a batch of vectors (is_grads_batched=True, or torch.vmap of a gradient).
    """

    forward: Callable[..., tuple[Outputs, tuple[Tensor, ...]]]
    """forward(*arguments): the output or outputs, and tensors that `backward` needs beside the arguments."""

    backward: Callable[..., tuple[Tensor | None, ...]]
    """backward(arguments, saved, gradients): the gradient of each argument, None for an option. `gradients` has one tensor per
    output."""

    torch_form: Callable[..., Outputs]
    """torch_form(*arguments): the same output or outputs by torch operations."""

    def __call__(self, *arguments: Any) -> Outputs:
        """The value; differentiable if gradients are enabled and a tensor requires one."""
        if not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)):
            return self.forward(*arguments)[0]
        outputs: Outputs = _Function.apply(self, *arguments)  # type: ignore[no-untyped-call]
        return outputs


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Differentiable[Any], *arguments: Any) -> Any:
        outputs, saved = function.forward(*arguments)
        ctx.function = function
        ctx.options = tuple(None if isinstance(x, Tensor) else x for x in arguments)
        ctx.tensor_places = tuple(i for i, x in enumerate(arguments) if isinstance(x, Tensor))
        ctx.save_for_backward(*(arguments[i] for i in ctx.tensor_places), *saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        arguments = list(ctx.options)
        for place, tensor in zip(ctx.tensor_places, tensors, strict=False):
            arguments[place] = tensor
        # create_graph=True: the gradients are to be differentiated. A batch of gradients, which torch.func.vmap and
        # is_grads_batched=True make, is no tensor that a kernel can read.
        # Compiled code makes none, and torch.compile cannot trace the question.
        is_batched = is_transformed() or (
            not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_legacy_batchedtensor, gradients))
        )
        if torch.is_grad_enabled() or is_batched:
            return None, *_gradients_of_torch_form(ctx.function.torch_form, arguments, gradients)
        saved = tensors[len(ctx.tensor_places) :]
        return None, *ctx.function.backward(tuple(arguments), saved, gradients)


def _gradients_of_torch_form(
    torch_form: Callable[..., Tensor | tuple[Tensor, ...]], arguments: list[Any], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each argument is a new node of the graph, so that an argument that was computed from another counts for itself only.
        nodes = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in arguments]
        outputs = torch_form(*nodes)
    wanted = [i for i, x in enumerate(nodes) if isinstance(x, Tensor) and x.requires_grad]
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    found = torch.autograd.grad(outputs, [nodes[i] for i in wanted], gradients, create_graph=again, allow_unused=True)
    by_place = dict(zip(wanted, found, strict=True))
    return tuple(by_place.get(i) for i in range(len(nodes)))
