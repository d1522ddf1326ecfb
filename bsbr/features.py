"""Feature maps φ of BSBR: a chunk's state F = Σ φ(k) vᵀ stores values under features of keys, and φ(q)ᵀ F reads them.

"What it can remember" in the documentation shows how many associations each map recalls for how many bytes of state.
"""

from typing import Literal, get_args

from torch import Tensor, nn

from bsbr.backends.cpp import functions as cpp
from bsbr.backends.cpp.operators import KERNELS
from bsbr.backends.pytorch import quadratic_features, unit_norm
from bsbr.interface import split_heads

FeatureMap = Literal["quadratic", "linear"]


class LinearFeatures(nn.Module):
    """φ(x) = unit_norm(P x) for x = q and x = k, with one P for both and all heads; P is the identity if d_r = head_dim."""

    def __init__(self, head_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.projection = nn.Identity() if feature_dim == head_dim else nn.Linear(head_dim, feature_dim, bias=False)

    def forward(self, hidden_states: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ(q) and φ(k) [batch, heads or kv_heads, time, d_r] of q and k before any rotation."""
        return unit_norm(self.projection(q)), unit_norm(self.projection(k))


class QuadraticFeatures(nn.Module):
    """φ(q)·φ(k) ≈ (q̂·k̂)² with φ(q) = `quadratic_features`(W_q x) and φ(k) = `quadratic_features`(W_k x) of hidden states x.

    q̂ and k̂ are W_q x and W_k x scaled to unit norm. W_q and W_k are separate projections to p ≈ √(2 d_r) numbers per head; d_r of
    their p (p + 1) / 2 pairwise products are the features. For unrelated unit vectors, (q̂·k̂)² is much smaller than |q̂·k̂|, so the
    keys in a state interfere less and many more fit. These are the second-order features of Based (arXiv:2402.18668, section
    4.1) without the terms of order 0 and 1.
    """

    def __init__(self, hidden_dim: int, num_heads: int, num_kv_heads: int, feature_dim: int, impl: str) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.feature_dim, self.impl = num_heads, num_kv_heads, feature_dim, impl
        size = num_factors(feature_dim)
        self.q_proj = nn.Linear(hidden_dim, num_heads * size, bias=False)
        self.k_proj = nn.Linear(hidden_dim, num_kv_heads * size, bias=False)

    def forward(self, hidden_states: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ(q) and φ(k) [batch, heads or kv_heads, time, d_r], made of the hidden states [batch, time, hidden_dim] alone."""
        q_factors, k_factors = self.factors(hidden_states)
        use_cpp = self.impl in ("auto", "cpp") and KERNELS.unsupported(q_factors, k_factors) is None
        make = cpp.quadratic_features if use_cpp else quadratic_features
        return make(q_factors, self.feature_dim), make(k_factors, self.feature_dim)

    def factors(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """W_q x and W_k x of every head [batch, heads or kv_heads, time, p]."""
        return split_heads(self.q_proj(hidden_states), self.num_heads), split_heads(self.k_proj(hidden_states), self.num_kv_heads)


def build_feature_map(
    kind: FeatureMap, hidden_dim: int, num_heads: int, num_kv_heads: int, feature_dim: int, impl: str
) -> LinearFeatures | QuadraticFeatures:
    """Builds the module of a feature map.

    Args:
        kind: "quadratic" or "linear".
        hidden_dim, num_heads, num_kv_heads: see `MultiHeadAttention`.
        feature_dim: d_r.
        impl: see `bsbr_attention`; the quadratic map has a C++ implementation.

    Raises:
        ValueError: if there is no such map.
    """
    if kind not in get_args(FeatureMap):
        raise ValueError(f"feature_map must be one of {', '.join(get_args(FeatureMap))}, got {kind!r}")
    if kind == "linear":
        return LinearFeatures(hidden_dim // num_heads, feature_dim)
    return QuadraticFeatures(hidden_dim, num_heads, num_kv_heads, feature_dim, impl)


def num_factors(feature_dim: int) -> int:
    """The smallest p with p (p + 1) / 2 ≥ feature_dim."""
    size = 1
    while size * (size + 1) // 2 < feature_dim:
        size += 1
    return size
