// BSBR on a CPU, one chunk of one head at a time: all that a chunk needs stays in the cache of one core, every product runs in
// registers, and only results go to memory. build.py compiles this file; operators.py documents its functions.

#include "tensors.h"

namespace {

constexpr index DEPTH = 256, COLUMNS = 128;  // of the states packed at once: they fit a core's L2 cache, and one panel its L1

/// The distance between rows of scores; it leaves room for a panel of zeros after the keys.
template <class T>
index score_row(index keys) {
    return padded<T>(keys) + 2 * WIDTH<T>;
}

/// Sizes of a function that works on tokens, chunk by chunk. before: rows of k and v before the first row of q. features: d_r.
/// unit_norm: whether φ is the unit norm of what is passed as keys.
struct ChunkSizes {
    std::int64_t batch, heads, kv_heads, time, before, chunk_size, overlap, chunks, head_dim, features, unit_norm, threads;

    /// The most keys that a chunk attends to.
    index max_keys() const { return std::min(chunk_size, time) + overlap; }

    /// Of the most demanding function.
    template <class T>
    index scratch_size() const {
        const index keys = padded<T>(max_keys()), dim = padded<T>(std::max(head_dim, features));
        return 6 * keys * dim + dim * dim + 2 * keys * score_row<T>(keys) + 3 * ROWS * score_row<T>(std::max(keys, dim));
    }
};

/// Sizes of retrieval from `chunks` states by `rows` chunks, of which row i sees the first `seen` + i. size: numbers of a state,
/// or how many chunks are selected. add: whether results are added to what is there.
struct RetrievalSizes {
    std::int64_t batch, heads, kv_heads, rows, chunks, seen, size, add, threads;

    template <class T>
    index scratch_size() const {
        return std::max<index>(DEPTH * COLUMNS, panels(size, 16) * 16);
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

// --- states of chunks ---------------------------------------------------------------------------

/// F_s = φ(K_s)ᵀ V_s of every chunk; φ(k) is the key or its unit norm.
template <class T>
index chunk_states(const ChunkSizes& s, Tensor keys, Tensor v, Tensor states, T* memory) {
    const index depth = s.chunk_size;
    return in_parallel(s.batch * s.chunks * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index head = task % s.kv_heads, chunk = task / s.kv_heads % s.chunks, item = task / s.kv_heads / s.chunks;
        const T* key = at<T>(keys, item, head, chunk * depth);
        // Blocks of ROWS features, each [token, ROWS]: what a tile reads together is stored together.
        T* blocks = scratch.take((s.features + ROWS) * depth);
        T* line = scratch.take(s.features + ROWS);
        for (index token = 0; token < depth; ++token) {
            const T* row = key + token * keys.row;
            fetch(row + AHEAD * keys.row, s.features);
            scaled(row, s.unit_norm ? inverse_norm(row, s.features) : T(1), s.features, line);
            for (index f = 0; f < s.features; f += ROWS)
                std::memcpy(blocks + f * depth + token * ROWS, line + f, ROWS * sizeof(T));
        }
        T* values = scratch.take(depth * padded<T>(s.head_dim));
        pack(at<T>(v, item, head, chunk * depth), v.row, depth, s.head_dim, values);
        T* state = at<T>(states, item, head, chunk);
        for (index column = 0; column < s.head_dim; column += WIDTH<T>)
            by_rows(s.features, [&](index f, auto m) {
                Tile<T, m()> tile;
                tile.add_product(blocks + f / ROWS * ROWS * depth + f % ROWS, 1, ROWS, values + column * depth, depth);
                tile.store(state + f * s.head_dim + column, s.head_dim, s.head_dim - column);
            });
    });
}

/// Gradients of keys and values, from that of the states.
template <class T>
index chunk_states_backward(const ChunkSizes& s, Tensor keys, Tensor v, Tensor d_states, Tensor d_keys, Tensor d_v, T* memory) {
    const index row = s.features + WIDTH<T>;
    return in_parallel(s.batch * s.chunks * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index head = task % s.kv_heads, chunk = task / s.kv_heads % s.chunks, item = task / s.kv_heads / s.chunks;
        const index start = chunk * s.chunk_size;
        const T *key = at<T>(keys, item, head, start), *value = at<T>(v, item, head, start);
        T *d_key = at<T>(d_keys, item, head, start), *d_value = at<T>(d_v, item, head, start);
        const T* d_state = at<T>(d_states, item, head, chunk);
        T* by_feature = scratch.take(s.features * padded<T>(s.head_dim));
        T* by_dim = scratch.take(s.head_dim * padded<T>(s.features));
        pack(d_state, s.head_dim, s.features, s.head_dim, by_feature);
        pack_transposed(d_state, s.head_dim, s.head_dim, s.features, by_dim);
        T* stored = scratch.take(ROWS * row);
        T* gradient = scratch.take(ROWS * row);
        by_rows(s.chunk_size, [&](index i, auto m) {
            T inverse[ROWS];
            for (int a = 0; a < m; ++a) {
                const T* from = key + (i + a) * keys.row;
                inverse[a] = s.unit_norm ? inverse_norm(from, s.features) : T(1);
                scaled(from, inverse[a], s.features, stored + a * row);
            }
            for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                Tile<T, m()> tile;
                tile.add_product(stored, row, 1, by_feature + column * s.features, s.features);
                tile.store(d_value + i * d_v.row + column, d_v.row, s.head_dim - column);
            }
            for (index column = 0; column < s.features; column += WIDTH<T>) {
                Tile<T, m()> tile;
                tile.add_product(value + i * v.row, v.row, 1, by_dim + column * s.head_dim, s.head_dim);
                tile.store(gradient + column, row, WIDTH<T>);
            }
            for (int a = 0; a < m; ++a) {
                T* to = d_key + (i + a) * d_keys.row;
                if (s.unit_norm) unit_norm_backward(gradient + a * row, stored + a * row, inverse[a], s.features, to);
                else std::copy(gradient + a * row, gradient + a * row + s.features, to);
            }
        });
    });
}

