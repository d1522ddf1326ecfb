"""What is measured: each workload turns a module and its inputs into the call that is sampled.

The module is an `Attention`, its inputs hidden states [batch, time, hidden_dim], or a `TransformerModel`, its inputs
token ids [batch, time]; both have `forward` and `extend`. A workload's own cost, such as reading a context, falls
before the first call.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.interface import Attention
from bsbr.model import TransformerModel

Module = Attention | TransformerModel


class Work(NamedTuple):
    """The call that is sampled, and how many tokens one call goes through."""

    call: Callable[[], object]
    tokens: int


def prefill(module: Module, inputs: Tensor) -> Work:
    """One forward pass over the whole sequence, without gradients."""
    module.eval()

    @torch.inference_mode()
    def call() -> Tensor:
        output: Tensor = module(inputs)
        return output

    return Work(call, tokens_in(inputs))


def forward_backward(module: Module, inputs: Tensor) -> Work:
    """One forward pass in training mode and the gradients of all parameters, and of hidden states where those are the inputs."""
    module.train()
    inputs = inputs.requires_grad_(inputs.is_floating_point())

    def call() -> None:
        module.zero_grad(set_to_none=True)
        inputs.grad = None
        module(inputs).sum().backward()

    return Work(call, tokens_in(inputs))


def decode(module: Module, inputs: Tensor) -> Work:
    """One token behind a context of `time` tokens; each call appends the next, so that what happens now and then is sampled too."""
    module.eval()
    token = inputs[:, -1:].clone()
    with torch.inference_mode():
        _, state = module.extend(inputs)

    @torch.inference_mode()
    def call() -> Tensor:
        nonlocal state
        output, state = module.extend(token, state)
        return output

    return Work(call, tokens_in(token))


def tokens_in(inputs: Tensor) -> int:
    return inputs.shape[0] * inputs.shape[1]
