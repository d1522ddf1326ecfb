"""Cells of a notebook without a notebook: their source is known to Python as that of a cell is, and to no file."""

import itertools
import linecache
from typing import Any

COSINE = """
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from bsbr import MultiHeadAttention

SCALE = 1.0


def scaled(temperature: float) -> float:
    return SCALE * temperature


class Cosine(MultiHeadAttention):
    def __init__(self, hidden_dim: int, num_heads: int, temperature: float = 8.0):
        super().__init__(hidden_dim, num_heads)
        self.temperature = temperature

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        m, n = q.shape[2], k.shape[2]
        mask = causal_lower_right(m, n) if 1 < m < n else None
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=m == n, scale=scaled(self.temperature))

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return 4 * batch_size * self.num_heads * self.head_dim * seq_len * (seq_len + 1) // 2
"""
_numbers = itertools.count()


def executed(source: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Executes a cell; returns the names of the notebook, to which it adds its own."""
    names = {"__name__": "__main__"} if names is None else names
    file = f"<cell {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)
    return names
