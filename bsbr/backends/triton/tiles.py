"""Helpers of the Triton kernels: loads and stores of tiles, products that accumulate in float32, and the launch."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# triton.jit decides at decoration, that is at import, whether it interprets. `dot` must know, because the interpreter's tl.dot is
# wrong for bfloat16.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Full precision of float32 products, without the tensor cores: TF32 would be wrong in the fourth digit.
FLOAT32_PRECISION = tl.constexpr("ieee")

# Softmax is computed in base 2, which the hardware has: exp(x) = exp2(x · LOG2_E).
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b):
    """a @ b in float32; a and b have one dtype."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=FLOAT32_PRECISION)


@triton.jit
def load_rows(x, start, stop, stride, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x[start : start + ROWS, first : first + COLUMNS], with zeros from row `stop` and from column WIDTH on."""
    rows, columns = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    at = x + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    return tl.load(at, mask=(start + rows < stop)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(x, tile, start, stop, stride, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores the tile to x[start : stop, first : WIDTH], as far as the tile reaches."""
    rows, columns = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    at = x + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    tl.store(at, tile.to(x.dtype.element_ty), mask=(start + rows < stop)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def of_head(x, batch, head, stride_batch, stride_head):
    """Pointer to x[batch, head], computed in 64 bits: a large batch exceeds 2³¹ elements."""
    return x + tl.cast(batch, tl.int64) * stride_batch + tl.cast(head, tl.int64) * stride_head


@triton.jit
def inverse_norm(tile):
    """1 / sqrt(|x|² + 1e-6) of each row, as `bsbr.backends.pytorch.unit_norm` computes it."""
    wide = tile.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, axis=1) + 1e-6)


@triton.jit
def through_unit_norm(tile, inverse, gradient):
    """Gradient of x from the gradient g of φ = s x with s = 1/sqrt(|x|² + 1e-6): s (g − φ (φ·g)), in float32."""
    unit = tile.to(tl.float32) * inverse[:, None]
    return inverse[:, None] * (gradient - unit * tl.sum(unit * gradient, axis=1)[:, None])


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Launches `programs` programs on the first axis of the grid, the only one that may be long. compiled.py patches this."""
    kernel[(programs,)](*arguments, **options)


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous, whatever its other strides; else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def like(x: Tensor) -> Tensor:
    """Uninitialised, with the strides of x if its rows are contiguous, so that joining the heads of the result is no copy."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and row."""
    return x.stride(0), x.stride(1), x.stride(2)


def padded(size: int) -> int:
    """The smallest power of two that is at least `size` and at least 16, as tl.dot requires of its tiles."""
    return max(16, 1 << (size - 1).bit_length())


def wide(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised float32 on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