// --- the delta rule -----------------------------------------------------------------------------

/// Products of rows [M, size], `stride` elements stride, with the packed columns of the panels from `first` on, up to `last`.
template <class T, int M>
void products(const T* rows, index stride, const T* packed, index size, index first, index last, T* to, index to_row) {
    for (index column = first / WIDTH<T> * WIDTH<T>; column < last; column += WIDTH<T>) {
        Tile<T, M> tile;
        tile.add_product(rows, stride, 1, packed + column * size, size);
        tile.store(to + column, to_row, WIDTH<T>);
    }
}

/// Solves (I + L) X = x in place, x packed [count, dim], with L = tril(diag(rates) K K^T, -1), or, if `scale_columns`,
/// L = tril(K K^T diag(rates), -1). The latter, with rows in reversed order, is the system of the gradients.
template <class T>
void substitute(
    const T* key, index stride, const T* rates, bool scale_columns, index count, index features, index dim, const T* packed_keys,
    T* weights, T* x
) {
    const index row = score_row<T>(count);
    by_rows(count, [&](index i, auto m) {
        products<T, m()>(key + i * stride, stride, packed_keys, features, 0, i + m, weights, row);
        for (int a = 0; a < m; ++a)
            for (index j = 0; j < i + a; ++j) weights[a * row + j] *= -rates[scale_columns ? j : i + a];
        for (index column = 0; column < dim; column += WIDTH<T>) {
            T* panel = x + column * count;
            Tile<T, m()> tile;
            tile.add_product(weights, row, 1, panel, i);
            tile.store(panel + i * WIDTH<T>, WIDTH<T>, WIDTH<T>, true);
            for (int a = 1; a < m; ++a) {
                T* own = panel + (i + a) * WIDTH<T>;
                for (int b = 0; b < a; ++b) {
                    const T *other = panel + (i + b) * WIDTH<T>, weight = weights[a * row + i + b];
                    vector(own) += weight * vector(other);
                    vector(own + LANES<T>) += weight * vector(other + LANES<T>);
                }
            }
            operations += m * (m - 1) * WIDTH<T>;
        }
    });
}

