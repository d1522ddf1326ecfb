"""Times forward and backward with each candidate tile of each kernel on the GPU of this machine.

    python -m bsbr.backends.triton.tune

Prints lines for the table of `bsbr.backends.triton.tuning`, with the milliseconds of forward and backward under the best
candidate. One kernel changes at a time, the others keep their best tile so far. A candidate that does not fit the GPU is
reported and skipped.
"""

import itertools
from typing import Any
from unittest import mock

import torch
import triton

from bsbr.backends.triton import attend, tuning
from bsbr.inputs import BSBRInputs, BSBROptions

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
            top_k = 8 if step == "gather" else None  # the one kernel that runs only with a top_k
            milliseconds = {tile: _milliseconds(tensors, upstream, {**best, step: tile}, top_k) for tile in _candidates(step)}
            best[step] = min(milliseconds, key=lambda tile: milliseconds[tile])
            print(f'    ("{step}", 2, 512, {head_dim}): {best[step]},  # {milliseconds[best[step]]:.3f}', flush=True)


def _candidates(step: str) -> list[tuning.Tile]:
    if step == "gather":
        return [tuning.Tile(1, 1, depth, warps, 2) for depth, warps in itertools.product((512, 1024, 2048), (2, 4, 8))]
    sizes = itertools.product((32, 64, 128), (32, 64), (32, 64, 128), (4, 8), (2, 3))
    return [tuning.Tile(*size) for size in sizes]


def _milliseconds(tensors: list[torch.Tensor], upstream: torch.Tensor, tiles: dict[str, tuning.Tile], top_k: int | None) -> float:
    def forward_and_backward() -> None:
        torch.autograd.grad(attend(BSBRInputs(*tensors), BSBROptions(CHUNK, top_k=top_k)), tensors, upstream)

    def fixed_tile(step: str, like: torch.Tensor, *, head_dim: int, chunk_size: int) -> tuning.Tile:
        return tiles[step]

    with mock.patch.object(tuning, "tile", fixed_tile):
        try:
            return float(triton.testing.do_bench(forward_and_backward, return_mode="median"))
        except triton.runtime.errors.OutOfResources as error:
            print(f"# skipped: {error}")
            return float("inf")


if __name__ == "__main__":
    main()
