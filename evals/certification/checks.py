"""What the certificate checks. A check takes a `Subject` and returns what broke where, in words, or None.

The checks know nothing of a variant but the contract in `bsbr.interface`. They look where blockwise code
breaks: at one token, at a block and one token to either side, and at three blocks and an odd rest.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from bsbr.interface import Attention, State
from evals.errors import one_sentence
from evals.measure import cuda
from evals.measure.flops import count_flops
from evals.measure.memory import peak_allocated_bytes

Build = Callable[[], Attention]
M = TypeVar("M", bound=nn.Module)

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""What two orders of the same sums may differ by in each type, relative to the largest output."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest |fast − reference| / |reference| (norms), of outputs and of gradients."""


@dataclass(frozen=True)
class Subject:
    """The attention under test, and the inputs that every check draws from.

    `finest` is what its kernels compute in at best: rounding hides small errors in anything but float64, and so only what
    runs nowhere but on a GPU, in the types that GPUs are for, is looked at in another.
    """

    build: Build
    device: str = "cpu"
    finest: torch.dtype = torch.float64

    @cached_property
    def attention(self) -> Attention:
        return self.in_dtype(self.finest)

    def dtypes(self, *asked: torch.dtype) -> list[torch.dtype]:
        """Those of `asked` that are no finer than the finest; the finest where all are."""
        finest = torch.finfo(self.finest).eps
        return [dtype for dtype in asked if torch.finfo(dtype).eps >= finest] or [self.finest]

    def in_dtype(self, dtype: torch.dtype) -> Attention:
        """In eval mode, `awake`, with the same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            attention = awake(self.build())
        return attention.to(self.device, dtype).eval()

    @property
    def block(self) -> int:
        return self.attention.block_length

    @property
    def lengths(self) -> list[int]:
        return sorted({n for n in (1, self.block - 1, self.block, self.block + 1, 3 * self.block + 7) if n > 0})

    @property
    def boundaries(self) -> list[int]:
        """Positions at both sides of every block boundary of the longest length, its first and its last but one."""
        last = self.lengths[-1] - 2
        edges = (edge + side for edge in range(0, last + 2, self.block) for side in (-1, 0, 1))
        return sorted({t for t in (*edges, last) if 0 <= t <= last})

    def inputs(self, time: int, batch: int = 1, *, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(batch, time, self.attention.hidden_dim, generator=generator, dtype=torch.float64)
        return drawn.to(self.device, self.finest if dtype is None else dtype)


@torch.no_grad()
def awake(module: M) -> M:
    """With parameters drawn that begin at 0: they hide what they multiply."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_()
    return module


# --- what comes out -----------------------------------------------------------------------------


def determinism(subject: Subject) -> str | None:
    """In eval mode the same input gives the same bits."""
    x = subject.inputs(subject.lengths[-1], batch=2)
    if not torch.equal(subject.attention(x), subject.attention(x)):
        return f"two calls on the same input differ in eval mode (n={x.shape[1]})"
    return None


def contract(subject: Subject) -> str | None:
    """Shapes and types; forward is output(attend(project(x)))."""
    for time in subject.lengths:
        x = subject.inputs(time, batch=2)
        output = subject.attention(x)
        if output.shape != x.shape or output.dtype != x.dtype:
            return f"forward returns {list(output.shape)} {output.dtype} for {list(x.shape)} {x.dtype}"
        composed = subject.attention.output(subject.attention.attend(*subject.attention.project(x)))
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
        if not future.max() <= ROUNDING[x.dtype] * gradient.abs().max():  # so that NaN is wrong
            return f"output {t} has a gradient of {future.max():.1e} at input {t + 1 + int(future.argmax())} (n={time})"
    return None


