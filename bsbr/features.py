"""φ of BSBR: what a token's key is stored under in its chunk's state, and what its query asks that state for.

Which φ recalls how much for how many bytes was measured: README, "What it can remember".
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bsbr.backends.cpp import operators
from bsbr.backends.dispatch import Impl
from bsbr.backends.pytorch import unit_norm
from bsbr.interface import split_heads

FeatureMap = Literal["quadratic", "linear"]


class LinearFeatures(nn.Module):
    """φ(x) = unit_norm(P x) of the heads' own queries and keys, P shared by both, and absent where d_r = head_dim."""

    def __init__(self, head_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.projection = nn.Identity() if feature_dim == head_dim else nn.Linear(head_dim, feature_dim, bias=False)

    def forward(self, hidden_states: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ(q) and φ(k) [batch, heads or kv_heads, time, d_r], of heads that were not rotated."""
        return unit_norm(self.projection(q)), unit_norm(self.projection(k))


class QuadraticFeatures(nn.Module):
    """φ(q) = `quadratic` of W_q x, φ(k) of W_k x, x the hidden state: φ(q)·φ(k) ≈ (q̂·k̂)².

    The square keeps apart what a state holds: of unit vectors that have nothing to do with each other it is much smaller
    than the product, so many more keys fit. W_q and W_k are projections of their own, to the p numbers a head whose p (p + 1) / 2
    products make up d_r: about √(2 d_r), so they cost little. Second-order features are those of Based (Arora 2024,
    arXiv:2402.18668, section 4.1) without the terms of order 0 and 1.
    """

    def __init__(self, hidden_dim: int, num_heads: int, num_kv_heads: int, feature_dim: int, impl: Impl) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.feature_dim, self.impl = num_heads, num_kv_heads, feature_dim, impl
        size = num_factors(feature_dim)
        self.q_proj = nn.Linear(hidden_dim, num_heads * size, bias=False)
        self.k_proj = nn.Linear(hidden_dim, num_kv_heads * size, bias=False)

    def forward(self, hidden_states: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ(q) and φ(k) [batch, heads or kv_heads, time, d_r]; of the hidden states alone."""
        of_q = split_heads(self.q_proj(hidden_states), self.num_heads)
        of_k = split_heads(self.k_proj(hidden_states), self.num_kv_heads)
        if self.impl in ("auto", "cpp") and operators.unsupported(of_q, of_k) is None:
            return operators.quadratic(of_q, self.feature_dim), operators.quadratic(of_k, self.feature_dim)
        return quadratic_features(of_q, self.feature_dim), quadratic_features(of_k, self.feature_dim)


def build_feature_map(
    kind: FeatureMap, hidden_dim: int, num_heads: int, num_kv_heads: int, feature_dim: int, impl: Impl
) -> LinearFeatures | QuadraticFeatures:
    """Raises ValueError if there is no such map."""
    if kind not in get_args(FeatureMap):
        raise ValueError(f"feature_map must be one of {', '.join(get_args(FeatureMap))}, got {kind!r}")
    if kind == "linear":
        return LinearFeatures(hidden_dim // num_heads, feature_dim)
    return QuadraticFeatures(hidden_dim, num_heads, num_kv_heads, feature_dim, impl)


def quadratic_features(x: Tensor, size: int) -> Tensor:
    """`products` of `unit_norm` of x [batch, heads, time, p]: [batch, heads, time, size]."""
    return pairwise_products(unit_norm(x), size)


def num_factors(feature_dim: int) -> int:
    """The least p whose p (p + 1) / 2 products of two are at least `feature_dim`."""
    size = 1
    while size * (size + 1) // 2 < feature_dim:
        size += 1
    return size


def pairwise_products(x: Tensor, size: int) -> Tensor:
    """x_i², then √2 x_i x_j of neighbours, of the next but one, … (around the end): the first `size` of them, [..., size].

    All p (p + 1) / 2 of them give products(x)·products(y) = (x·y)².
    """
    steps = -(-size // x.shape[-1])
    around = torch.cat([x, x[..., : steps - 1]], dim=-1).unfold(-1, x.shape[-1], 1)  # row j: x from its j-th number on
    weights = torch.full((steps, 1), 2**0.5, dtype=x.dtype, device=x.device)
    weights[0] = 1
    return (around * (weights * x.unsqueeze(-2))).flatten(-2)[..., :size]
