"""Reference implementation of BSBR: float64, loops over heads and tokens, no code shared with `bsbr.attention` or a backend.

Every fast implementation is compared with it, so it is written to be checked by eye, not to be fast.
"""

import math

import torch
from torch import Tensor


def bsbr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta_query: Tensor,
    meta_key: Tensor,
    *,
    chunk_size: int,
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    beta: Tensor | None = None,
    gain: Tensor | None = None,
    chunk_overlap: int = 0,
    top_k: int | None = None,
    normalise: bool = False,
) -> Tensor:
    """o_i = Σ_j softmax_j(q_i·k_j/√d) v_j + g φ(q_i)ᵀ F̄_t,  F̄_t = Σ_{s<t} softmax_s(r_t·h_s/√d) F_s,  F_s = Σ_{j in s} φ(k_j) v_jᵀ.

    With β, each token j of chunk s adds β_j φ(k_j) (v_j − F_sᵀ φ(k_j))ᵀ to F_s; with `normalise`, F̄_t has the norm √head_dim.

    Arguments and shapes are those of `bsbr.bsbr_attention`, without dropout_p and impl. The result is float64 and differentiable.
    """
    q, k, v, r, h = (tensor.double() for tensor in (q, k, v, meta_query, meta_key))
    phi_q = unit_norm(q) if q_features is None else q_features.double()
    phi_k = unit_norm(k) if k_features is None else k_features.double()
    heads, time, head_dim = q.shape[1:]
    group = heads // k.shape[1]

    rows = []
    for head in range(heads):
        shared = head // group  # the key-value head that this query head reads
        keys, values, features = k[:, shared], v[:, shared], phi_k[:, shared]
        outputs, states = [], []
        for i in range(time):
            chunk = i // chunk_size
            first = max(0, chunk * chunk_size - chunk_overlap)
            scores = torch.einsum("bd,bjd->bj", q[:, head, i], keys[:, first : i + 1]) / math.sqrt(head_dim)
            output = torch.einsum("bj,bjd->bd", torch.softmax(scores, dim=1), values[:, first : i + 1])
            if chunk > 0:
                if i % chunk_size == 0:
                    last = slice(i - chunk_size, i)
                    if beta is None:
                        states.append(torch.einsum("bjr,bjd->brd", features[:, last], values[:, last]))
                    else:
                        states.append(_delta_rule(features[:, last], values[:, last], beta[:, shared, last].double()))
                    retrieved = _retrieve(r[:, head, chunk], h[:, shared, :chunk], states, top_k)
                    if normalise:
                        norm = torch.sqrt((retrieved**2).sum(dim=(1, 2), keepdim=True) + 1e-12)
                        retrieved = math.sqrt(head_dim) * retrieved / norm
                weight = 1.0 if gain is None else gain[head].double()
                output = output + weight * torch.einsum("br,brd->bd", phi_q[:, head, i], retrieved)
            outputs.append(output)
        rows.append(torch.stack(outputs, dim=1))
    return torch.stack(rows, dim=1)


def _delta_rule(features: Tensor, values: Tensor, beta: Tensor) -> Tensor:
    """The state [batch, d_r, d] of one chunk: features [batch, tokens, d_r], values [batch, tokens, d], beta [batch, tokens]."""
    state = torch.einsum("br,bd->brd", torch.zeros_like(features[:, 0]), values[:, 0])
    for j in range(features.shape[1]):
        known = torch.einsum("brd,br->bd", state, features[:, j])
        state = state + torch.einsum("b,br,bd->brd", beta[:, j], features[:, j], values[:, j] - known)
    return state


def _retrieve(r_t: Tensor, h: Tensor, states: list[Tensor], top_k: int | None) -> Tensor:
    """F̄_t [batch, d_r, d] of one head, from r_t [batch, d] and the h [batch, t, d] and F_s [batch, d_r, d] of t earlier chunks."""
    scores = torch.einsum("bd,bsd->bs", r_t, h) / math.sqrt(r_t.shape[-1])
    if top_k is not None and top_k < scores.shape[1]:
        dropped = scores.argsort(dim=1, descending=True, stable=True)[:, top_k:]  # stable: the earliest of equals is kept
        scores = scores.scatter(1, dropped, -torch.inf)
    return torch.einsum("bs,bsrd->brd", torch.softmax(scores, dim=1), torch.stack(states, dim=1))


def unit_norm(x: Tensor) -> Tensor:
    """x / sqrt(|x|² + 1e-6), the default feature map."""
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)