def padding(subject: Subject) -> str | None:
    """A padded sequence gives what it gives alone, wherever the padding is and whatever stands there; at padding stands 0."""
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
    for dtype in subject.dtypes(torch.float32, torch.bfloat16):
        attention = subject.in_dtype(dtype)
        # bfloat16 has the range of float32, so that what overflows at a length does so in both: its ends are enough, and
        # without instructions for it a backward pass is 60 times as slow.
        for time in subject.lengths if dtype == torch.float32 else sorted({1, subject.lengths[-1]}):
            x = subject.inputs(time, batch=2, dtype=dtype)
            one_empty = torch.stack([torch.zeros(time), torch.ones(time)]).to(x.device)
            # 1e3 makes scores of a million; ten times that, and float32 holds a score no better than to a few units,
            # so that a softmax's backward pass, which computes weights again, means nothing.
            cases: list[tuple[str, Tensor, Tensor | None]] = [
                ("inputs of size 1e3", 1e3 * x[:1], None),
                ("inputs of size 1e-3", 1e-3 * x[:1], None),
                ("inputs that are all 0", 0 * x[:1], None),
                ("inputs that are all 1", torch.ones_like(x[:1]), None),
                ("a row that is all padding", x, one_empty),
            ]
            for name, case, mask in cases:
                leaf = case.clone().requires_grad_()
                output = attention(leaf, mask)
                leaves: dict[str, Tensor] = {"the inputs": leaf}
                if mask is not None:  # what hides a NaN from the inputs does not hide it from the parameters
                    leaves |= dict(attention.named_parameters())
                gradients = torch.autograd.grad(output.sum(), list(leaves.values()), allow_unused=True)
                found = {"an output": output} | {
                    f"a gradient by {of}": g for of, g in zip(leaves, gradients, strict=True) if g is not None
                }
                for what, tensor in found.items():
                    if not tensor.isfinite().all():
                        value = "NaN" if tensor.isnan().any() else "infinity"
                        return f"{name}: {what} with {value}{first_position(tensor)} (n={time}, {dtype})"
    return None


def first_position(values: Tensor) -> str:
    """Where the first value that is not finite stands, if `values` are [batch, time, hidden_dim]."""
    if values.dim() != 3:
        return ""
    return f", first at position {int((~values.isfinite()).any(dim=2).any(dim=0).nonzero()[0])}"


# --- streaming ----------------------------------------------------------------------------------


def streaming(subject: Subject) -> str | None:
    """`extend` over any split of a sequence gives what `forward` gives, and leaves the state it is given alone."""
    generator = torch.Generator().manual_seed(4)
    for time in subject.lengths:
        x = subject.inputs(time, batch=2)
        whole = subject.attention(x)
        for split in splits(time, subject.block, generator):
            pieces, state, position = [], None, 0
            for piece in x.split(split, dim=1):
                kept = copied(state)
                output, new_state = subject.attention.extend(piece, state)
                if spoilt := [name for name in kept if state is not None and not torch.equal(kept[name], state[name])]:
                    return f"extend by {piece.shape[1]} tokens after {position} changes the state it is given: {', '.join(spoilt)}"
                pieces.append(output)
                state, position = new_state, position + piece.shape[1]
            if where := first_difference(torch.cat(pieces, dim=1), whole):
                shown = str(split) if len(split) <= 6 else f"[{', '.join(map(str, split[:4]))}, … {len(split)} pieces]"
                return f"extend over {shown} tokens differs from forward in {where} (n={time})"
    return continuation(subject)


def continuation(subject: Subject) -> str | None:
    """A state serves two continuations, also when others ran in between, and comes back from disk as it was."""
    prefix = subject.block + subject.block // 2 + 1
    x, y = subject.inputs(prefix, batch=2), subject.inputs(subject.block, batch=2, seed=5)
    whole = subject.attention(torch.cat([x, y], dim=1))[:, prefix:]
    _, state = subject.attention.extend(x)
    try:
        loaded = safetensors.torch.load(safetensors.torch.save(state))
        loaded = {name: tensor.to(state[name].device) for name, tensor in loaded.items()}
    except (ValueError, RuntimeError) as error:
        return f"safetensors cannot save the state after {prefix} tokens: {one_sentence(error).partition('. ')[0]}"
    for name, given in (("the state", state), ("the state used a second time", state), ("the state saved and loaded", loaded)):
        output, _ = subject.attention.extend(y, given)
        if where := first_difference(output, whole):
            return f"{subject.block} tokens after {name} of {prefix} tokens differ from forward in {where}"
    return None


