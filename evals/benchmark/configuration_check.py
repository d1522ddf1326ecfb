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

from bsbr.interface import Attention
from bsbr.model import CausalLM
from evals.benchmark.gradient_check import first_gradients, slope_difference
from evals.benchmark.modules import attentions_of, build_module
from evals.benchmark.tolerance import allowed_rounding, copies, numbers_in
from evals.benchmark.workloads import Prepared, forward
from evals.certification.reference_rows import ROWS, last_reference_outputs
from evals.certification.subject import first_difference, no_dropout, threads
from evals.config import Candidate, Comparison
from evals.measure.flops import count_flops

STREAMED = 8
"""Number of last tokens that are decoded one by one."""

LONGEST_PIECE = 1024
"""Tokens of a piece of streaming, if the certificate's sequences are shorter: short pieces alone take many times as long."""

DECLARED_TOO_MUCH = 1.05
"""Largest ratio of declared to counted FLOPs, as in the certificate."""


class ConfigurationCheck:
    """Keeps what two calls returned, and finds what is wrong with it.

    The caller runs `first_call`, `keep_first`, `change_late_inputs` and `second_call` in this order, and may measure the calls.
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

    def keep_first(self) -> None:
        """Copies what the first call returned, as it is now: it must not change later."""
        self._copies = copies(self.first)

    def change_late_inputs(self) -> None:
        """Gives the next call other inputs from the middle on, in the same memory."""
        if self._work.outputs is None:
            return
        self._before = self._outputs(self.first).detach().clone()
        read = self._prepared.read
        # Not at the edge of a block, where a leak within blocks could not be seen.
        self._changed_from = min(self._time - 1, self._time // 2 + 3) if self._work.reads is None else 0
        early = read[:, : self._changed_from].clone()
        self._prepared.renew()
        with torch.no_grad():
            read[:, : self._changed_from] = early
        self._work.refresh()
        self._given = read.detach().clone()

    def finding(self, declared_flops: float, thread_count: int) -> str:
        """What is wrong, with position and size; empty if nothing is or nobody knows which outputs a call has.

        Args:
            declared_flops: of a step.
            thread_count: for everything but the calls of the configuration; other checks may run beside this one.
        """
        if self._work.outputs is None:
            return ""
        if kind := self._unplain():
            return f"plain tensors: a call returns {kind}: only a plain tensor is known to be computed when the call returns"
        self.passed.append("plain tensors")
        self._after = self._outputs(self.second)
        checks: dict[str, Callable[[], str | None]] = {
            "finite": self._finite,
            "no overwriting": self._overwritten,
            "causality": self._causality,
            "certified first outputs": self._first_outputs,
            "streaming": self._streaming,
            "reference": self._reference,
            "gradients": self._gradients,
            "slope": self._slope,
            "FLOPs": partial(self._flops, declared_flops),
        }
        with threads(thread_count):
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

    def _unplain(self) -> str:
        """The kind of a returned tensor that is no plain one; empty if all are plain."""
        for leaf in numbers_in(self.second):
            if type(leaf) is not Tensor:
                return f"a {type(leaf).__name__}"
            if vars(leaf):
                return f"a tensor with attributes ({', '.join(vars(leaf))})"
        return ""

    def _finite(self) -> str | None:
        if not self._after.isfinite().all():
            return f"output {int((~self._after.isfinite()).any(dim=2).any(dim=0).nonzero()[0])} is not finite"
        return ""

    def _overwritten(self) -> str | None:
        if any(not torch.equal(leaf, copy) for leaf, copy in zip(numbers_in(self.first), self._copies, strict=True)):
            return "what a call has returned changes afterwards: by a later call, or by work that goes on in the background"
        if not torch.equal(self._prepared.read, self._given):
            return "a call changes its input"
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
        """Outputs of a sequence in pieces, the first as short as the certificate's sequences, and of its last tokens one by one.

        Yields:
            The position of a piece and its outputs, of those positions only of which the timed call has outputs.
        """
        module, decoding = self._new_part, max(0, self._time - STREAMED)
        decoder = module.model if isinstance(module, CausalLM) else module
        state = None
        starts, piece = [0], self._certified_length
        while starts[-1] + piece < decoding:
            starts.append(starts[-1] + piece)
            piece = max(piece, min(2 * piece, LONGEST_PIECE))
        starts += range(max(1, decoding), self._time)
        for start, stop in pairwise([*starts, self._time]):
            output, state = decoder.extend(sequence[:, start:stop], state)
            if self._is_whole or stop == self._time:
                yield start, module.logits(output) if isinstance(module, CausalLM) else output

    def _sequences(self, time: int) -> tuple[Tensor, ...]:
        """The first tokens of each sequence of the batch: what one gives alone must not depend on the others."""
        inputs: Tensor = self._prepared.inputs
        return tuple(inputs.detach()[:, :time].split(1))

    @torch.no_grad()
    def _reference(self) -> str | None:
        """The last outputs of the first sequence, or those of an attention in a layer or model, are the reference's."""
        module, steps = self._new_part, self._work.steps
        if not isinstance(module, Attention):
            attention = attentions_of(module)[0].train(self._trains)
            tokens = torch.randn(1, self._time, attention.hidden_dim, generator=torch.Generator().manual_seed(3)).to(self._after)
            with no_dropout(attention):
                outputs = attention(tokens)
            attention.eval()
        elif self._work.reads is not None:  # decoding
            attention, (sequence, *_) = module, self._sequences(self._time - steps // 2)
            tokens = torch.cat([sequence, self._work.reads[:1].expand(-1, steps, -1)], dim=1)
            outputs = self._after[:1]
        else:
            attention, (tokens, *_) = module, self._sequences(self._time)
            outputs = self._after[:1]
        rows = min(ROWS, outputs.shape[1])
        truth = last_reference_outputs(attention, tokens, rows)
        if truth is None:
            return None
        where = self._difference(outputs[:, -rows:], attention.output(truth.to(tokens)), start=tokens.shape[1] - rows)
        return f"{where} differs from the reference over all {tokens.shape[1]} tokens" if where else ""

    def _gradients(self) -> str | None:
        """The gradients of the first outputs are those of the certified short run, and those by later inputs are 0."""
        if not self._trains:
            return None
        part: Any = self._part
        return first_gradients(self._after, self._prepared.inputs, part, self._new_part, self._certified_length, self._allowed)

    def _slope(self) -> str | None:
        """The gradients that the call returned are the slope of its loss."""
        if not self._trains:
            return None
        module, inputs = self._prepared.module, self._prepared.inputs
        return slope_difference(self._comparison, self._candidate, module, inputs, self.second, self._allowed)

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
