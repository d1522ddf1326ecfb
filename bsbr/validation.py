"""Shape checks of the arguments of BSBR."""

from bsbr.inputs import BSBRInputs, BSBROptions
from bsbr.interface import check_heads


def check_inputs(inputs: BSBRInputs, options: BSBROptions, *, retrievable: int) -> None:
    """Checks that the tensors of a whole sequence, or of a whole shard, fit each other.

    Args:
        inputs: the tensors.
        options: the settings, which give the number of chunks.
        retrievable: number of chunks that a later chunk can retrieve, the least number of meta keys.

    Raises:
        ValueError: if a shape does not fit; the message names the tensor, its shape and the expected one.
    """
    q, k, v, meta_query, meta_key, q_features, k_features, beta, gain = inputs
    check_heads(q, k, v)
    time = q.shape[2]
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, got k {list(k.shape)}, v {list(v.shape)}")
    if k.shape[2] != time:
        raise ValueError(
            f"q and k must have the same time, got {time} and {k.shape[2]}; to continue a sequence use BSBRAttention.extend"
        )
    expected = [*q.shape[:2], options.num_chunks(time), q.shape[3]]
    if list(meta_query.shape) != expected:
        raise ValueError(
            f"meta_query must be [batch, heads, {expected[2]} chunks, head_dim] = {expected}, got {list(meta_query.shape)}"
        )
    keys_fit = meta_key.dim() == 4 and meta_key.shape[:2] == k.shape[:2] and meta_key.shape[3] == q.shape[3]
    if not keys_fit or meta_key.shape[2] < retrievable:
        raise ValueError(
            f"meta_key must be [batch, kv_heads, {retrievable} chunks or more, head_dim], "
            f"got {list(meta_key.shape)} beside k {list(k.shape)}"
        )
    if q_features is not None or k_features is not None:
        if q_features is None or k_features is None:
            raise ValueError("q_features and k_features go together: give both, or neither")
        if q_features.shape[:-1] != q.shape[:-1] or k_features.shape != (*k.shape[:-1], q_features.shape[-1]):
            raise ValueError(
                "q_features and k_features must be those of q and k in all but their common last size, d_r: "
                f"got {list(q_features.shape)} and {list(k_features.shape)} beside q {list(q.shape)} and k {list(k.shape)}"
            )
        if not q_features.shape[-1]:
            raise ValueError("q_features and k_features must have a last size, d_r, of at least 1, got 0")
    if beta is not None and beta.shape != k.shape[:3]:
        raise ValueError(f"beta must be [batch, kv_heads, time] = {list(k.shape[:3])}, got {list(beta.shape)}")
    if gain is not None and gain.shape != q.shape[1:2]:
        raise ValueError(f"gain must be [heads = {q.shape[1]}], got {list(gain.shape)}")
