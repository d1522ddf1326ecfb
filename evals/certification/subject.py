"""TODO: what lives here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from bsbr.interface import Attention

Build = Callable[[], Attention]
M = TypeVar("M", bound=nn.Module)

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""What two orders of the same sums may differ by in each type, relative to the largest output."""


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
            attention = randomize_zero_parameters(self.build())
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
def randomize_zero_parameters(module: M) -> M:
    """With parameters drawn that begin at 0: they hide what they multiply."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_()
    return module


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
