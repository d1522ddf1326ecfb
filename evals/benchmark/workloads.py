"""What is measured: each workload turns a module and its inputs into the call that is sampled.

The module is what the scope asks for: an `Attention` or a `TransformerLayer`, whose inputs are hidden states
[batch, time, hidden_dim], or a `CausalLM`, whose inputs are token ids [batch, time]. What a workload needs only once,
such as reading a context or the state of an optimizer, is done before the first call.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch
from hydra.utils import get_method, instantiate
from torch import Tensor

from bsbr.interface import Attention, State
from bsbr.model import CausalLM, TransformerLayer, TransformerModel
from evals.config import SCOPES, Candidate, Comparison
from evals.errors import UsageError, one_sentence

F = TypeVar("F", bound=Callable[..., object])
Module = Attention | TransformerLayer | CausalLM


class Work(NamedTuple):
    """The call that is sampled.

    steps: how often a call does what is measured; the latency is the call's time divided by it. tokens: that one step
    goes through. counted: what the last call counted besides, by columns of the table of results.
    """

    call: Callable[[], object]
    tokens: int
    steps: int = 1
    counted: Callable[[], dict[str, int]] = dict


def limit_to(**limits: object) -> Callable[[F], F]:
    """Notes on a workload where it can be measured: `scopes`, all that there are; `shortest`, the least seq_len at a scope."""

    def note(workload: F) -> F:
        vars(workload).update(limits)
        return workload

    return note


def prefill(module: Module, inputs: Tensor) -> Work:
    """One forward pass over the whole sequence, without gradients; of a model, with the logits of the next token alone."""
    module.eval()

    @torch.inference_mode()
    def call() -> Tensor:
        return forward(module, inputs)

    return Work(call, count_tokens(inputs))


@limit_to(scopes=("attention",))
def attention(module: Attention, inputs: Tensor) -> Work:
    """The function alone, without gradients: `attend` on tensors that were projected before."""
    module.eval()
    with torch.inference_mode():
        tensors = module.project(inputs)

    @torch.inference_mode()
    def call() -> Tensor:
        return module.attend(*tensors)

    return Work(call, count_tokens(inputs))


@limit_to(shortest={"model": 2})  # its loss is of next tokens
def forward_backward(module: Module, inputs: Tensor) -> Work:
    """One forward pass in training mode and the gradients of all parameters, and of hidden states where those are the inputs.

    What is derived is the next-token loss of a model, and the sum of the outputs of an attention or a layer, which
    as part of a model would have to pass a gradient on to what stands before it.
    """
    backward, forget = _gradients(module, inputs)

    def call() -> None:
        backward()
        forget()

    return Work(call, count_tokens(inputs))


@limit_to(shortest={"model": 2})
def train_step(module: Module, inputs: Tensor) -> Work:
    """`forward_backward`, then a step of AdamW, in one fused kernel, whose moments exist before the first call."""
    backward, forget = _gradients(module, inputs)
    # The batch is always the same: at this rate thousands of steps leave the weights, and with them the time, as they are.
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)

    def call() -> None:
        backward()
        optimizer.step()
        forget()

    call()
    return Work(call, count_tokens(inputs))


def _gradients(module: Module, inputs: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """Makes the gradients of one forward pass, and drops them: a call that left them would begin with what the first did not."""
    module.train()
    inputs = inputs.requires_grad_(inputs.is_floating_point())

    def backward() -> None:
        loss = module.loss(inputs) if isinstance(module, CausalLM) else module(inputs).sum()
        loss.backward()

    def forget() -> None:
        module.zero_grad(set_to_none=True)
        inputs.grad = None

    return backward, forget


def decode(module: Module, inputs: Tensor) -> Work:
    """One token at a time behind a context of `time` tokens, the state warm; of a model, with its logits.

    Some attentions do at one token in a block what the others profit from: BSBR, for instance, mixes its states for a new
    chunk. A median over single tokens would never show that. So a call decodes as many tokens as the longest block has,
    half of them before the context is `time` long and half after, and its time is divided by their number, as the time per
    output token of a serving benchmark is. Where the attention has no blocks, a call is one token. Every call
    starts from the same state, which `extend` leaves as it was: however many samples there are, the context does not drift.
    """
    module.eval()
    token, context = inputs[:, -1:], inputs.shape[1]
    steps = min(longest_block(module), 2 * context)
    with torch.inference_mode():
        state = state_after(module, inputs, context - steps // 2)

    @torch.inference_mode()
    def call() -> tuple[Tensor, State]:
        output, after = module.extend(token, state)
        for _ in range(steps - 1):
            output, after = module.extend(token, after)
        return output, after

    return Work(call, count_tokens(token), steps)


def forward(module: Module, inputs: Tensor) -> Tensor:
    """Outputs for the whole sequence; of a model, the logits of the token that follows it."""
    if isinstance(module, CausalLM):
        return cast(Tensor, module.head(module.model(inputs)[:, -1:]))
    output: Tensor = module(inputs)
    return output


def state_after(module: Module, inputs: Tensor, tokens: int) -> State | None:
    return module.extend(inputs[:, :tokens])[1] if tokens else None


def longest_block(module: Module) -> int:
    """The longest block in it, 1 if no attention in it has any: the class that says nothing of blocks has none."""
    attentions = [part for part in module.modules() if isinstance(part, Attention)]
    return max((one.block_length for one in attentions if type(one).block_length is not Attention.block_length), default=1)


def count_tokens(inputs: Tensor) -> int:
    return inputs.shape[0] * inputs.shape[1]


# --- what a comparison asks for -----------------------------------------------------------------


def prepare(comparison: Comparison, candidate: Candidate) -> Work:
    """The workload's call, on fresh weights and inputs. Meant for a process of its own: it sets threads and seed."""
    device = comparison.device
    torch.set_num_threads(device.threads)
    torch.manual_seed(comparison.sampling.seed)
    module = build_module(comparison, candidate).to(device.kind, device.torch_dtype)
    workload = instantiate({**comparison.workload, "_partial_": True})
    return cast(Work, workload(module, make_inputs(comparison)))


