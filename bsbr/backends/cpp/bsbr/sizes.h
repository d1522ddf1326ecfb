// Sizes that Python passes, and the chunks that they describe.

#pragma once

#include "tensors.h"

namespace {

constexpr index BLOCK = 16;                  // tokens of the delta rule that are solved together; cost.py declares the work of such blocks
constexpr index DEPTH = 128, COLUMNS = 128;  // of the states packed at once: they fit a core's L2 cache, and one panel its L1

/// The distance between rows of scores; it leaves room for a panel of zeros after the keys.
template <class T>
index score_row(index keys) {
    return padded<T>(keys) + 2 * WIDTH<T>;
}

/// Sizes of a function that works on tokens, chunk by chunk. before: rows of k and v before the first row of q. seen: chunks before
/// the first one. features: d_r. unit_norm: whether φ is the unit norm of what is passed as keys. normalise: whether retrieved
/// states are scaled to the norm of sqrt(head_dim). add: whether gradients are added to what is there.
struct ChunkSizes {
    std::int64_t batch, heads, kv_heads, time, before, chunk_size, overlap, chunks, seen, head_dim, features, unit_norm, normalise, add, threads;

    /// The most keys that a chunk attends to.
    index max_keys() const { return std::min(chunk_size, time) + overlap; }

    /// Of the most demanding function.
    template <class T>
    index scratch_size() const {
        const index keys = padded<T>(max_keys()), dim = padded<T>(std::max(head_dim, features));
        const index blocks = panels(chunk_size, BLOCK);
        const index attention = 6 * keys * dim + 2 * dim * dim + 2 * keys * score_row<T>(keys) + 3 * ROWS * score_row<T>(std::max(keys, dim));
        const index delta_rule = (blocks + 4) * dim * dim + (blocks + 12) * BLOCK * (2 * dim + 64) + 4 * padded<T>(chunk_size);
        return panels(std::max(attention, delta_rule), 16) * 16 + 256;
    }
};

/// Sizes of retrieval from `chunks` states by `rows` chunks, of which row i sees the first `seen` + i. size: numbers of a state, or
/// how many chunks are selected. add: whether sums are added to what is there.
struct RetrievalSizes {
    std::int64_t batch, heads, kv_heads, rows, chunks, seen, size, add, threads;

    template <class T>
    index scratch_size() const {
        return panels(std::max<index>(DEPTH * padded<T>(COLUMNS), size), 16) * 16;
    }
};

/// Sizes of the weights of retrieval; the fields are those of `RetrievalSizes`.
struct WeightSizes {
    std::int64_t batch, heads, kv_heads, rows, chunks, seen, head_dim, threads;

    template <class T>
    index scratch_size() const {
        return (padded<T>(chunks) + padded<T>(rows)) * padded<T>(head_dim);
    }
};

/// Sizes of quadratic features: `size` products of two of `factors` numbers for each token.
struct FeatureSizes {
    std::int64_t batch, heads, time, factors, size, threads;

    template <class T>
    index scratch_size() const {
        return 3 * (panels(2 * factors + size + 2 * LANES<T>, 16) * 16);
    }
};

/// One chunk: its tokens, which are rows start … start + length of q, and the keys it attends to, rows first_key … first_key + keys
/// of k. Its first token sees `seen_before` keys before its own.
struct Chunk {
    index start, length, first_key, keys, seen_before;
    Chunk(const ChunkSizes& s, index number) {
        start = number * s.chunk_size;
        length = std::min<index>(s.chunk_size, s.time - start);
        first_key = std::max<index>(0, s.before + start - s.overlap);
        keys = s.before + start + length - first_key;
        seen_before = keys - length;
    }
};

}  // namespace
