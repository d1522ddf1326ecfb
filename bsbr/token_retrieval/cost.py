"""Cost of retrieval per token by its definition: floating point operations, and bytes of the decoding state."""

from bsbr.cost import HeadSizes, attention_flops
from bsbr.inputs import BSBROptions
from bsbr.token_retrieval.inputs import TokenRetrievalOptions


def attention_flops_per_token(seq_len: int, sizes: HeadSizes, options: TokenRetrievalOptions, *, delta_rule: bool) -> int:
    """Matrix-product FLOPs of one sequence, a multiply-add counted as 2, causal work only.

    Local attention and states cost what they cost in `bsbr.cost.attention_flops`. Beside them, per head: 2·d_r for each token and
    each chunk before its own (2·d with meta keys), unless all are candidates, and 2·d_r·d for each candidate that a token reads.

    Args:
        seq_len: n, tokens.
        sizes: sizes of the heads.
        options: see `TokenRetrievalOptions`.
        delta_rule: whether states are computed by the delta rule, with β, instead of the sum.
    """
    local = BSBROptions(options.chunk_size, options.chunk_overlap, top_k=1)
    chunks, size = local.num_chunks(seq_len), options.chunk_size
    state = sizes.feature_dim * sizes.head_dim
    retrieved = chunks * (chunks - 1) // 2 * 2 * sizes.head_dim + 2 * state * (chunks - 1 + seq_len - min(seq_len, size))
    flops = attention_flops(seq_len, sizes, local, delta_rule=delta_rule) - sizes.num_heads * retrieved
    lengths = [min(size, seq_len - chunk * size) for chunk in range(chunks)]
    scored = sum(chunk * length for chunk, length in enumerate(lengths))
    k = chunks if options.candidates is None else options.candidates
    read = sum(min(chunk, k) * length for chunk, length in enumerate(lengths))
    selector = sizes.head_dim if options.router == "meta" else sizes.feature_dim
    needs_scores = options.router != "energy" or k < chunks - 1
    return flops + sizes.num_heads * 2 * (needs_scores * selector * scored + state * read)


def decoding_bytes(seq_len: int, sizes: HeadSizes, options: TokenRetrievalOptions, *, hidden_dim: int, itemsize: int) -> int:
    """Bytes of the decoding state of one sequence after `seq_len` tokens; see `bsbr.token_retrieval.streaming.TokenStreamingState`.

    Args:
        seq_len: n, tokens.
        sizes: sizes of the heads.
        options: see `TokenRetrievalOptions`.
        hidden_dim: width of the hidden states, whose sum over the open chunk the state holds if the router is "meta".
        itemsize: bytes of a number in the parameters' dtype; sums and keys of chunks take at least 4.
    """
    wide, state = max(4, itemsize), sizes.feature_dim * sizes.head_dim
    by_meta = options.router == "meta"
    cached = 2 * sizes.num_kv_heads * options.cached_tokens(seq_len) * sizes.head_dim * itemsize
    open_chunk = sizes.num_kv_heads * sizes.feature_dim * (sizes.head_dim + 1) + by_meta * hidden_dim
    of_state = {None: itemsize * state, "bfloat16": 2 * state, "int8": state + 4 * sizes.head_dim}[options.state_dtype]
    of_key = wide * (sizes.head_dim if by_meta else sizes.feature_dim)
    return cached + wide * open_chunk + seq_len // options.chunk_size * sizes.num_kv_heads * (of_state + of_key)