/// Pseudo-values U of the delta rule, (I + L) U = diag(beta) V, of every chunk.
template <class T>
index pseudo_values(const ChunkSizes& s, Tensor keys, Tensor v, Tensor beta, Tensor pseudo, T* memory) {
    const index count = s.chunk_size;
    return in_parallel(s.batch * s.chunks * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index head = task % s.kv_heads, chunk = task / s.kv_heads % s.chunks, item = task / s.kv_heads / s.chunks;
        const index start = chunk * count;
        const T* key = at<T>(keys, item, head, start);
        T* packed_keys = scratch.take(s.features * padded<T>(count));
        pack_transposed(key, keys.row, s.features, count, packed_keys);
        T* rates = scratch.take(count);
        T* x = scratch.take(count * padded<T>(s.head_dim));
        pack(at<T>(v, item, head, start), v.row, count, s.head_dim, x);
        for (index i = 0; i < count; ++i) {
            rates[i] = *at<T>(beta, item, head, start + i);
            for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                T* own = x + column * count + i * WIDTH<T>;
                scaled(own, rates[i], WIDTH<T>, own);
            }
        }
        T* weights = scratch.take(ROWS * score_row<T>(count));
        substitute(key, keys.row, rates, false, count, s.features, s.head_dim, packed_keys, weights, x);
        unpack(x, count, s.head_dim, at<T>(pseudo, item, head, start), pseudo.row);
    });
}

/// With W = (I + L)^-T dU: dV = diag(beta) W, dL = -tril(W U^T, -1), and the gradients of beta and K follow from dL.
template <class T>
index pseudo_values_backward(
    const ChunkSizes& s, Tensor keys, Tensor v, Tensor beta, Tensor pseudo, Tensor gradient, Tensor d_keys, Tensor d_v,
    Tensor d_beta, T* memory
) {
    const index count = s.chunk_size, dim = s.head_dim, row = score_row<T>(count);
    return in_parallel(s.batch * s.chunks * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index head = task % s.kv_heads, chunk = task / s.kv_heads % s.chunks, item = task / s.kv_heads / s.chunks;
        const index start = chunk * count, last = start + count - 1;
        const T *key = at<T>(keys, item, head, start), *last_key = at<T>(keys, item, head, last);
        const T *value = at<T>(v, item, head, start), *u = at<T>(pseudo, item, head, start);
        T* packed_keys = scratch.take(s.features * padded<T>(count));
        T *rates = scratch.take(count), *x = scratch.take(count * padded<T>(dim)), *weights = scratch.take(ROWS * row);
        for (index i = 0; i < count; ++i) rates[i] = *at<T>(beta, item, head, last - i);
        pack_transposed(last_key, -keys.row, s.features, count, packed_keys);
        pack(at<T>(gradient, item, head, last), -gradient.row, count, dim, x);
        substitute(last_key, -keys.row, rates, true, count, s.features, dim, packed_keys, weights, x);
        std::reverse(rates, rates + count);
        T* w = scratch.take(count * dim);
        unpack(x, count, dim, w + (count - 1) * dim, -dim);

        pack_transposed(key, keys.row, s.features, count, packed_keys);
        T* u_by_column = scratch.take(dim * padded<T>(count));
        T* w_by_column = scratch.take(dim * padded<T>(count));
        pack_transposed(u, pseudo.row, dim, count, u_by_column);
        pack_transposed(w, dim, dim, count, w_by_column);
        T* keys_by_row = scratch.take(count * padded<T>(s.features));
        pack(key, keys.row, count, s.features, keys_by_row);
        T *before = scratch.take(ROWS * row), *after = scratch.take(ROWS * row);
        by_rows(count, [&](index i, auto m) {
            products<T, m()>(key + i * keys.row, keys.row, packed_keys, s.features, 0, i + m, weights, row);
            products<T, m()>(w + i * dim, dim, u_by_column, dim, 0, i + m, before, row);
            products<T, m()>(u + i * pseudo.row, pseudo.row, w_by_column, dim, i, count, after, row);
            for (int a = 0; a < m; ++a) {
                T *earlier = before + a * row, *later = after + a * row;
                const T* own = w + (i + a) * dim;
                scaled(own, rates[i + a], dim, at<T>(d_v, item, head, start + i + a));
                *at<T>(d_beta, item, head, start + i + a) =
                    dot(own, value + (i + a) * v.row, dim) - dot(earlier, weights + a * row, i + a);
                for (index j = 0; j < i + a; ++j) earlier[j] *= -rates[i + a];
                earlier[i + a] = 0;
                for (index j = i + a + 1; j < count; ++j) earlier[j] = later[j] * -rates[j];
            }
            for (index column = 0; column < s.features; column += WIDTH<T>) {
                Tile<T, m()> tile;
                tile.add_product(before, row, 1, keys_by_row + column * count, count);
                tile.store(at<T>(d_keys, item, head, start + i) + column, d_keys.row, s.features - column);
            }
        });
    });
}

