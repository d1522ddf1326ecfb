"""Retrieval per token, computed as its definition reads: float64, explicit loops, no code shared with the other modules.

It must be easy to check by eye, not fast.
"""

import math

import torch
from torch import Tensor


def token_retrieval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_features: Tensor,
    k_features: Tensor,
    beta: Tensor | None,
    meta_query: Tensor | None,
    meta_key: Tensor | None,
    gain: Tensor,
    exponent: Tensor | None,
    *,
    chunk_size: int,
    chunk_overlap: int = 0,
    router: str = "energy",
    candidates: int | None = None,
) -> Tensor:
    """o_i = Σ_j softmax_j(q_i·k_j/√d) v_j + g Σ_s γ_is F_sᵀ φ(q_i), over the candidates s among the chunks before the token's own.

    F_s and z_s are the states of the delta rule over chunk s with its values, and with values of 1; without β, sums. The candidates
    are the chunks with the greatest φ(q_i)·z_s, or x_i·h_s, the earliest of equals. γ_is is proportional to (e_is + 1e-6)^p with
    e_is = |F_sᵀ φ(q_i)|²/d, or with e_is = (φ(q_i)·z_s)²; or it is the softmax of x_i·h_s/√d.

    Arguments and shapes are those of `TokenRetrievalInputs` and `TokenRetrievalOptions`. The result is float64 and differentiable.
    """
    heads, time, dim = q.shape[1:]
    q, k, v, phi_q, phi_k = (tensor.double() for tensor in (q, k, v, q_features, k_features))
    items = []
    for item in range(q.shape[0]):
        rows = []
        for head in range(heads):
            kv = head // (heads // k.shape[1])
            chunks: list[tuple[Tensor, Tensor]] = []  # z or h, and F
            outputs = []
            for i in range(time):
                chunk = i // chunk_size
                if i % chunk_size == 0 and i > 0:
                    state, ones = (
                        torch.zeros_like(torch.outer(phi_k[item, kv, 0], v[item, kv, 0])),
                        torch.zeros_like(phi_k[0, 0, 0]),
                    )
                    for j in range(i - chunk_size, i):
                        key, value = phi_k[item, kv, j], v[item, kv, j]
                        if beta is None:
                            state, ones = state + torch.outer(key, value), ones + key
                        else:
                            rate = beta[item, kv, j].double()
                            state = state + rate * torch.outer(key, value - state.T @ key)
                            ones = ones + rate * key * (1 - ones @ key)
                    chunks.append((ones if meta_key is None else meta_key[item, kv, chunk - 1].double(), state))
                first = max(0, chunk * chunk_size - chunk_overlap)
                scores = k[item, kv, first : i + 1] @ q[item, head, i] / math.sqrt(dim)
                output = torch.softmax(scores, dim=0) @ v[item, kv, first : i + 1]
                if chunks:
                    phi = phi_q[item, head, i]
                    x = phi if meta_query is None else meta_query[item, head, i].double()
                    fit = [x @ key for key, _ in chunks]
                    best = sorted(range(chunk), key=lambda s: -float(fit[s].detach()))[:candidates]  # sorted is stable
                    reads = [chunks[s][1].T @ phi for s in best]
                    if exponent is None:
                        weights = torch.stack([torch.exp((fit[s] - fit[best[0]]) / math.sqrt(dim)) for s in best])
                    else:
                        energies = [read @ read / dim for read in reads] if router == "energy" else [fit[s] ** 2 for s in best]
                        most = (
                            max(float(energy.detach()) for energy in energies) + 1e-6
                        )  # a common factor, so that no power overflows
                        weights = torch.stack([((energy + 1e-6) / most) ** exponent[head].double() for energy in energies])
                    weights = weights / weights.sum()
                    retrieved = sum((weights[m] * reads[m] for m in range(1, len(best))), weights[0] * reads[0])
                    output = output + gain[head].double() * retrieved
                outputs.append(output)
            rows.append(torch.stack(outputs))
        items.append(torch.stack(rows))
    return torch.stack(items)
