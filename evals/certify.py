"""The certificate: does this attention do what an attention promises, before anyone times it?

`python -m evals.certify` checks every variant in `conf/attention/`, `'attention=[bsbr]'` one, and
`--config-dir my/conf 'attention=[mine]'` one that lives elsewhere. Exit code 1 if any check is red.

Each check is a function of a `Subject` that returns what broke, in words, or None. They rely on nothing
but the contract in `bsbr.interface`.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bsbr.interface import Attention, State
from evals.measure import count_flops, peak_allocated_bytes

Build = Callable[[], Attention]
Check = Callable[["Subject"], str | None]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest |fast − reference| / |reference| (norms) that passes for parity, in outputs and in gradients."""

ROUNDING = 1e-9
"""What two orders of the same float64 sums may differ by, relative to the largest output."""


@dataclass(frozen=True)
class Finding:
    """One check's outcome: `detail` says what broke where, and is empty if nothing did."""

    check: str
    detail: str

    @property
    def passed(self) -> bool:
        return not self.detail


@dataclass(frozen=True)
class Subject:
    """The attention under test, and the inputs that every check draws from."""

    build: Build

    @cached_property
    def attention(self) -> Attention:
        """In float64 and eval mode, the same weights at every call."""
        return self.in_dtype(torch.float64)

    def in_dtype(self, dtype: torch.dtype) -> Attention:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().to(dtype).eval()

    @property
    def block(self) -> int:
        return self.attention.block_length

    @property
    def lengths(self) -> list[int]:
        """Where blockwise code breaks: one token, a block and its neighbours, several blocks and an odd rest."""
        return sorted({n for n in (1, self.block - 1, self.block, self.block + 1, 3 * self.block + 7) if n > 0})

    @property
    def boundaries(self) -> list[int]:
        """Positions at both sides of every block boundary of the longest length, its first and its last but one."""
        longest = self.lengths[-1]
        edges = (edge + side for edge in range(0, longest + 1, self.block) for side in (-1, 0, 1))
        return sorted({t for t in (*edges, longest - 2) if 0 <= t <= longest - 2})

    def inputs(self, time: int, batch: int = 1, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, time, self.attention.hidden_dim, generator=generator, dtype=torch.float64).to(dtype)


# --- the checks ---------------------------------------------------------------------------------


def contract(subject: Subject) -> str | None:
    """Shapes and types; forward is output(attend(project(x)))."""
    for time in subject.lengths:
        x = subject.inputs(time, batch=2)
        output = subject.attention(x)
        if output.shape != x.shape or output.dtype != x.dtype:
            return f"forward returns {list(output.shape)} {output.dtype} for {list(x.shape)} {x.dtype}"
        composed = subject.attention.output(subject.attention.attend(*subject.attention.project(x)))
        if where := first_difference(output, composed):
            return f"forward is not output(attend(project(x))): {where} (n={time})"
    return None


def causality(subject: Subject) -> str | None:
    """Output t does not change with inputs after t, in value or in gradient."""
    time = subject.lengths[-1]
    x = subject.inputs(time).requires_grad_()
    output = subject.attention(x)
    weights = subject.inputs(time, seed=1)
    with torch.no_grad():
        for t in subject.boundaries:
            changed = torch.cat([x[:, : t + 1], subject.inputs(time, seed=2)[:, t + 1 :]], dim=1)
            if where := first_difference(subject.attention(changed)[:, : t + 1], output[:, : t + 1]):
                return f"changing the inputs after {t} changes {where} (n={time})"
    for t in subject.boundaries:
        (gradient,) = torch.autograd.grad((output[:, t] * weights[:, t]).sum(), x, retain_graph=True)
        future = gradient[0, t + 1 :].abs().amax(dim=1)
        if future.max() > ROUNDING * gradient.abs().max():
            return f"output {t} has a gradient of {future.max():.1e} at input {t + 1 + int(future.argmax())} (n={time})"
    return None