// --- retrieval ----------------------------------------------------------------------------------

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

/// Σ_s weights[s] states[s] of each row, over the chunks that it sees.
template <class T>
index mix_states(const RetrievalSizes& s, Tensor weights, Tensor states, Tensor mixed, T* memory) {
    const index group = s.heads / s.kv_heads, parts = panels(s.size, COLUMNS);
    return in_parallel(s.batch * s.kv_heads * parts, s, memory, [&](index task, Scratch<T> scratch) {
        const index first = task % parts * COLUMNS, kv_head = task / parts % s.kv_heads, item = task / parts / s.kv_heads;
        const index columns = std::min<index>(COLUMNS, s.size - first);
        T* packed = scratch.take(DEPTH * COLUMNS);
        for (index start = 0; start < s.chunks; start += DEPTH) {
            const index depth = std::min<index>(DEPTH, s.chunks - start);
            pack(at<T>(states, item, kv_head, start) + first, states.row, depth, columns, packed);
            for (index head = kv_head * group; head < (kv_head + 1) * group; ++head)
                by_rows(s.rows, [&](index i, auto m) {
                    // Each row sees one chunk more than the row before. The weights of what a row's tile sees beyond that are 0.
                    const index visible = std::clamp<index>(visible_chunks(s, i + m - 1) - start, 0, depth);
                    if (visible == 0 && (s.add || start)) return;
                    const T* weight = at<T>(weights, item, head, i) + start;
                    for (index column = 0; column < columns; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(weight, weights.row, 1, packed + column * depth, visible);
                        tile.store(at<T>(mixed, item, head, i) + first + column, mixed.row, columns - column, s.add || start);
                    }
                });
        }
    });
}

// --- features -----------------------------------------------------------------------------------

/// Calls body(item, head, token, unit, inverse, room) for all tokens of all heads. unit: the token's numbers scaled by `inverse`
/// to unit norm, twice in a row. room: scratch for as many numbers and for all features.
template <class T, class Body>
index for_each_unit_row(const FeatureSizes& s, const Tensor& x, T* memory, Body&& body) {
    constexpr index TOKENS = 64;  // tokens in a task
    const index blocks = panels(s.time, TOKENS);
    return in_parallel(s.batch * blocks, s, memory, [&](index task, Scratch<T> scratch) {
        T* unit = scratch.take(2 * s.factors + LANES<T>);
        T* room = scratch.take(2 * s.factors + s.size + 2 * LANES<T>);
        std::fill_n(unit, 2 * s.factors + LANES<T>, T(0));
        const index item = task / blocks, start = task % blocks * TOKENS;
        for (index token = start; token < std::min<index>(s.time, start + TOKENS); ++token)
            for (index head = 0; head < s.heads; ++head) {
                const T* row = at<T>(x, item, head, token);
                const T inverse = inverse_norm(row, s.factors);
                scaled(row, inverse, s.factors, unit);
                std::memcpy(unit + s.factors, unit, s.factors * sizeof(T));
                body(item, head, token, unit, inverse, room);
            }
    });
}