def build_module(comparison: Comparison, candidate: Candidate) -> Module:
    """What the comparison's scope asks for: the attention with its projections, a layer of the decoder, or all of it."""
    model = comparison.model
    if model.scope == "attention":
        return candidate.build(model)
    ff_dim = model.ff_dim if candidate.ff_dim is None else candidate.ff_dim

    def attention(**_: int) -> Attention:
        return candidate.build(model)

    if model.scope == "layer":
        return TransformerLayer(model.hidden_dim, model.num_heads, ff_dim, attention=attention, conv_size=model.conv_size)
    sizes = (model.vocab_size, model.hidden_dim, model.num_layers, model.num_heads, ff_dim)
    positions = model.positions == "sinusoidal"
    return CausalLM(TransformerModel(*sizes, attention=attention, conv_size=model.conv_size, positions=positions))


def make_inputs(comparison: Comparison) -> Tensor:
    shape, model, device = comparison.shape, comparison.model, comparison.device
    size = (shape.batch_size, shape.seq_len)
    if model.scope == "model":
        return torch.randint(model.vocab_size, size, device=device.kind)
    return torch.randn(*size, model.hidden_dim, device=device.kind, dtype=device.torch_dtype)


def check_workload(comparison: Comparison) -> None:
    """Raises UsageError unless the workload is a function that takes its options and can be measured at this scope."""
    options = {key: value for key, value in comparison.workload.items() if key != "_target_"}
    target, scope = comparison.workload["_target_"], comparison.model.scope
    try:
        function = get_method(target)
        inspect.signature(function).bind("module", "inputs", **options)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"workload._target_ must be a function such as evals.benchmark.workloads.prefill: {one_sentence(error)}"
        ) from error
    except TypeError as error:
        raise UsageError(f"workload {target} cannot take these options: {one_sentence(error)}") from error
    scopes = getattr(function, "scopes", SCOPES)
    if scope not in scopes:
        raise UsageError(f"workload {target} is measured at model.scope={' or '.join(scopes)} only, got {scope}")
    shortest = vars(function).get("shortest", {}).get(scope, 1)
    if comparison.shape.seq_len < shortest:
        raise UsageError(
            f"workload {target} of a {scope} needs shape.seq_len of at least {shortest}, got {comparison.shape.seq_len}"
        )
