"""The attention under test, the inputs and lengths that all checks use, and the comparison of two outputs.

Lengths are those at which blockwise code breaks: one token, a block and one token to either side, three blocks and an odd rest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bsbr.interface import Attention

Build = Callable[[], Attention]
M = TypeVar("M", bound=nn.Module)

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference between two orders of the same sums in each dtype, relative to the largest output."""


class Configuration(NamedTuple):
    """What a check called the attention with."""

    time: int
    batch: int
    dtype: torch.dtype
    condition: str = ""  # other than the usual: eval mode, one thread, no gradients


@dataclass(frozen=True)
class Subject:
    """The attention under test. Checks know nothing of it but the contract in `bsbr.interface`."""

    build: Build
    device: str = "cpu"
    runs_in: torch.dtype = torch.float64
    """The most precise dtype that its kernels take: float64, unless they run only on a GPU."""
    timed_in: torch.dtype | None = None
    """The dtype of a sweep. float16 is checked only if a sweep uses it."""
    configurations: set[Configuration] = field(default_factory=set)
    """All that the checks have used so far."""

    @cached_property
    def finest(self) -> torch.dtype:
        """The most precise dtype in which it is held to that dtype's rounding: rounding in others hides small errors."""
        with torch.device("meta"):
            return coarser(self.runs_in, self.build().computes_in)

    @cached_property
    def attention(self) -> Attention:
        """The attention in the finest dtype."""
        return self.in_dtype(self.finest)

    def dtypes(self, *wanted: torch.dtype) -> list[torch.dtype]:
        """The wanted dtypes that are no more precise than the finest; the finest if all are more precise."""
        finest = torch.finfo(self.finest).eps
        return [dtype for dtype in wanted if torch.finfo(dtype).eps >= finest] or [self.finest]

    def in_dtype(self, dtype: torch.dtype) -> Attention:
        """The attention in eval mode, without zero parameters, with the same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            attention = randomize_zero_parameters(self.build())
        return attention.to(self.device, dtype).eval()

    @property
    def block(self) -> int:
        return self.attention.block_length

    @property
    def lengths(self) -> list[int]:
        """Sequence lengths to test, ascending."""
        return sorted({n for n in (1, self.block - 1, self.block, self.block + 1, 3 * self.block + 7) if n > 0})

    @property
    def boundaries(self) -> list[int]:
        """Positions around every block boundary of the longest length, its first and its last but one."""
        last = self.lengths[-1] - 2
        edges = (edge + side for edge in range(0, last + 2, self.block) for side in (-1, 0, 1))
        return sorted({t for t in (*edges, last) if 0 <= t <= last})

    def inputs(self, time: int, batch: int = 1, *, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal random hidden states [batch, time, hidden_dim], in the finest dtype unless another is given."""
        dtype = self.finest if dtype is None else dtype
        self.configurations.add(Configuration(time, batch, dtype))
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(batch, time, self.attention.hidden_dim, generator=generator, dtype=torch.float64)
        return drawn.to(self.device, dtype)


@torch.no_grad()
def randomize_zero_parameters(module: M) -> M:
    """Draws every parameter that is all 0, in place: such a parameter hides errors in its factors."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_()
    return module


@contextmanager
def no_dropout(module: nn.Module) -> Iterator[None]:
    """Sets every dropout probability to 0 meanwhile: in training mode the module then draws no random numbers."""
    before = list(dropouts(module))
    for part, name, _ in before:
        setattr(part, name, 0.0)
    try:
        yield
    finally:
        for part, name, probability in before:
            setattr(part, name, probability)


def dropouts(module: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Every dropout probability in a module: its part, the name of the attribute and its value."""
    for part in module.modules():
        for name in ("p", "dropout"):
            value = vars(part).get(name)
            if isinstance(value, float) and (name == "dropout" or isinstance(part, nn.modules.dropout._DropoutNd)):
                yield part, name, value


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Limits torch to so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def coarser(dtype: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    """The less precise of two dtypes; the first if there is no other."""
    return dtype if other is None else max(dtype, other, key=lambda one: torch.finfo(one).eps)


def first_difference(output: Tensor, truth: Tensor, *, allowed: float | None = None, start: int = 0) -> str:
    """Names the first position at which two [batch, time, hidden_dim] outputs differ by more than rounding; empty if none.

    Args:
        output, truth: what is compared.
        allowed: largest difference, relative to the largest number in `truth`; by default the `ROUNDING` of its dtype.
        start: position of the first output.
    """
    if output.shape != truth.shape:
        return f"the shape: {list(output.shape)}, not {list(truth.shape)}"
    per_position = (output - truth).abs().amax(dim=(0, 2))
    allowed = ROUNDING[truth.dtype] if allowed is None else allowed
    wrong = (~(per_position <= allowed * truth.abs().max())).nonzero()  # negated, so that NaN is wrong
    return f"output {start + int(wrong[0])} (by {float(per_position[wrong[0]]):.1e})" if len(wrong) else ""