/// The weight of x_i x_j: √2 if i and j differ, as x_i x_j and x_j x_i are one feature; else 1.
template <class T>
T weight(bool differ) {
    return differ ? std::sqrt(T(2)) : T(1);
}

/// Products of the unit vector's numbers i and i + step, for step = 0, 1, …, in this order.
template <class T>
index quadratic_features(const FeatureSizes& s, Tensor x, Tensor features, T* memory) {
    return for_each_unit_row(s, x, memory, [&](index item, index head, index token, const T* unit, T, T* line) {
        // In whole vectors. What they write past the end of their step is overwritten by the next step.
        for (index step = 0; step * s.factors < s.size; ++step) {
            const T factor = weight<T>(step);
            for (index i = 0; i < s.factors; i += LANES<T>)
                vector(line + step * s.factors + i) = vector(unit + i) * vector(unit + step + i) * factor;
        }
        std::memcpy(at<T>(features, item, head, token), line, s.size * sizeof(T));
    });
}

/// Gradient of `quadratic_features` with respect to x.
template <class T>
index quadratic_features_backward(const FeatureSizes& s, Tensor d_features, Tensor x, Tensor d_x, T* memory) {
    return for_each_unit_row(s, x, memory, [&](index item, index head, index token, const T* unit, T inverse, T* d_unit) {
        const T* from = at<T>(d_features, item, head, token);
        std::fill_n(d_unit, 2 * s.factors, T(0));
        for (index step = 0; step * s.factors < s.size; ++step) {
            const T factor = weight<T>(step);
            const index first = step * s.factors, length = std::min<index>(s.factors, s.size - first);
            for (index i = 0; i < length; ++i) {
                d_unit[i] += factor * from[first + i] * unit[step + i];
                d_unit[step + i] += factor * from[first + i] * unit[i];
            }
        }
        for (index i = 0; i < s.factors; ++i) d_unit[i] += d_unit[s.factors + i];
        unit_norm_backward(d_unit, unit, inverse, s.factors, at<T>(d_x, item, head, token));
    });
}

// --- output -------------------------------------------------------------------------------------

/// Scores of M queries, `row` elements stride, with at least the first `visible` keys.
template <class T, int M>
void score(const T* query, index row, const T* keys, index head_dim, T scale, index visible, T* scores, index score_row) {
    T factors[M];
    std::fill(factors, factors + M, scale);
    for (index column = 0; column < visible; column += WIDTH<T>) {
        Tile<T, M> tile;
        tile.add_product(query, row, 1, keys + column * head_dim, head_dim);
        tile.scale_rows(factors);
        tile.store(scores + column, score_row, WIDTH<T>);
    }
}

