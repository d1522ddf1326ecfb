"""The check of a candidate in the configuration in which it is timed: its length, batch size, precision, threads and mode.

The certificate looks at short sequences. Here the very call that is timed is compared with what was certified, and with itself on
other inputs. It costs the two calls whose memory is measured, and about one more.
"""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bsbr.model import CausalLM
from evals.benchmark.modules import Module, attentions_of, build_module
from evals.benchmark.workloads import Prepared, forward
from evals.certification.subject import ROUNDING, coarser, first_difference, no_dropout, threads
from evals.config import DTYPES, Candidate, Comparison
from evals.measure.flops import count_flops

STREAMED = 8
"""Number of last tokens that are decoded one by one."""

DECLARED_TOO_MUCH = 1.05
"""Largest ratio of declared to counted FLOPs, as in the certificate."""


class ConfigurationCheck:
    """Keeps what two calls returned, and finds what is wrong with it.

    The caller runs `first_call`, `change_late_inputs` and `second_call` in this order, and may measure the calls.
    """

    def __init__(self, prepared: Prepared, comparison: Comparison, candidate: Candidate) -> None:
        self._comparison = comparison
        self._candidate = candidate
        self._prepared = prepared
        self._work = prepared.work
        self._part = prepared.module if self._work.part is None else self._work.part
        self.first: Any = None
        self.second: Any = None
        self.passed: list[str] = []  # names of the checks that passed

    def first_call(self) -> None:
        self.first = self._work.call()

    def second_call(self) -> None:
        """Also counts its FLOPs, which changes nothing in the memory that it holds."""
        self._counted = count_flops(lambda: setattr(self, "second", self._work.call())) / self._work.steps

    def change_late_inputs(self) -> None:
        """Keeps the first output, and gives the next call other inputs from the middle on, in the same memory."""
        if self._work.outputs is None:
            return
        self._kept = [(leaf, leaf.clone()) for leaf in _numbers(self.first)]
        self._before = self._outputs(self.first).detach().clone()
        read = self._prepared.read
        # Not at the edge of a block, where a leak within blocks could not be seen.
        self._changed_from = min(self._time - 1, self._time // 2 + 3) if self._work.reads is None else 0
        early = read[:, : self._changed_from].clone()
        self._prepared.renew()
        with torch.no_grad():
            read[:, : self._changed_from] = early
        self._work.refresh()

    def finding(self, declared_flops: float) -> str:
        """What is wrong, with position and size; empty if nothing is or nobody knows which outputs a call has.

        Changes the weights of the module a little if it trains.
        """
        if self._work.outputs is None:
            return ""
        self._after = self._outputs(self.second)
        checks: dict[str, Callable[[], str | None]] = {
            "plain tensors": self._plain,
            "no overwriting": self._overwritten,
            "causality": self._causality,
            "certified first outputs": self._first_outputs,
            "streaming": self._streaming,
            "gradients": self._gradients,
            "FLOPs": partial(self._flops, declared_flops),
        }
        for name, check in checks.items():
            failure = check()
            if failure:
                return f"{name}: {failure}"
            if failure is not None:
                self.passed.append(name)
        return ""

    def certified_as(self) -> str:
        """The configuration and what was checked in it, for the row of the table."""
        if not self.passed:
            return ""
        comparison, training = self._comparison, self._trains
        shape, device = comparison.shape, comparison.device
        mode = "training mode, with gradients" if training else "eval mode, without gradients"
        return f"{shape.batch_size}×{shape.seq_len} {device.dtype}, {device.threads} threads, {mode}: {', '.join(self.passed)}"

    # --- one method a check: None if it does not apply, otherwise the failure or an empty string ---

    def _plain(self) -> str | None:
        for leaf in _numbers(self.second):
            if type(leaf) is not Tensor:
                return f"a call returns a {type(leaf).__name__}: only a plain tensor is known to be computed when the call returns"
        if not self._after.isfinite().all():
            return f"output {int((~self._after.isfinite()).any(dim=2).any(dim=0).nonzero()[0])} is not finite"
        return ""

    def _overwritten(self) -> str | None:
        if any(not torch.equal(leaf, copy) for leaf, copy in self._kept):
            return "a second call overwrites what the first returned"
        return ""

    def _causality(self) -> str | None:
        start, at = self._changed_from, f"changing the inputs from {self._changed_from} on"
        if self._is_whole and start and (where := self._difference(self._after[:, :start], self._before[:, :start])):
            return f"{at} changes {where}"
        late = slice(start, None) if self._is_whole else slice(None)
        if not self._difference(self._after[:, late], self._before[:, late]):
            return f"{at} changes no output"
        return ""

    def _first_outputs(self) -> str | None:
        if not self._is_whole:
            return None
        count = self._certified_length
        truth = self._certified(count)
        where = self._difference(self._after[:, :count], truth)
        return f"{where} differs from that of {count} tokens alone, as they were certified" if where else ""

    @torch.no_grad()
    def _streaming(self) -> str | None:
        """Every sequence alone gives the same outputs piece by piece; decoded outputs come from one pass over it as well."""
        if self._work.reads is not None:  # decoding
            steps, token = self._work.steps, self._work.reads
            for item, (sequence, last) in enumerate(zip(self._sequences(self._time - steps // 2), token.split(1), strict=True)):
                tokens = torch.cat([sequence, last.expand(-1, steps, *last.shape[2:])], dim=1)
                truth = forward(self._new_part, tokens, last=steps)
                if where := self._difference(self._after[item : item + 1], truth, start=tokens.shape[1] - steps):
                    return f"{where} differs from a pass over all {tokens.shape[1]} tokens"
            return ""
        for item, sequence in enumerate(self._sequences(self._time)):
            for start, streamed in self._streamed(sequence):
                output = self._after[item : item + 1]
                output = output[:, start : start + streamed.shape[1]] if self._is_whole else output
                if where := self._difference(output, streamed, start=start):
                    return f"{where} differs from that of item {item} streamed alone"
        return ""

    def _streamed(self, sequence: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Outputs of a sequence in pieces as short as the certificate's sequences, and of its last tokens one by one.

        Yields:
            The position of a piece and its outputs, of those positions only of which the timed call has outputs.
        """
        module, decoding = self._new_part, max(0, self._time - STREAMED)
        decoder = module.model if isinstance(module, CausalLM) else module
        state = None
        starts = [*range(0, decoding, self._certified_length), *range(decoding, self._time)]
        for start, stop in pairwise([*starts, self._time]):
            output, state = decoder.extend(sequence[:, start:stop], state)
            if self._is_whole or stop == self._time:
                yield start, module.logits(output) if isinstance(module, CausalLM) else output

    def _sequences(self, time: int) -> tuple[Tensor, ...]:
        """The first tokens of each sequence of the batch: what one gives alone must not depend on the others."""
        inputs: Tensor = self._prepared.inputs
        return tuple(inputs.detach()[:, :time].split(1))

    def _gradients(self) -> str | None:
        """The gradients of the first outputs are those of the certified short run, and those by later inputs are 0."""
        if not self._trains:
            return None
        inputs = self._prepared.inputs
        count = self._certified_length
        weights = torch.randn(self._after[:, :count].shape, generator=torch.Generator().manual_seed(1)).to(self._after)
        new = self._new_part
        leaf = inputs.detach()[:, :count].clone().requires_grad_(inputs.is_floating_point())
        with threads(1):
            short = _gradients_of((new(leaf) * weights).sum(), {"an input": leaf, **dict(new.named_parameters())})
        whole = _gradients_of((self._after[:, :count] * weights).sum(), {"an input": inputs, **dict(self._part.named_parameters())})
        if "an input" in whole:
            late = whole["an input"][:, count:]
            if late.numel() and float(late.abs().max()) > self._allowed * float(whole["an input"].abs().max()):
                return f"the first {count} outputs have a gradient of {float(late.abs().max()):.1e} at a later input"
            whole["an input"] = whole["an input"][:, :count]
        size = max((float(gradient.abs().max()) for gradient in short.values()), default=0.0)
        for name in short | whole:
            zero = torch.zeros_like((short | whole)[name])
            error = float((short.get(name, zero) - whole.get(name, zero)).abs().max())
            if not error <= 3 * self._allowed * size:
                return f"the gradient by {name} of the first {count} outputs is off the certified one by {error:.1e} of {size:.1e}"
        return ""

    def _flops(self, declared: float) -> str | None:
        if self._work.reads is not None:  # decoding: what is declared was counted, of two tokens
            return None
        if declared > DECLARED_TOO_MUCH * self._counted and (self._counted or self._after.device.type == "cpu"):
            return f"a step declares {declared:,.0f}, in matrix products that ran were counted {self._counted:,.0f}"
        return ""

    # --- what they share ---

    @property
    def _time(self) -> int:
        return self._prepared.inputs.shape[1]

    @property
    def _certified_length(self) -> int:
        """The longest length of the certificate, if there are so many tokens."""
        return min(self._time, 3 * max(one.block_length for one in attentions_of(self._part)) + 7)

    @property
    def _trains(self) -> bool:
        return self._prepared.module.training

    @property
    def _is_whole(self) -> bool:
        """Whether there is an output for every input."""
        return self._after.shape[1] == self._time and self._work.reads is None

    @property
    def _allowed(self) -> float:
        return allowed_rounding(self._prepared.module, self._comparison)

    def _difference(self, output: Tensor, truth: Tensor, start: int = 0) -> str:
        return first_difference(output.detach(), truth.detach(), allowed=self._allowed, start=start)

    def _outputs(self, returned: Any) -> Tensor:
        assert self._work.outputs is not None
        with no_dropout(self._prepared.module):
            return self._work.outputs(returned)

    @cached_property
    def _new_part(self) -> Any:
        """A new module with the same weights, in eval mode."""
        device = self._comparison.device
        module = build_module(self._comparison, self._candidate).to(device.kind, device.torch_dtype)
        module.load_state_dict(self._prepared.module.state_dict())
        part = module.model if isinstance(module, CausalLM) and self._part is not self._prepared.module else module
        return part.eval()

    @torch.no_grad()
    def _certified(self, time: int) -> Tensor:
        """The outputs as the certificate computes them: a new module in eval mode, few sequences, with one thread."""
        with threads(1):
            return torch.cat([self._new_part(sequence) for sequence in self._sequences(time)])


def value_difference(returned: Any, truth: Any, allowed: float) -> str:
    """How two values that calls have returned differ; empty if by no more than `allowed` of the largest number."""
    for index, (one, other) in enumerate(zip(_numbers(returned), _numbers(truth), strict=True)):
        error, size = float((one - other).abs().max()), float(other.abs().max())
        if not error <= 3 * allowed * size:
            return f"its tensor {index} differs by {error:.1e} of {size:.1e}"
    return ""


def allowed_rounding(module: Module, comparison: Comparison) -> float:
    """Largest difference between two orders of the same sums, relative to the largest output: each attention adds its share."""
    dtype = DTYPES[precision(module, comparison) or comparison.device.dtype]
    return ROUNDING[dtype] * len(attentions_of(module))


def precision(module: Module, comparison: Comparison) -> str:
    """The precision in which a module's attentions say that they compute, if it is coarser than that of the comparison."""
    dtype = comparison.device.torch_dtype
    coarsest = dtype
    for attention in attentions_of(module):
        coarsest = coarser(coarsest, attention.computes_in)
    return "" if coarsest == dtype else str(coarsest).removeprefix("torch.")


def _numbers(returned: Any) -> list[Tensor]:
    """All tensors of real numbers in what a call has returned, but for empty ones."""
    return [
        leaf.detach() for leaf in tree_leaves(returned) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()
    ]


def _gradients_of(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients by those leaves that have one."""
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
