// Descriptions of tensors and sizes as the library's callers pass them, scratch memory, and the loop over tasks.

#pragma once

#include <omp.h>

#include "tiles.h"

extern "C" {

/// A tensor [batch, heads, rows, dim] with contiguous rows. States [batch, heads, chunks, d_r, dim] have one contiguous row a
/// chunk. data is null for a tensor that is left out.
struct Tensor {
    void* data;
    std::int64_t batch, head, row;  // strides in elements
};

/// Sizes of a function that works on tokens, chunk by chunk. before: rows of k and v before the first row of q. features: d_r.
/// unit_norm: whether φ is the unit norm of what is passed as keys.
struct ChunkSizes {
    std::int64_t batch, heads, kv_heads, time, before, chunk_size, overlap, chunks, head_dim, features, unit_norm, threads;
};

/// Sizes of retrieval from `chunks` states by `rows` chunks, of which row i sees the first `seen` + i. size: numbers of a state,
/// or how many chunks are selected. add: whether results are added to what is there.
struct RetrievalSizes {
    std::int64_t batch, heads, kv_heads, rows, chunks, seen, size, add, threads;
};

/// Sizes of quadratic features: `size` products of two of `factors` numbers for each token.
struct FeatureSizes {
    std::int64_t batch, heads, time, factors, size, threads;
};
}

namespace {

/// The address of a row.
template <class T>
T* at(const Tensor& x, index item, index head, index row) {
    return static_cast<T*>(x.data) + item * x.batch + head * x.head + row * x.row;
}

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

/// Scratch memory of one thread. `take` returns consecutive pieces, each beginning at a cache line.
template <class T>
struct Scratch {
    T* next;
    T* take(index size) {
        T* piece = next;
        next += panels(size, 16) * 16;
        return piece;
    }
};

/// Columns rounded up to whole panels.
template <class T>
index padded(index columns) {
    return panels(columns, WIDTH<T>) * WIDTH<T>;
}

/// The distance between rows of scores; it leaves room for a panel of zeros after the keys.
template <class T>
index score_row(index keys) {
    return padded<T>(keys) + 2 * WIDTH<T>;
}

/// The most keys that a chunk attends to.
index max_keys(const ChunkSizes& s) { return std::min(s.chunk_size, s.time) + s.overlap; }

/// Elements of scratch memory that one thread needs for the most demanding function: a whole number of cache lines.
template <class T>
index scratch_size(const ChunkSizes& s) {
    const index keys = padded<T>(max_keys(s)), dim = padded<T>(std::max(s.head_dim, s.features));
    return 6 * keys * dim + dim * dim + 2 * keys * score_row<T>(keys) + 3 * ROWS * score_row<T>(std::max(keys, dim));
}

constexpr index DEPTH = 256, COLUMNS = 128;  // of the states packed at once: they fit a core's L2 cache, and one panel its L1

template <class T>
index scratch_size(const RetrievalSizes& s) {
    return std::max<index>(DEPTH * COLUMNS, panels(s.size, 16) * 16);
}

template <class T>
index scratch_size(const FeatureSizes& s) {
    return 3 * (panels(2 * s.factors + s.size + 2 * LANES<T>, 16) * 16);
}

/// Calls body(task, scratch of its thread) for all tasks, on up to s.threads threads.
/// Returns the floating point operations of their products.
template <class T, class S, class Body>
index in_parallel(index tasks, const S& s, T* memory, Body&& body) {
    const int threads = static_cast<int>(std::min<index>(s.threads, tasks));
    const index size = scratch_size<T>(s);
    index total = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1) reduction(+ : total)
    for (index task = 0; task < tasks; ++task) {
        operations = 0;
        body(task, Scratch<T>{memory + omp_get_thread_num() * size});
        total += operations;
    }
    return total;
}

}  // namespace
