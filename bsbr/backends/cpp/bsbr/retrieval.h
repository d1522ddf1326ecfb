// Retrieval between chunks: weights of chunks, selection, and sums of states.

#pragma once

#include "bsbr/sizes.h"

namespace {

/// How many chunks row i sees.
inline index visible_chunks(const RetrievalSizes& s, index i) { return std::clamp<index>(s.seen + i, 0, s.chunks); }

/// Indices of the s.size highest scores of each row, by insertion: the highest first and the earliest of equals.
template <class T>
index select_top_k(const RetrievalSizes& s, Tensor scores, Tensor selected, T* memory) {
    return in_parallel(s.batch * s.heads * s.rows, s, memory, [&](index task, Scratch<T> scratch) {
        const index row = task % s.rows, head = task / s.rows % s.heads, item = task / s.rows / s.heads;
        const T* score = at<T>(scores, item, head, row);
        std::int64_t* best = at<std::int64_t>(selected, item, head, row);
        T* highest = scratch.take(s.size);
        index found = 0;
        const index seen = visible_chunks(s, row);
        for (index j = 0; j < seen; ++j) {
            if (found == s.size && !(score[j] > highest[found - 1])) continue;
            index place = found < s.size ? found++ : found - 1;
            for (; place > 0 && score[j] > highest[place - 1]; --place)
                highest[place] = highest[place - 1], best[place] = best[place - 1];
            highest[place] = score[j], best[place] = j;
        }
        for (; found < s.size; ++found) best[found] = found;
    });
}

/// softmax_s(r·h_s/√d) over the chunks that each row sees, and 0 for the others, up to whole vectors; a row that sees none is 0.
template <class T>
index retrieval_weights(const WeightSizes& s, Tensor meta_query, Tensor meta_key, Tensor weights, T* memory) {
    const index group = s.heads / s.kv_heads, wide = panels(s.chunks, LANES<T>) * LANES<T>, row = weights.row;
    return in_parallel(s.batch * s.heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index head = task % s.heads, item = task / s.heads;
        const T scale = 1 / std::sqrt(T(s.head_dim));
        T* keys = scratch.take(s.head_dim * padded<T>(s.chunks));
        pack_transposed(at<T>(meta_key, item, head / group, 0), meta_key.row, s.head_dim, s.chunks, keys);
        const index first = std::min<index>(s.rows, s.seen ? 0 : 1);
        for (index i = 0; i < first; ++i) std::fill_n(at<T>(weights, item, head, i), wide, T(0));
        by_rows(s.rows, [&](index i, auto m) {
            const T* query = at<T>(meta_query, item, head, i);
            T* weight = at<T>(weights, item, head, i);
            const index visible = s.seen + i;
            products<T, m()>(query, meta_query.row, keys, s.head_dim, visible + m - 1, weight, row);
            T sums[m()];
            exponentials<T, m()>(weight, row, visible, wide, scale, sums);
            for (int a = 0; a < m; ++a) scaled(weight + a * row, 1 / sums[a], wide, weight + a * row);
        }, first);
    });
}

/// Σ_s weights[s] states[s] of each row, over the chunks that it sees.
template <class T>
index mix_states(const RetrievalSizes& s, Tensor weights, Tensor states, Tensor mixed, T* memory) {
    const index group = s.heads / s.kv_heads, parts = panels(s.size, COLUMNS);
    // Packing the states pays if each is read by many rows.
    const bool packs = group * s.rows > 2 * ROWS || s.size % WIDTH<T>;
    return in_parallel(s.batch * s.kv_heads * parts, s, memory, [&](index task, Scratch<T> scratch) {
        const index first = task % parts * COLUMNS, kv_head = task / parts % s.kv_heads, item = task / parts / s.kv_heads;
        const index columns = std::min<index>(COLUMNS, s.size - first);
        T* packed = scratch.take(DEPTH * COLUMNS);
        for (index start = 0; start < s.chunks; start += DEPTH) {
            const index depth = std::min<index>(DEPTH, s.chunks - start);
            const T* state = at<T>(states, item, kv_head, start) + first;
            if (packs) pack(state, states.row, depth, columns, packed);
            for (index head = kv_head * group; head < (kv_head + 1) * group; ++head)
                by_rows(s.rows, [&](index i, auto m) {
                    // Each row sees one chunk more than the row before. The weights of what a row's tile sees beyond that are 0.
                    const index visible = std::clamp<index>(visible_chunks(s, i + m - 1) - start, 0, depth);
                    if (visible == 0 && (s.add || start)) return;
                    const T* weight = at<T>(weights, item, head, i) + start;
                    T* to = at<T>(mixed, item, head, i) + first;
                    for (index column = 0; column < columns; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        if (packs) tile.add_product(weight, weights.row, 1, packed + column * depth, visible);
                        else tile.add_product(weight, weights.row, 1, state + column, visible, states.row);
                        tile.store(to + column, mixed.row, columns - column, s.add || start);
                    }
                });
        }
    });
}

}  // namespace
