"""Workloads: each turns a module and its inputs into the call that is timed.

The module is what the scope asks for: an `Attention` or a `TransformerLayer`, whose inputs are hidden states
[batch, time, hidden_dim], or a `CausalLM`, whose inputs are token ids [batch, time]. A workload does what is needed only once,
such as reading a context, before the first call.
"""

import inspect
import random
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

import torch
from hydra.utils import get_method, instantiate
from torch import Tensor

from bsbr.interface import Attention, State
from bsbr.model import CausalLM, TransformerLayer, TransformerModel
from evals.benchmark.modules import Module, build_module, longest_block
from evals.certification.subject import randomize_zero_parameters
from evals.config import SCOPES, Candidate, Comparison
from evals.errors import UsageError, one_sentence

F = TypeVar("F", bound=Callable[..., object])


def _nothing() -> None:
    """Does nothing."""


class Work(NamedTuple):
    """A prepared workload.

    Attributes:
        call: the call that is timed.
        tokens: tokens that one step goes through.
        steps: steps that one call makes; the latency is the time of a call divided by it.
        counted: counts of the last call, by column of the table of results, such as sent_bytes.
        reads: the part of the inputs that a call reads, which gets new values before each call; None is all of them.
        refresh: prepares what the call takes, after the inputs have changed; not timed.
        outputs: from what a call has returned, its outputs [batch, positions, features] at all positions or at the last; None if
            they are not known.
        part: the module that maps inputs to these outputs; None is the whole module.
    """

    call: Callable[[], object]
    tokens: int
    steps: int = 1
    counted: Callable[[], dict[str, int]] = dict
    reads: Tensor | None = None
    refresh: Callable[[], None] = _nothing
    outputs: Callable[[Any], Tensor] | None = None
    part: Attention | TransformerLayer | TransformerModel | CausalLM | None = None


def limit_to(**limits: object) -> Callable[[F], F]:
    """Decorates a workload with what it can be measured on.

    Args:
        limits: `scopes`, all that it supports; `shortest`, by scope the least seq_len.
    """

    def note(workload: F) -> F:
        vars(workload).update(limits)
        return workload

    return note


def prefill(module: Module, inputs: Tensor) -> Work:
    """One forward pass over the whole sequence, without gradients. A model computes the logits of the next token only."""
    module.eval()

    @torch.inference_mode()
    def call() -> Tensor:
        return forward(module, inputs)

    return Work(call, count_tokens(inputs), outputs=lambda returned: returned)


@limit_to(scopes=("attention",))
def attention(module: Attention, inputs: Tensor) -> Work:
    """`attend` alone, without gradients, on tensors that were projected before."""
    module.eval()
    tensors: tuple[Tensor, ...] = ()

    @torch.inference_mode()
    def project() -> None:
        nonlocal tensors
        tensors = ()  # frees them first
        tensors = module.project(inputs)

    @torch.inference_mode()
    def call() -> Tensor:
        return module.attend(*tensors)

    project()
    outputs = torch.inference_mode()(module.output)
    return Work(call, count_tokens(inputs), refresh=project, outputs=outputs)


@limit_to(shortest={"model": 2})  # its loss is of next tokens
def forward_backward(module: Module, inputs: Tensor) -> Work:
    """One forward pass in training mode and one backward pass.

    The gradient is that of a model's next-token loss with respect to its parameters. For an attention or a layer it is that of
    the sum of the outputs, with respect to the inputs as well: within a model they would have to pass a gradient on.
    """
    gradients = Gradients(module, inputs)

    def call() -> list[Tensor | None]:
        gradients.compute()
        return gradients.drop()

    return Work(call, count_tokens(inputs), outputs=gradients.outputs, part=gradients.part)


@limit_to(shortest={"model": 2})
def train_step(module: Module, inputs: Tensor) -> Work:
    """`forward_backward`, then a step of AdamW in one fused kernel. Its moments exist before the first call."""
    gradients = Gradients(module, inputs)
    # The rate is so low that thousands of steps change neither the weights, which outputs are compared under, nor the time.
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-9, fused=True)

    def call() -> list[Tensor | None]:
        gradients.compute()
        optimizer.step()
        return gradients.drop()

    call()
    return Work(call, count_tokens(inputs), outputs=gradients.outputs, part=gradients.part)


class Gradients:
    """The gradients of one forward pass in training mode."""

    def __init__(self, module: Module, inputs: Tensor) -> None:
        self._module = module.train()
        self._inputs = inputs.requires_grad_(inputs.is_floating_point())
        self.part = module.model if isinstance(module, CausalLM) else module

    def compute(self) -> None:
        loss_of(self._module, self._inputs).backward()

    def drop(self) -> list[Tensor | None]:
        """Takes the gradients away, so that every call begins as the first one did, and returns them.

        Returns:
            The gradients by the inputs and by each parameter; None where there is none.
        """
        gradients = [leaf.grad for leaf in (self._inputs, *self._module.parameters())]
        self._module.zero_grad(set_to_none=True)
        self._inputs.grad = None
        return gradients

    def outputs(self, _: object) -> Tensor:
        """The outputs of a forward pass as `compute` makes it, with their graph."""
        output: Tensor = self.part(self._inputs)
        return output


def loss_of(module: Module, inputs: Tensor) -> Tensor:
    """What is differentiated: a model's next-token loss, otherwise the sum of all outputs."""
    loss: Tensor = module.loss(inputs) if isinstance(module, CausalLM) else module(inputs).sum()
    return loss


