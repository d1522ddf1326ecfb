"""What is measured: each workload turns a module and its inputs into the call that is sampled.

The module is an `Attention`, its inputs hidden states [batch, time, hidden_dim], or a `TransformerModel`, its inputs
token ids [batch, time]; both have `forward` and `extend`. A workload's own cost, such as reading a context, falls
before the first call.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from hydra.utils import instantiate
from torch import Tensor

from bsbr.interface import Attention
from bsbr.model import TransformerModel
from evals.config import Comparison, Contestant

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


# --- what a comparison asks for -----------------------------------------------------------------


def prepare(comparison: Comparison, contestant: Contestant) -> Work:
    """The workload's call, on fresh weights and inputs. Meant for a process of its own: it sets threads and seed."""
    device = comparison.device
    torch.set_num_threads(device.threads)
    torch.manual_seed(comparison.sampling.seed)
    module = build(comparison, contestant).to(device.kind, device.torch_dtype)
    workload = instantiate({**comparison.workload, "_partial_": True})
    return cast(Work, workload(module, inputs(comparison)))


def build(comparison: Comparison, contestant: Contestant) -> Module:
    """What the comparison's scope asks for: the attention with its projections, or a decoder of it."""
    model = comparison.model
    if model.scope == "attention":
        return contestant.build(model)
    return TransformerModel(
        model.vocab_size,
        model.hidden_dim,
        model.num_layers,
        model.num_heads,
        model.ff_dim,
        attention=lambda **_: contestant.build(model),
    )


def inputs(comparison: Comparison) -> Tensor:
    shape, model, device = comparison.shape, comparison.model, comparison.device
    size = (shape.batch_size, shape.seq_len)
    if model.scope == "attention":
        return torch.randn(*size, model.hidden_dim, device=device.kind, dtype=device.torch_dtype)
    return torch.randint(model.vocab_size, size, device=device.kind)


# --- what is declared ---------------------------------------------------------------------------


def cost(comparison: Comparison, contestant: Contestant) -> dict[str, int]:
    """Bytes of parameters, and what all layers' attentions declare at this shape: bytes of state, FLOPs of one forward pass."""
    with torch.device("meta"):
        module = build(comparison, contestant).to(comparison.device.torch_dtype)
        attention = contestant.build(comparison.model).to(comparison.device.torch_dtype)
    layers = comparison.model.num_layers if comparison.model.scope == "model" else 1
    size = (comparison.shape.seq_len, comparison.shape.batch_size)
    return {
        "parameter_bytes": sum(parameter.nbytes for parameter in module.parameters()),
        "state_bytes": layers * attention.state_bytes(*size),
        "flops": layers * attention.flops(*size),
    }
