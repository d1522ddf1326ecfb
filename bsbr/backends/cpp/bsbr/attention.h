// The output: softmax attention inside chunks, and the read-out of retrieved states.

#pragma once

#include "bsbr/sizes.h"

namespace {

/// The factors of a retrieved state: the head's gain, and with `normalise` that to the norm √head_dim.
template <class T>
struct RetrievalFactors {
    T gain, norm = 1, inverse_square = 0;  // of the state's norm, with `normalise`

    RetrievalFactors(const ChunkSizes& s, const Tensor& gains, index head, const T* state)
        : gain(gains.data ? static_cast<const T*>(gains.data)[head * gains.row] : T(1)) {
        if (!s.normalise) return;
        const T square = dot(state, state, s.features * s.head_dim);
        inverse_square = 1 / (square + T(1e-12));
        norm = square > 0 ? std::sqrt(T(s.head_dim) * inverse_square) : T(0);  // a state of 0 has the gradient 0, not a million
    }

    /// Replaces the gradient of gain · norm · state by that of the state, and returns that of the gain.
    T backward(const T* state, T* gradient, index size) const {
        const T along = dot(state, gradient, size), by = along * inverse_square;
        index i = 0;
        for (; i + LANES<T> <= size; i += LANES<T>)
            vector(gradient + i) = (vector(gradient + i) - vector(state + i) * by) * (gain * norm);
        for (; i < size; ++i) gradient[i] = (gradient[i] - state[i] * by) * (gain * norm);
        return along * norm;
    }
};

/// softmax(QKᵀ/√d ⊙ M_in) V + φ(Q) F̄. φ(Q) is `features`, or the unit norm of q if that is null.
template <class T>
index attend(
    const ChunkSizes& s, Tensor q, Tensor k, Tensor v, Tensor features, Tensor retrieved, Tensor gain, Tensor out, T* memory
) {
    const index row = score_row<T>(s.max_keys()), group = s.heads / s.kv_heads;
    const T scale = 1 / std::sqrt(T(s.head_dim));
    return in_parallel(s.batch * s.chunks * s.heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index head = task % s.heads, number = task / s.heads % s.chunks, item = task / s.heads / s.chunks;
        const Chunk chunk(s, number);
        T* keys = scratch.take(s.head_dim * padded<T>(chunk.keys));
        T* values = scratch.take(chunk.keys * padded<T>(s.head_dim));
        pack_transposed(at<T>(k, item, head / group, chunk.first_key), k.row, s.head_dim, chunk.keys, keys);
        pack(at<T>(v, item, head / group, chunk.first_key), v.row, chunk.keys, s.head_dim, values);
        T* state = scratch.take(s.features * padded<T>(s.head_dim));
        const bool reads = s.seen + number > 0;  // the first chunk retrieves nothing
        if (reads) {
            const T* from = at<T>(retrieved, item, head, number);
            const RetrievalFactors<T> factors(s, gain, head, from);
            pack(from, s.head_dim, s.features, s.head_dim, state);
            scaled(state, factors.gain * factors.norm, s.features * padded<T>(s.head_dim), state);
        }
        T* scores = scratch.take(ROWS * row);
        T* phi_rows = scratch.take(ROWS * s.features);
        by_rows(chunk.length, [&](index i, auto m) {
            const T* query = at<T>(q, item, head, chunk.start + i);
            const index visible = chunk.seen_before + i + m;
            for (int a = 0; a < m; ++a) fetch(query + (a + m) * q.row, s.head_dim);
            products<T, m()>(query, q.row, keys, s.head_dim, visible, scores, row);
            T sums[m()];
            exponentials<T, m()>(scores, row, visible - m + 1, visible, scale, sums);
            for (int a = 0; a < m; ++a) sums[a] = 1 / sums[a];
            const T* phi = phi_rows;
            index phi_row = s.features;
            if (reads && features.data) {
                phi = at<T>(features, item, head, chunk.start + i), phi_row = features.row;
            } else if (reads) {
                for (int a = 0; a < m; ++a)
                    scaled(query + a * q.row, inverse_norm(query + a * q.row, s.features), s.features, phi_rows + a * s.features);
            }
            for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                Tile<T, m()> tile;
                tile.add_product(scores, row, 1, values + column * chunk.keys, visible);
                tile.scale_rows(sums);
                if (reads) tile.add_product(phi, phi_row, 1, state + column * s.features, s.features);
                tile.store(at<T>(out, item, head, chunk.start + i) + column, out.row, s.head_dim - column);
            }
        });
    });
}