/// softmax(QKᵀ/√d ⊙ M_in) V + φ(Q) F̄. The division by the softmax's sum comes last, so the read-out is first scaled up by it.
template <class T>
index attend(const ChunkSizes& s, Tensor q, Tensor k, Tensor v, Tensor features, Tensor retrieved, Tensor out, T* memory) {
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
        pack(at<T>(retrieved, item, head, number), s.head_dim, s.features, s.head_dim, state);
        T* scores = scratch.take(ROWS * row);
        T* phi_rows = scratch.take(ROWS * s.features);
        const Tensor& source = features.data ? features : q;
        by_rows(chunk.length, [&](index i, auto m) {
            const T* query = at<T>(q, item, head, chunk.start + i);
            const index visible = chunk.seen_before + i + m, wide = padded<T>(visible);
            for (int a = 0; a < m; ++a) fetch(query + (a + m) * q.row, s.head_dim);
            score<T, m()>(query, q.row, keys, s.head_dim, scale, visible, scores, row);
            T sum[ROWS], inverse_sum[ROWS];
            for (int a = 0; a < m; ++a) {
                sum[a] = exponentials(scores + a * row, visible - m + a + 1, wide);
                inverse_sum[a] = 1 / sum[a];
                const T* phi = at<T>(source, item, head, chunk.start + i + a);
                const T factor = features.data ? T(1) : inverse_norm(phi, s.features);
                scaled(phi, factor, s.features, phi_rows + a * s.features);
            }
            for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                Tile<T, m()> tile;
                tile.add_product(phi_rows, s.features, 1, state + column * s.features, s.features);
                tile.scale_rows(sum);
                tile.add_product(scores, row, 1, values + column * chunk.keys, visible);
                tile.scale_rows(inverse_sum);
                tile.store(at<T>(out, item, head, chunk.start + i) + column, out.row, s.head_dim - column);
            }
        });
    });
}