def splits(time: int, block: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Ways to cut a sequence: not, token by token, at block boundaries and beside them, at random."""
    yield [time]
    yield [1] * time
    for step in sorted({max(1, block - 1), block, block + 1}):
        yield [step] * (time // step) + [time % step] * (time % step > 0)
    cuts = {int(cut) for cut in torch.randint(1, max(2, time), (5,), generator=generator)} - {time}
    yield [stop - start for start, stop in pairwise([0, *sorted(cuts), time])]


def copied(state: State | None) -> State:
    return {} if state is None else {name: tensor.clone() for name, tensor in state.items()}


# --- the same as its definition -----------------------------------------------------------------


def parity(subject: Subject) -> str | None:
    """`attend` and its gradients equal the reference's, in float64, float32 and bfloat16.

    A variant without a reference is held against itself in float64, where its gradient must be its slope:
    that finds lost precision and lost gradients, but not a function other than the one that was meant.
    """
    attend, reference = subject.attention.attend, subject.attention.reference
    taken = subject.dtypes(*TOLERANCE)
    for time in subject.lengths if taken else []:
        with torch.no_grad():
            projected = subject.attention.project(subject.inputs(time, batch=2))
        # Inputs that the coarsest type holds exactly spare the slow reference a run for each type.
        inputs = [tensor.to(torch.bfloat16).double() for tensor in projected]
        if reference is None and not (error := slope_error(attend, inputs)) <= SLOPE_TOLERANCE:
            return f"the gradient of attend is off its slope by {error:.1e} (n={time}, allowed {SLOPE_TOLERANCE:.0e})"
        truth, true_gradients = value_and_gradients(reference or attend, inputs)
        # A gradient that is zero in truth (a query's, over one key) leaves rounding of the size of the others.
        floor = 0.1 * max(float(gradient.norm()) for gradient in true_gradients)
        for dtype in taken:
            value, gradients = value_and_gradients(subject.in_dtype(dtype).attend, [tensor.to(dtype) for tensor in inputs])
            errors = {"attend": relative_error(value, truth)} | {
                f"the gradient of attend by its tensor {index}": relative_error(mine, theirs, floor)
                for index, (mine, theirs) in enumerate(zip(gradients, true_gradients, strict=True))
            }
            for what, error in errors.items():
                if not error <= TOLERANCE[dtype]:
                    against = "its reference" if reference else "itself in float64"
                    return f"{what} is off {against} by {error:.1e} in {dtype} (n={time}, allowed {TOLERANCE[dtype]:.0e})"
    return None


def value_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """function(*inputs), and the gradients of its weighted sum by each of them."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    gradients = torch.autograd.grad((value * noise(value, 6)).sum(), leaves, allow_unused=True)
    return value.detach(), [
        torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


def slope_error(function: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """|slope along a random direction − what the gradients say of it| / |gradients|, of the same weighted sum."""
    _, gradients = value_and_gradients(function, inputs)
    directions = [noise(tensor, 7) for tensor in inputs]
    ahead, behind = (
        function(*(tensor + step * direction for tensor, direction in zip(inputs, directions, strict=True))).detach()
        for step in (STEP, -STEP)
    )
    slope = float(((ahead - behind) * noise(ahead, 6)).sum()) / (2 * STEP)
    told = sum(float((gradient * direction).sum()) for gradient, direction in zip(gradients, directions, strict=True))
    size = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    return abs(slope - told) / max(size, 1e-30)


STEP, SLOPE_TOLERANCE = 1e-7, 1e-4
"""Small enough to step over few kinks, such as a ReLU's; the rounding of float64 divided by it stays below the tolerance."""


def relative_error(mine: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """|mine − truth| / max(|truth|, floor); infinite if the shapes differ."""
    if mine.shape != truth.shape:
        return float("inf")
    return float((mine.double() - truth.double()).norm()) / max(float(truth.norm()), floor, 1e-30)


def noise(like: Tensor, seed: int) -> Tensor:
    """Random numbers that every floating type holds exactly, in the shape and type of `like`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(torch.bfloat16).to(like)


def first_difference(output: Tensor, truth: Tensor) -> str:
    """Where two [batch, time, hidden_dim] outputs first differ by more than rounding, in words; empty if nowhere."""
    if output.shape != truth.shape:
        return f"the shape: {list(output.shape)}, not {list(truth.shape)}"
    per_position = (output - truth).abs().amax(dim=(0, 2))
    wrong = (~(per_position <= ROUNDING[truth.dtype] * truth.abs().max())).nonzero()  # so that NaN is wrong
    return f"output {int(wrong[0])} (by {float(per_position[wrong[0]]):.1e})" if len(wrong) else ""


# --- the truth about cost -----------------------------------------------------------------------


def memory(subject: Subject) -> str | None:
    """Over four times the tokens the peak, of a forward pass and with the backward pass, grows as n^1.1 at most: no n×n tensor."""
    (dtype,) = subject.dtypes(torch.float32)
    attention, peak_of = subject.in_dtype(dtype), peak_allocated_bytes if subject.device == "cpu" else peak_of_device
    lengths = max(1024, 4 * subject.block) * torch.tensor([1, 4])
    for name, work in (("a forward pass", forward), ("a forward and backward pass", forward_backward)):
        peaks = []
        for time in lengths.tolist():
            x = subject.inputs(time, dtype=dtype)
            peaks.append(peak_of(partial(work, attention, x)))
        growth, allowed = peaks[1] / peaks[0], 4**1.1
        if not growth <= allowed:
            sizes = f"from {peaks[0]:,} bytes at n={lengths[0]} to {peaks[1]:,} at n={lengths[1]}"
            return f"the peak memory of {name} grows {growth:.1f}× {sizes}, allowed {allowed:.1f}×"
    return None


def peak_of_device(work: Callable[[], None]) -> int:
    return cuda.peak_memory(work).allocated_bytes


def forward(attention: Attention, x: Tensor) -> None:
    with torch.no_grad():
        attention(x)


def forward_backward(attention: Attention, x: Tensor) -> None:
    x.requires_grad_()
    torch.autograd.grad(attention(x).sum(), x)


def flops(subject: Subject) -> str | None:
    """The declared FLOPs are no more than those counted, no less than a fifth, and grow with length as those counted do.

    Counted are the matrix products that ran, masked halves included; declared is causal work only. What somebody's own kernel
    multiplies on a GPU torch does not see: where it counts nothing there, nothing is said.
    """
    (dtype,) = subject.dtypes(torch.float32)
    attention = subject.in_dtype(dtype)
    lengths = (4 * subject.block + 3, 16 * subject.block + 3)
    ratios = []
    for time in lengths:
        tensors = attention.project(subject.inputs(time, dtype=dtype))
        counted, declared = count_flops(partial(attention.attend, *tensors)), attention.flops(time)
        unseen = counted == 0 and subject.device != "cpu"
        ratio = 1.0 if declared == counted == 0 or unseen else declared / max(counted, 1)
        if not 0.2 <= ratio <= 1.05:
            return f"flops({time}) declares {declared:,}, in matrix products that ran were counted {counted:,}"
        if attention.flops(time, batch_size=3) != 3 * declared:
            return f"flops({time}, batch_size=3) is {attention.flops(time, batch_size=3):,}, not three times {declared:,}"
        ratios.append(ratio)
    growth = ratios[1] / ratios[0]
    if not 0.75 <= growth <= 1 / 0.75:
        return f"from n={lengths[0]} to n={lengths[1]} the declared FLOPs grow {growth:.2f} times as much as those counted"
    return None


def state_size(subject: Subject) -> str | None:
    """`state_bytes` is what the state holds, up to 64 bytes of counters; a view holds all that it is a view of."""
    for dtype in subject.dtypes(torch.float32, torch.bfloat16):
        attention = subject.in_dtype(dtype)
        for time in subject.lengths:
            _, state = attention.extend(subject.inputs(time, batch=2, dtype=dtype))
            held = sum({storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, state.values())}.values())
            declared = attention.state_bytes(time, batch_size=2)
            if not declared <= held <= declared + 64:
                return f"state_bytes({time}, batch_size=2) declares {declared:,} bytes, the state holds {held:,} ({dtype})"
    return None


CHECKS: tuple[Callable[[Subject], str | None], ...] = (
    determinism, contract, causality, padding, streaming, parity, batch, finite, memory, flops, state_size,
)  # fmt: skip
"""Causes before their consequences: what draws random numbers is no function, and fails most of the others too."""

NEEDS_GRAD = frozenset({causality, parity, finite, memory})
