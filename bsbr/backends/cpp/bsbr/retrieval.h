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

/// Gradients of `mix_states`: d_weights[t, s] = d_mixed[t] · states[s] where row t sees chunk s, the other ones are not written; and
/// d_states[s] = Σ_t weights[t, s] d_mixed[t], where weights that are not seen are 0. Rows of d_weights have whole panels.
template <class T>
index mix_states_backward(
    const RetrievalSizes& s, Tensor weights, Tensor d_mixed, Tensor states, Tensor d_weights, Tensor d_states, T* memory
) {
    constexpr index SLICE = DEPTH * COLUMNS / WIDTH<T> / 2;  // of a state: a packed panel fits the L1 cache
    const index group = s.heads / s.kv_heads, parts = panels(s.size, COLUMNS), blocks = panels(s.chunks, WIDTH<T>);
    const auto first_row = [&](index chunk) { return std::clamp<index>(chunk + 1 - s.seen, 0, s.rows); };  // that sees it
    const index of_weights = in_parallel(s.batch * s.heads * blocks, s, memory, [&](index task, Scratch<T> scratch) {
        const index start = task % blocks * WIDTH<T>, head = task / blocks % s.heads, item = task / blocks / s.heads;
        T* packed = scratch.take(SLICE * WIDTH<T>);
        for (index from = 0; from < s.size; from += SLICE) {
            const index depth = std::min<index>(SLICE, s.size - from), wide = std::min<index>(WIDTH<T>, s.chunks - start);
            pack_transposed(at<T>(states, item, head / group, start) + from, states.row, depth, wide, packed);
            by_rows(s.rows, [&](index i, auto m) {
                Tile<T, m()> tile;
                tile.add_product(at<T>(d_mixed, item, head, i) + from, d_mixed.row, 1, packed, depth);
                tile.store(at<T>(d_weights, item, head, i) + start, d_weights.row, WIDTH<T>, from > 0);
            }, first_row(start));
        }
    });
    return of_weights + in_parallel(s.batch * s.kv_heads * parts, s, memory, [&](index task, Scratch<T> scratch) {
        const index first = task % parts * COLUMNS, kv_head = task / parts % s.kv_heads, item = task / parts / s.kv_heads;
        const index columns = std::min<index>(COLUMNS, s.size - first);
        T* packed = scratch.take(DEPTH * padded<T>(COLUMNS));
        bool add = false;
        for (index head = kv_head * group; head < (kv_head + 1) * group; ++head)
            for (index start = 0; start < s.rows; start += DEPTH, add = true) {
                const index depth = std::min<index>(DEPTH, s.rows - start);
                pack(at<T>(d_mixed, item, head, start) + first, d_mixed.row, depth, columns, packed);
                by_rows(s.chunks, [&](index j, auto m) {
                    const index from = std::clamp<index>(first_row(j) - start, 0, depth);
                    if (from == depth && add) return;
                    const T* weight = at<T>(weights, item, head, start + from) + j;
                    for (index column = 0; column < columns; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(weight, 1, weights.row, packed + column * depth + from * WIDTH<T>, depth - from);
                        tile.store(at<T>(d_states, item, kv_head, j) + first + column, d_states.row, columns - column, add);
                    }
                });
            }
    });
}

/// Gradients of `retrieval_weights`. d_weights is overwritten by the gradient of the scores r·h_s; its rows, and those of weights,
/// have whole panels.
template <class T>
index retrieval_weights_backward(
    const WeightSizes& s, Tensor weights, Tensor d_weights, Tensor meta_query, Tensor meta_key, Tensor d_meta_query, Tensor d_meta_key,
    T* memory
) {
    const index group = s.heads / s.kv_heads, wide = padded<T>(s.chunks), row = d_weights.row;
    const T scale = 1 / std::sqrt(T(s.head_dim));
    return in_parallel(s.batch * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index kv_head = task % s.kv_heads, item = task / s.kv_heads;
        T* keys = scratch.take(s.chunks * padded<T>(s.head_dim));
        T* queries = scratch.take(s.rows * padded<T>(s.head_dim));
        pack(at<T>(meta_key, item, kv_head, 0), meta_key.row, s.chunks, s.head_dim, keys);
        for (index head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            pack(at<T>(meta_query, item, head, 0), meta_query.row, s.rows, s.head_dim, queries);
            by_rows(s.rows, [&](index i, auto m) {
                for (int a = 0; a < m; ++a) {
                    const T* weight = at<T>(weights, item, head, i + a);
                    T* d_score = at<T>(d_weights, item, head, i + a);
                    const index visible = std::clamp<index>(s.seen + i + a, 0, s.chunks);
                    const T along = dot(weight, d_score, visible);
                    for (index j = 0; j < visible; ++j) d_score[j] = weight[j] * (d_score[j] - along) * scale;
                    std::fill(d_score + visible, d_score + wide, T(0));
                }
                const index visible = std::clamp<index>(s.seen + i + m - 1, 0, s.chunks);
                for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                    Tile<T, m()> tile;
                    tile.add_product(at<T>(d_weights, item, head, i), row, 1, keys + column * s.chunks, visible);
                    tile.store(at<T>(d_meta_query, item, head, i) + column, d_meta_query.row, s.head_dim - column);
                }
            });
            by_rows(s.chunks, [&](index j, auto m) {
                const index from = std::clamp<index>(j + 1 - s.seen, 0, s.rows);
                for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                    Tile<T, m()> tile;
                    tile.add_product(
                        at<T>(d_weights, item, head, from) + j, 1, row, queries + column * s.rows + from * WIDTH<T>, s.rows - from
                    );
                    tile.store(at<T>(d_meta_key, item, kv_head, j) + column, d_meta_key.row, s.head_dim - column, head % group);
                }
            });
        }
    });
}

}  // namespace
