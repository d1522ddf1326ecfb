"""TODO: what lives here."""

from torch import Tensor

from bsbr.interface import (
    require_positive,
)


def check_options(chunk_size: int, chunk_overlap: int, top_k: int | None) -> None:
    require_positive(chunk_size=chunk_size)
    if top_k is not None:
        require_positive(retrieval_top_k=top_k)
    if isinstance(chunk_overlap, bool) or not isinstance(chunk_overlap, int) or chunk_overlap < 0:
        raise ValueError(f"chunk_overlap must be an integer of at least 0, got {chunk_overlap!r}")


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    h: Tensor,
    q_features: Tensor | None,
    k_features: Tensor | None,
    beta: Tensor | None,
    gain: Tensor | None,
    *,
    chunk_size: int,
    retrievable: int,
) -> None:
    """Raises ValueError unless k and v have q's time and the rest its shape; q, k and v are checked heads.

    retrievable: how many meta keys h must hold at least.
    """
    time = q.shape[2]
    if k.shape[2] != time:
        raise ValueError(
            f"q and k must have the same time, got {time} and {k.shape[2]}; to continue a sequence use BSBRAttention.extend"
        )
    chunks = -(-time // chunk_size)
    if r.shape != (*q.shape[:2], chunks, q.shape[3]):
        raise ValueError(
            f"r must be [batch, heads, {chunks} chunks, head_dim] = {[*q.shape[:2], chunks, q.shape[3]]}, got {list(r.shape)}"
        )
    if h.dim() != 4 or h.shape[:2] != k.shape[:2] or h.shape[2] < retrievable or h.shape[3] != q.shape[3]:
        raise ValueError(
            f"h must be [batch, kv_heads, {retrievable} chunks or more, head_dim], got {list(h.shape)} beside k {list(k.shape)}"
        )
    if q_features is not None or k_features is not None:
        if q_features is None or k_features is None:
            raise ValueError("q_features and k_features go together: give both, or neither")
        if q_features.shape[:-1] != q.shape[:-1] or k_features.shape != (*k.shape[:-1], q_features.shape[-1]):
            raise ValueError(
                "q_features and k_features must be those of q and k in all but their common last size, d_r: "
                f"got {list(q_features.shape)} and {list(k_features.shape)} beside q {list(q.shape)} and k {list(k.shape)}"
            )
    if beta is not None and beta.shape != k.shape[:3]:
        raise ValueError(f"beta must be [batch, kv_heads, time] = {list(k.shape[:3])}, got {list(beta.shape)}")
    if gain is not None and gain.shape != q.shape[1:2]:
        raise ValueError(f"gain must be [heads = {q.shape[1]}], got {list(gain.shape)}")
