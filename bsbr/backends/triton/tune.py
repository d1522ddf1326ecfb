"""python -m bsbr.backends.triton.tune: forward and backward with each candidate tile of each step, on the GPU that is here.

Prints lines for the table of `bsbr.backends.triton.tuning`, with the milliseconds of the whole under the best candidate. One step
changes at a time, the others stay at the best so far; a candidate that does not fit the GPU says so and is passed over.
"""

import itertools
from typing import Any
from unittest import mock

import torch
import triton

from bsbr.backends.triton import bsbr_attention, tuning

HEADS, CHUNK, TIME = 16, 128, 65536


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA GPU: torch.cuda.is_available() is False")
    print(f"# {torch.cuda.get_device_name()}, {HEADS} heads, chunk {CHUNK}, n = {TIME}, bfloat16; ms of forward and backward")
    for head_dim in (64, 128, 256):
        new: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        chunks = TIME // CHUNK
        tensors = [torch.randn(1, HEADS, rows, head_dim, **new).requires_grad_() for rows in (TIME, TIME, TIME, chunks, chunks - 1)]
        upstream = torch.randn_like(tensors[0])
        best = {step: tuning.tile(step, tensors[0], head_dim=head_dim, chunk_size=CHUNK) for step in tuning.STEPS}
        for step in tuning.STEPS:
            top_k = 8 if step == "gather" else None  # the one step that only a top_k has
            taken = {tile: _milliseconds(tensors, upstream, {**best, step: tile}, top_k) for tile in _candidates(step)}
            best[step] = min(taken, key=lambda tile: taken[tile])
            print(f'    ("{step}", 2, 512, {head_dim}): {best[step]},  # {taken[best[step]]:.3f}', flush=True)


def _candidates(step: str) -> list[tuning.Tile]:
    if step == "gather":
        return [tuning.Tile(1, 1, depth, warps, 2) for depth, warps in itertools.product((512, 1024, 2048), (2, 4, 8))]
    sizes = itertools.product((32, 64, 128), (32, 64), (32, 64, 128), (4, 8), (2, 3))
    return [tuning.Tile(*size) for size in sizes]


def _milliseconds(tensors: list[torch.Tensor], upstream: torch.Tensor, tiles: dict[str, tuning.Tile], top_k: int | None) -> float:
    def both() -> None:
        torch.autograd.grad(bsbr_attention(*tensors, chunk_size=CHUNK, top_k=top_k), tensors, upstream)

    def chosen(step: str, like: torch.Tensor, *, head_dim: int, chunk_size: int) -> tuning.Tile:
        return tiles[step]

    with mock.patch.object(tuning, "tile", chosen):
        try:
            return float(triton.testing.do_bench(both, return_mode="median"))
        except triton.runtime.errors.OutOfResources as error:
            print(f"# passed over: {error}")
            return float("inf")


if __name__ == "__main__":
    main()