def padding(subject: Subject) -> str | None:
    """A padded sequence gives what it gives alone, wherever the padding is and whatever stands there."""
    for time in subject.lengths:
        x = subject.inputs(time)
        alone = subject.attention(x)
        pads = max(1, subject.block // 2 + 1)
        for name, left, right in (("left", pads, 0), ("right", 0, pads), ("left and right", 3, pads)):
            mask = torch.tensor([[0.0] * left + [1.0] * time + [0.0] * right], dtype=torch.float64)
            for scale in (1.0, 1e4):
                noise = scale * subject.inputs(left + right, seed=3)
                padded = torch.cat([noise[:, :left], x, noise[:, left:]], dim=1)
                real = subject.attention(padded, mask)[:, left : left + time]
                if where := first_difference(real, alone):
                    return f"{left + right} padded tokens on the {name} of {time} change {where}"
    return None


def streaming(subject: Subject) -> str | None:
    """`extend` over any split of a sequence gives what `forward` gives, and leaves the state it is given alone."""
    generator = torch.Generator().manual_seed(4)
    for time in subject.lengths:
        x = subject.inputs(time, batch=2)
        whole = subject.attention(x)
        for split in splits(time, subject.block, generator):
            pieces, state = [], None
            for piece in x.split(split, dim=1):
                output, state = subject.attention.extend(piece, state)
                pieces.append(output)
            if where := first_difference(torch.cat(pieces, dim=1), whole):
                shown = str(split) if len(split) <= 6 else f"[{', '.join(map(str, split[:4]))}, … {len(split)} pieces]"
                return f"extend over {shown} differs from forward in {where}"
    return state_is_a_value(subject)


def state_is_a_value(subject: Subject) -> str | None:
    """Two continuations of one prefix do not disturb each other, and a copied state serves as well."""
    prefix = subject.block + subject.block // 2 + 1
    x, y = subject.inputs(prefix, batch=2), subject.inputs(subject.block, batch=2, seed=5)
    _, state = subject.attention.extend(x)
    if not all(isinstance(value, Tensor) for value in state.values()):
        return f"the state must hold tensors only, it holds {({name: type(value).__name__ for name, value in state.items()})}"
    kept = {name: tensor.clone() for name, tensor in state.items()}
    first, _ = subject.attention.extend(y, state)
    changed = [name for name in kept if not torch.equal(kept[name], state[name])]
    if changed:
        return f"extend changes the state it is given: {', '.join(changed)}"
    whole = subject.attention(torch.cat([x, y], dim=1))[:, prefix:]
    for name, given in (("the same state used a second time", state), ("a copy of the state", kept)):
        again, _ = subject.attention.extend(y, given)
        for output in (first, again):
            if where := first_difference(output, whole):
                return f"a continuation of {prefix} tokens from {name} differs from forward in {where}"
    return None


def parity(subject: Subject) -> str | None:
    """`attend` and its gradients equal the reference's, in float64, float32 and bfloat16.

    A variant without a reference is held against its own float64.
    """
    truth = subject.attention.reference or subject.attention.attend
    for dtype, tolerance in TOLERANCE.items():
        attention = subject.in_dtype(dtype)
        for time in subject.lengths:
            with torch.no_grad():
                tensors = [tensor.to(dtype) for tensor in subject.attention.project(subject.inputs(time, batch=2))]
            fast, fast_gradients = value_and_gradients(attention.attend, tensors)
            slow, slow_gradients = value_and_gradients(truth, [tensor.double() for tensor in tensors])
            if error := relative_error(fast, slow, tolerance):
                return f"attend is off its reference by {error} in {dtype} (n={time}, allowed {tolerance:.0e})"
            # A gradient that is zero in truth (a query's, over one key) leaves rounding of the size of the others.
            floor = 0.1 * max(float(gradient.norm()) for gradient in slow_gradients)
            for index, (mine, theirs) in enumerate(zip(fast_gradients, slow_gradients, strict=True)):
                if error := relative_error(mine, theirs, tolerance, floor):
                    where = f"in {dtype} (n={time}, allowed {tolerance:.0e})"
                    return f"the gradient of attend's tensor {index} is off its reference by {error} {where}"
    return None


def batch(subject: Subject) -> str | None:
    """A sequence gives the same alone as in a batch."""
    for time in subject.lengths:
        x = subject.inputs(time, batch=3)
        together = subject.attention(x)
        for item in range(3):
            if where := first_difference(subject.attention(x[item : item + 1]), together[item : item + 1]):
                return f"item {item} of a batch of 3 differs from itself alone in {where} (n={time})"
    return None


def determinism(subject: Subject) -> str | None:
    """In eval mode the same input gives the same bits."""
    x = subject.inputs(subject.lengths[-1], batch=2)
    if not torch.equal(subject.attention(x), subject.attention(x)):
        return f"two calls on the same input differ in eval mode (n={x.shape[1]})"
    return None


def finite(subject: Subject) -> str | None:
    """Huge, tiny, zero and constant inputs, and rows without any token, give finite outputs and gradients."""
    for dtype in (torch.float32, torch.bfloat16):
        attention = subject.in_dtype(dtype)
        for time in subject.lengths:
            x = subject.inputs(time, batch=2, dtype=dtype)
            cases = {"of size 1e4": 1e4 * x, "of size 1e-4": 1e-4 * x, "all zero": 0 * x, "all one": torch.ones_like(x)}
            for name, case in cases.items():
                case.requires_grad_()
                output = attention(case)
                (gradient,) = torch.autograd.grad(output.sum(), case)
                if not output.isfinite().all():
                    return f"inputs {name} give {bad_values(output)} (n={time}, {dtype})"
                if not gradient.isfinite().all():
                    return f"inputs {name} give a gradient with {bad_values(gradient)} (n={time}, {dtype})"
            nothing = torch.stack([torch.zeros(time), torch.ones(time)])
            if not attention(x, nothing).isfinite().all():
                return f"a row that is all padding gives {bad_values(attention(x, nothing))} (n={time}, {dtype})"
    return None


def memory(subject: Subject) -> str | None:
    """Peak memory grows in proportion to length: four times the tokens, at most 1.3 × four times the bytes, so no hidden n×n."""
    attention = subject.in_dtype(torch.float32)
    short = max(1024, 4 * subject.block)
    peaks = []
    for time in (short, 4 * short):
        x = subject.inputs(time, dtype=torch.float32)
        peaks.append(peak_allocated_bytes(lambda x=x: attention(x)))  # type: ignore[misc]
    growth = peaks[1] / peaks[0]
    if growth > 1.3 * 4:
        return f"peak memory grows {growth:.1f}× from n={short} to n={4 * short} ({peaks[0]:,} to {peaks[1]:,} bytes), allowed 5.2×"
    return None


def flops(subject: Subject) -> str | None:
    """The declared FLOPs are no more than those counted, no less than a fifth, and grow with length as those counted do.

    Counted are the matrix products that ran, masked halves included; declared is causal work only.
    """
    attention = subject.in_dtype(torch.float32)
    ratios = []
    for time in (4 * subject.block + 3, 16 * subject.block + 3):
        with torch.no_grad():
            tensors = attention.project(subject.inputs(time, dtype=torch.float32))
            counted = count_flops(lambda tensors=tensors: attention.attend(*tensors))  # type: ignore[misc]
        declared = attention.flops(time)
        ratios.append(declared / max(counted, 1))
        if not 0.2 <= ratios[-1] <= 1.05:
            return f"flops({time}) declares {declared:,}, counted were {counted:,}"
        if attention.flops(time, batch_size=3) != 3 * declared:
            return f"flops({time}, batch_size=3) is not three times flops({time})"
    growth = ratios[1] / ratios[0]
    if not 0.75 <= growth <= 1 / 0.75:
        return f"from n={4 * subject.block + 3} to n={16 * subject.block + 3} the declared FLOPs grow {growth:.2f}× as fast as those counted"
    return None


def state_size(subject: Subject) -> str | None:
    """`state_bytes` is what the state holds, up to 64 bytes of counters."""
    for dtype in (torch.float32, torch.bfloat16):
        attention = subject.in_dtype(dtype)
        for time in subject.lengths:
            _, state = attention.extend(subject.inputs(time, batch=2, dtype=dtype))
            held = bytes_held(state)
            declared = attention.state_bytes(time, batch_size=2)
            if not declared <= held <= declared + 64:
                return f"state_bytes({time}, batch_size=2) declares {declared:,} bytes, the state holds {held:,} ({dtype})"
    return None


CHECKS: tuple[Check, ...] = (
    contract, causality, padding, streaming, parity, batch, determinism, finite, memory, flops, state_size,
)  # fmt: skip


def certify(build: Build) -> Iterator[Finding]:
    """Runs every check on what `build` makes, one finding after the other."""
    subject = Subject(build)
    for check in CHECKS:
        try:
            with torch.set_grad_enabled(check not in NO_GRAD):
                detail = check(subject) or ""
        except Exception as error:  # the subject is anybody's code: whatever it raises is a finding
            message = str(error).strip().splitlines()
            detail = f"raised {type(error).__name__}: {message[0] if message else 'without a message'}"
        yield Finding(check.__name__, detail)


NO_GRAD = frozenset({contract, padding, streaming, batch, determinism, memory, flops, state_size})


# --- comparing ----------------------------------------------------------------------------------


def first_difference(output: Tensor, truth: Tensor) -> str:
    """Where two [batch, time, hidden_dim] outputs first differ by more than rounding, in words; empty if nowhere."""
    if output.shape != truth.shape:
        return f"the shape: {list(output.shape)}, not {list(truth.shape)}"
    allowed = ROUNDING * max(1.0, float(truth.abs().max()))
    per_position = (output - truth).abs().amax(dim=(0, 2))
    wrong = (~(per_position <= allowed)).nonzero()  # so that NaN is wrong
    if not len(wrong):
        return ""
    position = int(wrong[0])
    return f"output {position} (by {per_position[position]:.1e})"


def relative_error(mine: Tensor, truth: Tensor, tolerance: float, floor: float = 0.0) -> str:
    """|mine − truth| / max(|truth|, floor), if over the tolerance."""
    size = max(float(truth.norm()), floor, 1e-30)
    error = float((mine.double() - truth.double()).norm()) / size
    return "" if error <= tolerance else f"{error:.1e}"


def value_and_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """function(*tensors), and the gradients of its weighted sum by each tensor."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    generator = torch.Generator().manual_seed(6)
    weights = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    gradients = torch.autograd.grad((value * weights).sum(), leaves, allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves)
    return value.detach(), [zero if gradient is None else gradient for gradient, zero in zip(gradients, zeros, strict=True)]


def splits(time: int, block: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Ways to cut a sequence: whole, token by token, at block boundaries and beside them, at random."""
    yield [time]
    yield [1] * time
    for step in {block, block + 1, max(1, block - 1)}:
        yield [step] * (time // step) + ([time % step] if time % step else [])
    cuts = sorted({int(cut) for cut in torch.randint(1, max(2, time), (5,), generator=generator)} - {time})
    edges = [0, *cuts, time]
    yield [stop - start for start, stop in zip(edges, edges[1:], strict=False)]


def bytes_held(state: State) -> int:
    """The memory that keeping the state costs: storages, so that a small view of a large tensor counts whole."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    return sum(storages.values())


def bad_values(tensor: Tensor) -> str:
    position = int((~tensor.isfinite()).any(dim=2).any(dim=0).nonzero()[0])
    return f"{'NaN' if tensor.isnan().any() else 'infinity'}, first at position {position}"