def decode(module: Module, inputs: Tensor) -> Work:
    """Decoding, one token at a time, after a context of about `time` tokens. A model computes the logits of each token.

    Some attentions do extra work at one token of each block; BSBR mixes its states for a new chunk. A median over single tokens
    would hide that. So a call decodes as many tokens as the longest block has, half of them before the context is `time` long
    and half after. The time of a call is divided by their number, like the time per output token of a serving benchmark. Without
    blocks, a call decodes one token. Every call starts from the same state, which `extend` does not change.
    """
    module.eval()
    token, context = inputs[:, -1:].clone(), inputs.shape[1]
    steps = min(longest_block(module), 2 * context)
    with torch.inference_mode():
        state = state_after(module, inputs, context - steps // 2)

    def decoded() -> Iterator[tuple[Tensor, State]]:
        after = state
        for _ in range(steps):
            output, after = module.extend(token, after)
            yield output, after

    @torch.inference_mode()
    def call() -> tuple[Tensor, State]:
        for last in decoded():  # noqa: B007
            pass
        return last

    @torch.inference_mode()
    def outputs(_: object) -> Tensor:
        """The outputs of all steps; a call keeps only the last."""
        return torch.cat([output for output, _ in decoded()], dim=1)

    return Work(call, count_tokens(token), steps, reads=token, outputs=outputs)


def forward(module: Module, inputs: Tensor, last: int | None = None) -> Tensor:
    """Outputs of the whole sequence or of its last tokens; of a model, logits of the next token, by default of the last one."""
    if isinstance(module, CausalLM):
        return module.logits(module.model(inputs)[:, -(last or 1) :])
    output: Tensor = module(inputs)
    return output if last is None else output[:, -last:]


def state_after(module: Module, inputs: Tensor, tokens: int) -> State | None:
    """Decoding state after the first `tokens` of the inputs; None after none."""
    return module.extend(inputs[:, :tokens])[1] if tokens else None


def count_tokens(inputs: Tensor) -> int:
    """Number of tokens in a batch of inputs."""
    return inputs.shape[0] * inputs.shape[1]


# --- for a comparison ---------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A workload with the module and the inputs that it works on."""

    module: Module
    inputs: Tensor
    work: Work
    renew: Callable[[], None]  # gives the next call a new input, in place; not timed

    @property
    def read(self) -> Tensor:
        """The input that a call reads."""
        return self.inputs if self.work.reads is None else self.work.reads


def prepare(comparison: Comparison, candidate: Candidate) -> Prepared:
    """Prepares the comparison's workload with fresh weights and inputs.

    Sets the threads and the seed of this process, and lets it flush denormal numbers to 0, as the C++ kernels do: the time of a
    call must not depend on how many of them it meets. No parameter is all 0: such a parameter would hide what it multiplies from
    every comparison of outputs.
    """
    device = comparison.device
    torch.set_num_threads(device.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(comparison.sampling.seed)
    module = randomize_zero_parameters(build_module(comparison, candidate)).to(device.kind, device.torch_dtype)
    inputs = make_inputs(comparison)
    work = make_work(comparison, module, inputs)
    renewal = Renewal(inputs if work.reads is None else work.reads, comparison.model.vocab_size)

    def renew() -> None:
        renewal.renew()
        work.refresh()

    return Prepared(module, inputs, work, renew)


def make_work(comparison: Comparison, module: Module, inputs: Tensor) -> Work:
    """The comparison's workload on a module and its inputs."""
    workload = instantiate({**comparison.workload, "_partial_": True})
    return cast(Work, workload(module, inputs))


class Renewal:
    """Gives a tensor new values in place, as random as the old ones, in one pass.

    Numbers change their signs, feature by feature, and token ids are shifted, position by position: every call gets another input,
    in the same memory. An output that is remembered, by the values or by the memory of its input, is then found out. No seed
    repeats them in another process, which could find outputs that the first has written to a file.
    """

    PATTERNS = 64

    def __init__(self, tensor: Tensor, vocab_size: int) -> None:
        self._tensor = tensor
        self._vocab_size = vocab_size
        self._random = random.Random()
        self._unused: list[Tensor] = []  # a pattern soon used again could restore an earlier input

    @torch.no_grad()
    def renew(self) -> None:
        self._unused = self._unused or self._random.sample(self._patterns, self.PATTERNS)
        pattern = self._unused.pop()
        if self._tensor.is_floating_point():
            self._tensor.mul_(pattern)
        else:
            self._tensor.add_(pattern).remainder_(self._vocab_size)

    @cached_property
    def _patterns(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(self._random.getrandbits(63))
        size = (self.PATTERNS, self._tensor.shape[-1])
        if self._tensor.is_floating_point():
            patterns = 2 * torch.randint(2, size, generator=generator) - 1
        else:
            patterns = torch.randint(1, max(2, self._vocab_size), size, generator=generator)
        return patterns.to(self._tensor.device, self._tensor.dtype).unbind()


def make_inputs(comparison: Comparison) -> Tensor:
    """Random inputs: token ids [batch, time] for a model, otherwise hidden states [batch, time, hidden_dim]."""
    shape, model, device = comparison.shape, comparison.model, comparison.device
    size = (shape.batch_size, shape.seq_len)
    if model.scope == "model":
        return torch.randint(model.vocab_size, size, device=device.kind)
    return torch.randn(*size, model.hidden_dim, device=device.kind, dtype=device.torch_dtype)


def check_workload(comparison: Comparison) -> None:
    """Raises UsageError unless the workload is a function that takes its options, and supports this scope and length."""
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