/// Gradients of `attend`. The softmax is computed again, so that the forward pass keeps nothing but its inputs.
template <class T>
index attend_backward(
    const ChunkSizes& s, Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor features, Tensor retrieved, Tensor d_q, Tensor d_k,
    Tensor d_v, Tensor d_features, Tensor d_retrieved, T* memory
) {
    const index row = score_row<T>(s.max_keys()), group = s.heads / s.kv_heads;
    const T scale = 1 / std::sqrt(T(s.head_dim));
    // Chunks that overlap add to the gradients of the same keys; then one thread takes all chunks of a head, in order.
    const index together = s.overlap ? s.chunks : 1;
    return in_parallel(s.batch * (s.chunks / together) * s.kv_heads, s, memory, [&](index task, const Scratch<T> whole) {
        const index kv_head = task % s.kv_heads, item = task / s.kv_heads / (s.chunks / together);
        const index first = together > 1 ? 0 : task / s.kv_heads % s.chunks;
        for (index number = first; number < first + together; ++number) {
            Scratch<T> scratch = whole;
            const Chunk chunk(s, number);
            const index key_row = k.row, value_row = v.row;
            const T *key = at<T>(k, item, kv_head, chunk.first_key), *value = at<T>(v, item, kv_head, chunk.first_key);
            T* keys_by_dim = scratch.take(s.head_dim * padded<T>(chunk.keys));
            T* values_by_dim = scratch.take(s.head_dim * padded<T>(chunk.keys));
            T* keys = scratch.take(chunk.keys * padded<T>(s.head_dim));
            pack_transposed(key, key_row, s.head_dim, chunk.keys, keys_by_dim);
            pack_transposed(value, value_row, s.head_dim, chunk.keys, values_by_dim);
            pack(key, key_row, chunk.keys, s.head_dim, keys);
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
                pack_transposed(at<T>(retrieved, item, head, number), s.head_dim, s.head_dim, s.features, state);
                pack(query, q.row, chunk.length, s.head_dim, queries);
                pack(d_rows, d_out.row, chunk.length, s.head_dim, d_outs);
                by_rows(chunk.length, [&](index i, auto m) {
                    const index visible = chunk.seen_before + i + m, wide = padded<T>(visible);
                    T *weight = weights + i * row, *d_score = d_scores + i * row;
                    const T* d_row = d_rows + i * d_out.row;
                    score<T, m()>(query + i * q.row, q.row, keys_by_dim, s.head_dim, scale, visible, weight, row);
                    score<T, m()>(d_row, d_out.row, values_by_dim, s.head_dim, T(1), visible, d_score, row);
                    for (int a = 0; a < m; ++a) {
                        // Zeros reach one panel past the visible keys, because tiles of keys read them.
                        T *p = weight + a * row, *d = d_score + a * row;
                        const T inverse_sum = 1 / exponentials(p, visible - m + a + 1, wide + WIDTH<T>);
                        std::fill(d + wide, d + wide + WIDTH<T>, T(0));
                        for (index j = 0; j < wide; j += LANES<T>) vector(p + j) *= inverse_sum;
                        const T along = dot(p, d, wide);
                        for (index j = 0; j < wide; j += LANES<T>) vector(d + j) = vector(p + j) * (vector(d + j) - along) * scale;
                    }

                    // Gradients of φ(Q), and through it of Q.
                    T inverse[ROWS];
                    for (int a = 0; a < m; ++a) {
                        const T* phi = features.data ? at<T>(features, item, head, chunk.start + i + a) : query + (i + a) * q.row;
                        inverse[a] = features.data ? T(1) : inverse_norm(phi, s.features);
                        scaled(phi, inverse[a], s.features, phi_rows + (i + a) * s.features);
                    }
                    for (index column = 0; column < s.features; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(d_row, d_out.row, 1, state + column * s.head_dim, s.head_dim);
                        tile.store(d_phi_rows + column, phi_stride, WIDTH<T>);
                    }
                    T* d_query = at<T>(d_q, item, head, chunk.start + i);
                    for (int a = 0; a < m; ++a) {
                        const T* d_phi = d_phi_rows + a * phi_stride;
                        if (features.data) {
                            std::copy(d_phi, d_phi + s.features, at<T>(d_features, item, head, chunk.start + i + a));
                            std::fill(d_query + a * d_q.row, d_query + a * d_q.row + s.head_dim, T(0));
                        } else {
                            unit_norm_backward(d_phi, phi_rows + (i + a) * s.features, inverse[a], s.features, d_query + a * d_q.row);
                        }
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
                        Tile<T, m()> by_key, by_value;
                        by_key.add_product(d_scores + from * row + j, 1, row, queries + packed, rows);
                        by_key.store(at<T>(d_k, item, kv_head, chunk.first_key + j) + column, d_k.row, s.head_dim - column, add);
                        by_value.add_product(weights + from * row + j, 1, row, d_outs + packed, rows);
                        by_value.store(at<T>(d_v, item, kv_head, chunk.first_key + j) + column, d_v.row, s.head_dim - column, add);
                    }
                });
                T* d_state = at<T>(d_retrieved, item, head, number);
                by_rows(s.features, [&](index f, auto m) {
                    for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(phi_rows + f, 1, s.features, d_outs + column * chunk.length, chunk.length);
                        tile.store(d_state + f * s.head_dim + column, s.head_dim, s.head_dim - column);
                    }
                });
            }
        }
    });
}

}  // namespace

#define FUNCTIONS(TYPE, T)                                                                                            \
    FUNCTION(chunk_states, ChunkSizes, TYPE, T, x[0], x[1], x[2])                                                     \
    FUNCTION(chunk_states_backward, ChunkSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4])                                \
    FUNCTION(pseudo_values, ChunkSizes, TYPE, T, x[0], x[1], x[2], x[3])                                              \
    FUNCTION(pseudo_values_backward, ChunkSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7])             \
    FUNCTION(select_top_k, RetrievalSizes, TYPE, T, x[0], x[1])                                                       \
    FUNCTION(mix_states, RetrievalSizes, TYPE, T, x[0], x[1], x[2])                                                   \
    FUNCTION(quadratic_features, FeatureSizes, TYPE, T, x[0], x[1])                                                   \
    FUNCTION(quadratic_features_backward, FeatureSizes, TYPE, T, x[0], x[1], x[2])                                    \
    FUNCTION(attend, ChunkSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5])                                         \
    FUNCTION(attend_backward, ChunkSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10])
extern "C" {
FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
}
