"""Oracles of the softmax family: float64, from the definitions, each with an explicit mask or loop, no code shared with baselines.

q: [batch, heads, m, head_dim]; k, v: [batch, kv_heads, n, head_dim]; the rows of q are the last m of n positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def masked_attention(q: Tensor, k: Tensor, v: Tensor, is_visible: Callable[[int, int], bool]) -> Tensor:
    """Softmax attention where query position i attends to key position t iff is_visible(i, t)."""
    q, k, v = _float64_per_head(q, k, v)
    m, n = q.shape[2], k.shape[2]
    visible = torch.tensor([[is_visible(i, t) for t in range(n)] for i in range(n - m, n)])
    weights = torch.exp(_scores(q, k, q.shape[3] ** -0.5, visible)) * visible
    return (weights / weights.sum(dim=3, keepdim=True)) @ v


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked_attention(q, k, v, lambda i, t: t <= i)


def sliding_window(q: Tensor, k: Tensor, v: Tensor, window_size: int) -> Tensor:
    return masked_attention(q, k, v, lambda i, t: i - window_size + 1 <= t <= i)


def sparse(q: Tensor, k: Tensor, v: Tensor, block_size: int, summary_size: int) -> Tensor:
    def is_visible(i: int, t: int) -> bool:
        own_block = i // block_size * block_size
        last_of_its_block = t // block_size * block_size + block_size - 1
        return own_block <= t <= i or (t < own_block and last_of_its_block - t < summary_size)

    return masked_attention(q, k, v, is_visible)


def hopfield(q: Tensor, k: Tensor, v: Tensor, beta: float, num_steps: int) -> Tensor:
    q, k, v = _float64_per_head(q, k, v)
    m, n = q.shape[2], k.shape[2]
    visible = torch.ones(n, n).tril()[n - m :] > 0
    for step in range(1, num_steps + 1):
        weights = torch.exp(_scores(q, k, beta, visible)) * visible
        weights = weights / weights.sum(dim=3, keepdim=True)
        q = weights @ (v if step == num_steps else k)
    return q


def _scores(q: Tensor, k: Tensor, scale: float, visible: Tensor) -> Tensor:
    """Scores minus the row's largest visible score: the softmax stays the same, and exp cannot overflow."""
    scores = torch.where(visible, scale * (q @ k.mT), -1e300)
    return scores - scores.amax(dim=3, keepdim=True).detach()


def _float64_per_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query head h reads key head h // (heads / kv_heads)."""
    group = q.shape[1] // k.shape[1]
    heads = [h // group for h in range(q.shape[1])]
    return q.double(), k[:, heads].double(), v[:, heads].double()
