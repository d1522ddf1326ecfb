"""Table of tile sizes, warps and pipeline stages of each kernel. @triton.autotune would time kernels in a user's first call.

THE TABLE IS A PREDICTION. No GPU has run it: its entries were chosen so that they compile for sm_90 without spilling
registers in bfloat16 (`python -m bsbr.backends.triton.compiled`) and fit shared memory.
`python -m bsbr.backends.triton.tune` measures candidates on a GPU and prints the table to put here.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Tile of one kernel: rows of its output, columns of its inner loop, depth of its slice of a state."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


STEPS = ("states", "mix", "mix_states", "mix_scores", "gather", "output", "queries", "keys")

Key = tuple[str, int, int, int]
"""Kernel, bytes of an element, largest chunk_size, largest head_dim. A chunk shorter than a tile cuts the tile, so that one class
of chunk sizes is enough until measurements tell two apart."""

HOPPER: dict[Key, Tile] = {
    ("states", 2, 512, 64): Tile(64, 64, 64, 4, 3),
    ("states", 2, 512, 128): Tile(64, 64, 64, 4, 3),
    ("states", 2, 512, 256): Tile(64, 64, 64, 8, 2),
    ("mix", 2, 512, 64): Tile(64, 64, 128, 4, 3),
    ("mix", 2, 512, 128): Tile(64, 64, 128, 4, 3),
    ("mix", 2, 512, 256): Tile(64, 64, 128, 8, 2),
    ("mix_states", 2, 512, 64): Tile(64, 64, 128, 8, 3),
    ("mix_states", 2, 512, 128): Tile(64, 64, 128, 8, 3),
    ("mix_states", 2, 512, 256): Tile(64, 32, 128, 8, 2),
    ("mix_scores", 2, 512, 64): Tile(64, 64, 128, 4, 3),
    ("mix_scores", 2, 512, 128): Tile(64, 64, 128, 4, 3),
    ("mix_scores", 2, 512, 256): Tile(64, 64, 64, 8, 2),
    ("gather", 2, 512, 256): Tile(1, 1, 1024, 4, 2),
    ("output", 2, 512, 64): Tile(128, 64, 64, 8, 3),
    ("output", 2, 512, 128): Tile(128, 64, 64, 8, 2),
    ("output", 2, 512, 256): Tile(64, 32, 32, 8, 2),
    ("queries", 2, 512, 64): Tile(64, 64, 64, 4, 2),
    ("queries", 2, 512, 128): Tile(64, 64, 64, 8, 2),
    ("queries", 2, 512, 256): Tile(32, 32, 32, 8, 2),
    ("keys", 2, 512, 64): Tile(64, 64, 64, 4, 2),
    ("keys", 2, 512, 128): Tile(64, 32, 32, 8, 2),
    ("keys", 2, 512, 256): Tile(32, 16, 32, 8, 2),
}

DEFAULT = Tile(32, 32, 32, 4, 2)
"""For GPUs without Hopper's 227 KiB of shared memory, and for float32, whose products run outside the tensor cores."""


def tile(step: str, like: Tensor, *, head_dim: int, chunk_size: int) -> Tile:
    """The table's entry for the smallest class that includes these sizes, else DEFAULT; rows are cut to those of a chunk."""
    entry = None
    if _is_hopper(like.device):
        fitting = [key for key in HOPPER if key[:2] == (step, like.element_size()) and key[2] >= chunk_size and key[3] >= head_dim]
        entry = HOPPER[min(fitting)] if fitting else None
    if entry is None:
        entry = replace(DEFAULT, depth=1024) if step == "gather" else DEFAULT
    if step in ("states", "output", "queries", "keys"):
        longest = max(16, 1 << (chunk_size - 1).bit_length())
        entry = replace(entry, rows=min(entry.rows, longest))
    return entry


def used(like: Tensor) -> str:
    """Origin of the tile sizes for such tensors, as results record it."""
    if _is_hopper(like.device) and like.element_size() == 2:
        return "hopper tiles (predicted, never measured)"
    name = torch.cuda.get_device_name(like.device) if like.device.type == "cuda" else like.device.type
    return f"default tiles (untuned for {str(like.dtype).removeprefix('torch.')} on {name})"


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