/// Gradients of `attend`. The softmax is computed again, so that the forward pass keeps nothing but its inputs.
/// d_gain: [batch, heads, chunks, 1], the share of each chunk; null if not asked for.
template <class T>
index attend_backward(
    const ChunkSizes& s, Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor features, Tensor retrieved, Tensor gain, Tensor d_q,
    Tensor d_k, Tensor d_v, Tensor d_features, Tensor d_retrieved, Tensor d_gain, T* memory
) {
    const index row = score_row<T>(s.max_keys()), group = s.heads / s.kv_heads;
    const T scale = 1 / std::sqrt(T(s.head_dim));
    // Chunks that overlap add to the gradients of the same keys; then one thread takes all chunks of a head, in order.
    const index together = s.overlap ? s.chunks : 1;
    prefer_huge_pages<T>(d_q.data, s.batch * s.heads * s.time * s.head_dim);
    prefer_huge_pages<T>(d_features.data, s.batch * s.heads * s.time * s.features);
    for (void* data : {d_k.data, d_v.data}) prefer_huge_pages<T>(data, s.batch * s.kv_heads * (s.before + s.time) * s.head_dim);
    const index tasks = s.batch * (s.chunks / together) * s.kv_heads;
    return in_parallel(tasks, s, memory, [&](index task, const Scratch<T> whole) {
        const index kv_head = task % s.kv_heads, item = task / s.kv_heads / (s.chunks / together);
        const index first = together > 1 ? 0 : task / s.kv_heads % s.chunks;
        for (index number = first; number < first + together; ++number) {
            Scratch<T> scratch = whole;
            const Chunk chunk(s, number);
            const bool reads = s.seen + number > 0;
            const T *key = at<T>(k, item, kv_head, chunk.first_key), *value = at<T>(v, item, kv_head, chunk.first_key);
            T* keys_by_dim = scratch.take(s.head_dim * padded<T>(chunk.keys));
            T* values_by_dim = scratch.take(s.head_dim * padded<T>(chunk.keys));
            T* keys = scratch.take(chunk.keys * padded<T>(s.head_dim));
            pack_transposed(key, k.row, s.head_dim, chunk.keys, keys_by_dim);
            pack_transposed(value, v.row, s.head_dim, chunk.keys, values_by_dim);
            pack(key, k.row, chunk.keys, s.head_dim, keys);
            T* state = scratch.take(s.head_dim * padded<T>(s.features));
            T* queries = scratch.take(chunk.length * padded<T>(s.head_dim));
            T* d_outs = scratch.take(chunk.length * padded<T>(s.head_dim));
            T* weights = scratch.take(chunk.length * row);
            T* d_scores = scratch.take(chunk.length * row);
            T* phi_rows = scratch.take(chunk.length * s.features);
            const index phi_stride = s.features + WIDTH<T>;
            T* d_phi_rows = scratch.take(ROWS * phi_stride);

            for (index head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                const T *query = at<T>(q, item, head, chunk.start), *d_rows = at<T>(d_out, item, head, chunk.start);
                const T* mixed = at<T>(retrieved, item, head, number);
                if (reads) {
                    const RetrievalFactors<T> factors(s, gain, head, mixed);
                    pack_transposed(mixed, s.head_dim, s.head_dim, s.features, state);
                    scaled(state, factors.gain * factors.norm, s.head_dim * padded<T>(s.features), state);
                }
                pack(query, q.row, chunk.length, s.head_dim, queries);
                pack(d_rows, d_out.row, chunk.length, s.head_dim, d_outs);
                by_rows(chunk.length, [&](index i, auto m) {
                    const index visible = chunk.seen_before + i + m, wide = padded<T>(visible);
                    T *weight = weights + i * row, *d_score = d_scores + i * row;
                    const T* d_row = d_rows + i * d_out.row;
                    products<T, m()>(query + i * q.row, q.row, keys_by_dim, s.head_dim, visible, weight, row);
                    products<T, m()>(d_row, d_out.row, values_by_dim, s.head_dim, visible, d_score, row);
                    // Zeros reach one panel past the visible keys, because tiles of keys read them.
                    T sums[m()], along[REDUCED<T, m()>];
                    exponentials<T, m()>(weight, row, visible - m + 1, wide + WIDTH<T>, scale, sums);
                    const index end = panels(visible, LANES<T>) * LANES<T>;
                    Vector<T> products_of_row[m()];
                    for (int a = 0; a < m; ++a) {
                        T *p = weight + a * row, *d = d_score + a * row;
                        const T inverse_sum = 1 / sums[a];
                        Vector<T> sum{};
                        for (index j = 0; j < end; j += LANES<T>) sum += (vector(p + j) *= inverse_sum) * vector(d + j);
                        products_of_row[a] = sum;
                    }
                    reduce_rows<T, m()>(products_of_row, along, [](Vector<T> a, Vector<T> b) { return a + b; });
                    for (int a = 0; a < m; ++a) {
                        T *p = weight + a * row, *d = d_score + a * row;
                        index j = 0;
                        for (; j < end; j += LANES<T>) vector(d + j) = vector(p + j) * (vector(d + j) - along[a]) * scale;
                        for (; j < wide + WIDTH<T>; j += LANES<T>) vector(d + j) = Vector<T>{};
                    }

                    // Gradients of φ(Q), and through it of Q.
                    T* d_query = at<T>(d_q, item, head, chunk.start + i);
                    T inverse[ROWS];
                    for (int a = 0; a < m && reads; ++a) {
                        const T* phi = features.data ? at<T>(features, item, head, chunk.start + i + a) : query + (i + a) * q.row;
                        inverse[a] = features.data ? T(1) : inverse_norm(phi, s.features);
                        scaled(phi, inverse[a], s.features, phi_rows + (i + a) * s.features);
                    }
                    for (index column = 0; column < s.features && reads; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(d_row, d_out.row, 1, state + column * s.head_dim, s.head_dim);
                        tile.store(d_phi_rows + column, phi_stride, WIDTH<T>);
                    }
                    for (int a = 0; a < m; ++a) {
                        T *d_phi = d_phi_rows + a * phi_stride, *to = d_query + a * d_q.row;
                        if (!reads) std::fill_n(d_phi, s.features, T(0));
                        if (features.data) std::copy_n(d_phi, s.features, at<T>(d_features, item, head, chunk.start + i + a));
                        if (features.data || !reads) std::fill_n(to, s.head_dim, T(0));
                        else unit_norm_backward(d_phi, phi_rows + (i + a) * s.features, inverse[a], s.features, to);
                    }
                    for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(d_score, row, 1, keys + column * chunk.keys, visible);
                        tile.store(d_query + column, d_q.row, s.head_dim - column, true);
                    }
                });
                // Gradients of keys and values, from the rows that see them.
                const bool add = s.overlap || head % group;
                by_rows(chunk.keys, [&](index j, auto m) {
                    const index from = std::max<index>(0, j - chunk.seen_before), rows = chunk.length - from;
                    for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                        const index packed = column * chunk.length + from * WIDTH<T>;
                        Tile<T, m()> by_key;
                        by_key.add_product(d_scores + from * row + j, 1, row, queries + packed, rows);
                        by_key.store(at<T>(d_k, item, kv_head, chunk.first_key + j) + column, d_k.row, s.head_dim - column, add);
                        Tile<T, m()> by_value;
                        by_value.add_product(weights + from * row + j, 1, row, d_outs + packed, rows);
                        by_value.store(at<T>(d_v, item, kv_head, chunk.first_key + j) + column, d_v.row, s.head_dim - column, add);
                    }
                });
                T* d_state = at<T>(d_retrieved, item, head, number);
                if (!reads) std::fill_n(d_state, s.features * s.head_dim, T(0));
                by_rows(reads ? s.features : 0, [&](index f, auto m) {
                    for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(phi_rows + f, 1, s.features, d_outs + column * chunk.length, chunk.length);
                        tile.store(d_state + f * s.head_dim + column, s.head_dim, s.head_dim - column);
                    }
                });
                T along = 0;
                if (reads) along = RetrievalFactors<T>(s, gain, head, mixed).backward(mixed, d_state, s.features * s.head_dim);
                if (d_gain.data) *at<T>(d_gain, item, head, number) = along;
            }
        }
    });
}

}  // namespace
