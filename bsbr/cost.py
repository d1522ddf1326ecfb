"""TODO: what lives here."""


def attention_flops(
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    feature_dim: int,
    chunk_size: int,
    chunk_overlap: int = 0,
    top_k: int | None = None,
    delta: bool = False,
) -> int:
    """What `bsbr_attention` of one sequence costs at least, in matrix products, multiply-add = 2. delta: with β.

    A head: 4·d per visible pair, 2·d_r·d per token read and per chunk mixed, 2·d per chunk scored; a kv head: 2·d_r·d per token
    stored, and with β 2·(d_r + d) per pair of those of a chunk.
    """
    size = chunk_size
    full, rest = divmod(seq_len, size)
    chunks = -(-seq_len // size)
    pairs = full * size * (size + 1) // 2 + rest * (rest + 1) // 2
    pairs += sum(
        min(chunk_overlap, start) * min(size, seq_len - start) for start in range(0, min(seq_len, chunk_overlap + size), size)
    )
    whole_overlap_from = -(-min(seq_len, chunk_overlap + size) // size) * size
    pairs += chunk_overlap * max(0, seq_len - whole_overlap_from)
    scored = chunks * (chunks - 1) // 2
    mixed = scored if top_k is None else sum(min(chunk, top_k) for chunk in range(chunks))
    state = feature_dim * head_dim
    stored = (chunks - 1) * size
    read_out = seq_len - min(seq_len, size)
    per_head = 4 * head_dim * pairs + 2 * head_dim * scored + 2 * state * (mixed + read_out)
    per_kv_head = 2 * state * stored
    if delta:
        per_kv_head += (chunks - 1) * size * (size - 1) * (feature_dim + head_dim)
    return num_heads * per_head + num_kv_heads * per_kv_head
