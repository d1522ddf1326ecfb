"""Cost of BSBR by its definition: floating point operations of the attention, and bytes of the decoding state."""

from dataclasses import dataclass

from bsbr.inputs import BSBROptions

DELTA_BLOCK = 16
"""Tokens of the delta rule that are solved together, as in bsbr/backends/cpp/bsbr/sizes.h."""


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of the heads of a BSBR attention; feature_dim is d_r."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    feature_dim: int


def attention_flops(seq_len: int, sizes: HeadSizes, options: BSBROptions, *, delta_rule: bool = False) -> int:
    """Matrix-product FLOPs of `bsbr_attention` on one sequence, a multiply-add counted as 2, causal work only.

    With d = head_dim, per head: 4·d for each visible pair of tokens, 2·d for each score of two chunks, 2·d_r·d for each state
    that is mixed and for each token after the first chunk (its read-out). Per kv head: 2·d_r·d for each token of a chunk that can
    be retrieved. The delta rule solves `DELTA_BLOCK` tokens of such a chunk together: 2·(d_r + d) for each pair of different tokens
    of a block, and 2·d_r·d for each token after the first block, which reads the state.

    Args:
        seq_len: n, tokens.
        sizes: sizes of the heads.
        options: chunk_size, chunk_overlap and top_k are read.
        delta_rule: whether states are computed by the delta rule, with β, instead of the sum.
    """
    chunk_size, overlap = options.chunk_size, options.chunk_overlap
    chunks = options.num_chunks(seq_len)
    scored = chunks * (chunks - 1) // 2
    mixed = scored if options.top_k is None else sum(min(chunk, options.top_k) for chunk in range(chunks))
    state = sizes.feature_dim * sizes.head_dim
    read_out = seq_len - min(seq_len, chunk_size)
    per_head = 4 * sizes.head_dim * _visible_pairs(seq_len, chunk_size, overlap)
    per_head += 2 * sizes.head_dim * scored + 2 * state * (mixed + read_out)
    per_kv_head = 2 * state * (chunks - 1) * chunk_size
    if delta_rule:
        blocks, rest = divmod(chunk_size, DELTA_BLOCK)
        pairs = (blocks * DELTA_BLOCK * (DELTA_BLOCK - 1) + rest * (rest - 1)) // 2
        read = chunk_size - min(chunk_size, DELTA_BLOCK)
        per_kv_head += 2 * (chunks - 1) * (pairs * (sizes.feature_dim + sizes.head_dim) + read * state)
    return sizes.num_heads * per_head + sizes.num_kv_heads * per_kv_head


def state_bytes(seq_len: int, sizes: HeadSizes, options: BSBROptions, *, hidden_dim: int, itemsize: int) -> int:
    """Bytes of the decoding state of one sequence after `seq_len` tokens; see `bsbr.streaming.StreamingState`.

    Args:
        seq_len: n, tokens.
        sizes: sizes of the heads.
        options: chunk_size and chunk_overlap are read.
        hidden_dim: width of the hidden states, of which the state holds the sum over the open chunk.
        itemsize: bytes of a number in the parameters' dtype; sums take at least 4.
    """
    state = sizes.feature_dim * sizes.head_dim
    cached = 2 * sizes.num_kv_heads * options.cached_tokens(seq_len) * sizes.head_dim
    memory = seq_len // options.chunk_size * sizes.num_kv_heads * (sizes.head_dim + state)
    retrieved = sizes.num_heads * state
    sums = sizes.num_kv_heads * state + hidden_dim
    return itemsize * (cached + memory + retrieved) + max(4, itemsize) * sums


def _visible_pairs(seq_len: int, chunk_size: int, overlap: int) -> int:
    """Number of pairs of a token and a token that it attends to, itself included."""
    full, rest = divmod(seq_len, chunk_size)
    inside = full * chunk_size * (chunk_size + 1) // 2 + rest * (rest + 1) // 2
    # Chunks that begin before token `overlap` see less than a whole overlap: they are counted one by one.
    bounded = min(seq_len, overlap + chunk_size)
    cut_off = sum(min(overlap, start) * min(chunk_size, seq_len - start) for start in range(0, bounded, chunk_size))
    whole_from = -(-bounded // chunk_size) * chunk_size
    return inside + cut_off + overlap * max(0, seq_len - whole_from)
