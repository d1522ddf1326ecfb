// Linear attention on a CPU: one key head at a time, chunk by chunk, with the state S [head_dim, value_dim] and z in the cache.
// linear.py documents the functions.

#include "tensors.h"

namespace {

constexpr index MAX_HEADS = 8;

/// Sizes of all functions. Without a state before the first chunk, nothing reads the state there.
struct Sizes {
    std::int64_t batch, heads, kv_heads, time, chunk_size, head_dim, value_dim, threads;

    index chunk() const { return std::min(chunk_size, time); }
    index chunks() const { return (time + chunk_size - 1) / chunk_size; }
    index group() const { return heads / kv_heads; }

    /// Columns of the state: the values', and z.
    index columns() const { return value_dim + 1; }

    /// Distances between rows in scratch memory: of scores, whose columns must not fall into the same lines of the cache, of
    /// features, and of values with a one.
    template <class T>
    index score_row() const {
        return padded<T>(chunk()) + LANES<T>;
    }
    template <class T>
    index feature_row() const {
        return padded<T>(head_dim);
    }
    template <class T>
    index value_row() const {
        return padded<T>(columns());
    }

    /// Key heads that a task takes together, chunk by chunk: heads of a token lie side by side in memory, and alone each of them
    /// is too short for the processor's prefetcher. Their states still fit into a core's L2 cache.
    index together() const { return std::clamp<index>(batch * kv_heads / threads, 1, std::min<index>(kv_heads, MAX_HEADS)); }
    index head_tasks() const { return (kv_heads + together() - 1) / together(); }

    /// Of the most demanding function, the gradients.
    template <class T>
    index scratch_size() const {
        const index features = feature_row<T>(), values = value_row<T>(), tokens = std::max<index>(padded<T>(chunk()), ROWS);
        const index rows = tokens * (6 * features + 4 * values + 2 * score_row<T>());
        return panels(rows + (together() + 1) * (features * values + features) + 16 * (16 + 2 * together()), 16) * 16;
    }
};

/// phi(x) = elu(x) + 1. Other than that sum, this keeps its digits for very negative x.
template <class T>
Vector<T> feature(Vector<T> x) {
    const Vector<T> zero{};
    return x < zero ? exponential(x < zero ? x : zero) : x + T(1);
}

/// to = phi(x), and zeros from `size` to the next panel.
template <class T>
void features(const T* x, index size, T* to) {
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) vector(to + i) = feature<T>(vector(x + i));
    if (i < size) {
        T rest[LANES<T>] = {};
        std::copy(x + i, x + size, rest);
        vector(rest) = feature<T>(vector(rest));
        std::copy(rest, rest + size - i, to + i);
    }
    std::fill(to + size, to + padded<T>(size), T(0));
}

/// phi of the rows of a chunk.
template <class T>
void feature_rows(const Tensor& x, index item, index head, index start, index length, index size, T* to, index row) {
    for (index i = 0; i < length; ++i) {
        const T* from = at<T>(x, item, head, start + i);
        fetch(from + AHEAD * x.row, size);
        features(from, size, to + i * row);
    }
}

/// Gradient of x from that of phi(x): phi' is e^x below 0, which is phi, and 1 above.
template <class T>
void features_backward(const T* gradient, const T* phi, index size, T* to) {
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) {
        const Vector<T> value = vector(phi + i);
        vector(to + i) = vector(gradient + i) * (value < T(1) ? value : Vector<T>{} + T(1));
    }
    for (; i < size; ++i) to[i] = gradient[i] * (phi[i] < 1 ? phi[i] : T(1));
}

/// to += sum of rows [length, size].
template <class T>
void add_rows(const T* rows, index row, index length, index size, T* to) {
    for (index i = 0; i < length; ++i)
        for (index f = 0; f < size; f += LANES<T>) vector(to + f) += vector(rows + i * row + f);
}

/// packed += left^T right over `length` tokens: left [length, rows], right packed [length, columns], packed [depth >= rows, columns].
template <class T>
void add_outer(const T* left, index left_row, index rows, const T* right, index length, index columns, T* packed, index depth) {
    for (index column = 0; column < columns; column += WIDTH<T>)
        by_rows(rows, [&](index f, auto m) {
            Tile<T, m()> tile;
            tile.add_product(left + f, 1, left_row, right + column * length, length);
            tile.store(packed + column * depth + f * WIDTH<T>, WIDTH<T>, WIDTH<T>, true);
        });
}

/// Products of rows i … i + M with the packed keys up to their own, plus a number of each row; zeros up to the end of the last panel.
template <class T, int M>
void causal_scores(
    const T* query, index row, const T* keys, index size, index i, const T* plus, T* scores, index score_row
) {
    for (index column = 0; column < i + M; column += WIDTH<T>) {
        Tile<T, M> tile;
        if (plus)
#pragma GCC unroll 16
            for (int a = 0; a < M; ++a) tile.sum[a][0] = tile.sum[a][1] = Vector<T>{} + plus[a * row];
        tile.add_product(query, row, 1, keys + column * size, size);
        tile.store(scores + column, score_row, WIDTH<T>);
    }
    for (int a = 0; a < M; ++a) std::fill(scores + a * score_row + i + a + 1, scores + a * score_row + padded<T>(i + M), T(0));
}

/// The outputs and normalisers of all tokens, and the state after them if `final` is given. `epsilon` is one number.
///
/// With fewer heads than threads, a task computes some panels of a head's value columns; each of them computes the scores.
template <class T>
index forward(
    const Sizes& s, Tensor q, Tensor k, Tensor v, Tensor initial, Tensor out, Tensor normaliser, Tensor final, Tensor epsilon, T* memory
) {
    const index tasks = s.batch * s.head_tasks(), all = panels(s.value_dim, WIDTH<T>), parts = std::min(all, panels(s.threads, tasks));
    const index row = s.score_row<T>(), dim = s.feature_row<T>();
    return in_parallel(tasks * parts, s, memory, [&](index task, Scratch<T> scratch) {
        const index part = task % parts, first_head = task / parts % s.head_tasks() * s.together(), item = task / parts / s.head_tasks();
        const index heads = std::min(s.together(), s.kv_heads - first_head);
        const index first = part * all / parts * WIDTH<T>, stop = (part + 1) * all / parts * WIDTH<T>;
        const index columns = std::min<index>(s.value_dim, stop) - first;
        const index state_size = s.head_dim * padded<T>(columns);
        T *states = scratch.take(heads * state_size), *normals = scratch.take(heads * dim);
        T *key_rows = scratch.take(s.chunk() * dim), *keys = scratch.take(s.head_dim * padded<T>(s.chunk()));
        T *values = scratch.take(s.chunk() * padded<T>(columns)), *scores = scratch.take(ROWS * row), *queries = scratch.take(ROWS * dim);
        std::fill_n(normals, heads * dim, T(0));
        std::fill_n(states, heads * state_size, T(0));
        if (initial.data)
            for (index h = 0; h < heads; ++h) {
                pack(at<T>(initial, item, first_head + h, 0) + first, initial.row, s.head_dim, columns, states + h * state_size);
                for (index f = 0; f < s.head_dim; ++f) normals[h * dim + f] = at<T>(initial, item, first_head + h, f)[s.value_dim];
            }
        for (index start = 0; start < s.time; start += s.chunk_size)
            for (index h = 0; h < heads; ++h) {
                const index kv_head = first_head + h, length = std::min<index>(s.chunk_size, s.time - start);
                const bool read = initial.data || start, write = final.data || start + length < s.time;
                T *state = states + h * state_size, *z = normals + h * dim;
                feature_rows(k, item, kv_head, start, length, s.head_dim, key_rows, dim);
                pack_transposed(key_rows, dim, s.head_dim, length, keys);
                pack(at<T>(v, item, kv_head, start) + first, v.row, length, columns, values);
                for (index head = kv_head * s.group(); head < (kv_head + 1) * s.group(); ++head)
                    by_rows(length, [&](index i, auto m) {
                        feature_rows(q, item, head, start + i, m, s.head_dim, queries, dim);
                        causal_scores<T, m()>(queries, dim, keys, s.head_dim, i, nullptr, scores, row);
                        Vector<T> sums[m()];
                        T normal[REDUCED<T, m()>], inverse[m()];
                        for (int a = 0; a < m; ++a) {
                            sums[a] = Vector<T>{};
                            for (index f = 0; f < s.head_dim; f += LANES<T>) sums[a] += vector(queries + a * dim + f) * vector(z + f);
                            for (index j = 0; j < i + m; j += LANES<T>) sums[a] += vector(scores + a * row + j);
                        }
                        reduce_rows<T, m()>(sums, normal, [](Vector<T> a, Vector<T> b) { return a + b; });
                        for (int a = 0; a < m; ++a) {
                            normal[a] += *static_cast<T*>(epsilon.data);
                            inverse[a] = 1 / normal[a];
                            if (part == 0) *at<T>(normaliser, item, head, start + i + a) = normal[a];
                        }
                        for (index column = 0; column < columns; column += WIDTH<T>) {
                            Tile<T, m()> tile;
                            if (read) tile.add_product(queries, dim, 1, state + column * s.head_dim, s.head_dim);
                            tile.add_product(scores, row, 1, values + column * length, i + m);
                            tile.scale_rows(inverse);
                            tile.store(at<T>(out, item, head, start + i) + first + column, out.row, columns - column);
                        }
                    });
                if (write) {
                    add_outer(key_rows, dim, s.head_dim, values, length, columns, state, s.head_dim);
                    add_rows(key_rows, dim, length, s.head_dim, z);
                }
            }
        if (final.data)
            for (index h = 0; h < heads; ++h) {
                unpack(states + h * state_size, s.head_dim, columns, at<T>(final, item, first_head + h, 0) + first, final.row);
                if (part == 0)
                    for (index f = 0; f < s.head_dim; ++f) at<T>(final, item, first_head + h, f)[s.value_dim] = normals[h * dim + f];
            }
    });
}

/// Gradients of the sums that an output is the quotient of: of those over values, and last of the normaliser.
template <class T, int M>
void sum_gradients(
    const Tensor& d_out, const Tensor& out, const Tensor& normaliser, index item, index head, index start, index size, T* to, index row
) {
    Vector<T> products[M];
    T along[REDUCED<T, M>];
    for (int a = 0; a < M; ++a) {
        const T *gradient = at<T>(d_out, item, head, start + a), *value = at<T>(out, item, head, start + a);
        const T inverse = 1 / *at<T>(normaliser, item, head, start + a);
        T* scaled_gradient = to + a * row;
        products[a] = Vector<T>{};
        index i = 0;
        for (; i + LANES<T> <= size; i += LANES<T>) {
            const Vector<T> x = vector(gradient + i) * inverse;
            vector(scaled_gradient + i) = x;
            products[a] += x * vector(value + i);
        }
        for (; i < size; ++i) {
            scaled_gradient[i] = gradient[i] * inverse;
            products[a][0] += scaled_gradient[i] * value[i];
        }
    }
    reduce_rows<T, M>(products, along, [](Vector<T> a, Vector<T> b) { return a + b; });
    for (int a = 0; a < M; ++a) to[a * row + size] = -along[a];
}

/// The gradients of all inputs. `normaliser` and `out` are those of `forward`.
///
/// Queries need the states S before them, and keys and values need G, the gradient of the state, which sums over later tokens. So a
/// first pass takes the chunks in order and keeps the transpose of S, and a second one in reverse order and keeps that of G.
template <class T>
index backward(
    const Sizes& s, Tensor d_out, Tensor d_final, Tensor q, Tensor k, Tensor v, Tensor initial, Tensor out, Tensor normaliser, Tensor d_q,
    Tensor d_k, Tensor d_v, Tensor d_initial, T* memory
) {
    const index row = s.score_row<T>(), dim = s.feature_row<T>(), wide = s.value_row<T>(), columns = s.columns();
    return in_parallel(s.batch * s.head_tasks(), s, memory, [&](index task, Scratch<T> scratch) {
        const index first_kv = task % s.head_tasks() * s.together(), item = task / s.head_tasks();
        const index kv_heads = std::min(s.together(), s.kv_heads - first_kv), state_size = columns * dim;
        T *states = scratch.take(kv_heads * state_size), *state = scratch.take(s.head_dim * wide);
        T *key_rows = scratch.take(s.chunk() * dim), *keys = scratch.take(s.chunk() * dim);
        T* sums = scratch.take(std::max<index>(s.chunk(), ROWS) * wide);
        const auto begin = [&](const Tensor& from) {
            std::fill_n(states, kv_heads * state_size, T(0));
            if (from.data)
                for (index h = 0; h < kv_heads; ++h)
                    pack_transposed(at<T>(from, item, first_kv + h, 0), from.row, columns, s.head_dim, states + h * state_size);
        };
        // Calls body(key head, its first query head, its state, first token, number of tokens) for each chunk of each head.
        const auto for_chunks = [&](bool reversed, auto&& body) {
            for (index step = 0; step < s.chunks(); ++step)
                for (index h = 0; h < kv_heads; ++h) {
                    const index start = (reversed ? s.chunks() - 1 - step : step) * s.chunk_size;
                    const index length = std::min<index>(s.chunk_size, s.time - start);
                    body(first_kv + h, (first_kv + h) * s.group(), states + h * state_size, start, length);
                }
        };

        begin(initial);
        for_chunks(false, [&](index kv_head, index first_head, T* transposed, index start, index length) {
            if (initial.data || start)
                for (index head = first_head; head < first_head + s.group(); ++head)
                    by_rows(length, [&](index i, auto m) {
                        sum_gradients<T, m()>(d_out, out, normaliser, item, head, start + i, s.value_dim, sums, wide);
                        for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                            Tile<T, m()> tile;
                            tile.add_product(sums, wide, 1, transposed + column * columns, columns);
                            tile.store(at<T>(d_q, item, head, start + i) + column, d_q.row, s.head_dim - column);
                        }
                    });
            if (start + length == s.time) return;
            feature_rows(k, item, kv_head, start, length, s.head_dim, key_rows, dim);
            pack(key_rows, dim, length, s.head_dim, keys);
            add_outer(at<T>(v, item, kv_head, start), v.row, s.value_dim, keys, length, s.head_dim, transposed, columns);
            for (index column = 0; column < s.head_dim; column += WIDTH<T>)
                add_rows(keys + column * length, WIDTH<T>, length, WIDTH<T>, transposed + column * columns + s.value_dim * WIDTH<T>);
        });

        T* keys_by_feature = scratch.take(s.head_dim * padded<T>(s.chunk()));
        T* values_by_column = scratch.take(s.value_dim * padded<T>(s.chunk()));
        T *d_keys = scratch.take(s.chunk() * dim), *query_rows = scratch.take(s.chunk() * dim), *queries = scratch.take(s.chunk() * dim);
        T* packed_sums = scratch.take(s.chunk() * wide);
        T *scores = scratch.take(s.chunk() * row), *d_scores = scratch.take(s.chunk() * row);
        begin(d_final);
        for_chunks(true, [&](index kv_head, index first_head, T* transposed, index start, index length) {
            const bool read = initial.data || start, later = d_final.data || start + length < s.time;
            feature_rows(k, item, kv_head, start, length, s.head_dim, key_rows, dim);
            pack(key_rows, dim, length, s.head_dim, keys);
            pack_transposed(key_rows, dim, s.head_dim, length, keys_by_feature);
            const T* values = at<T>(v, item, kv_head, start);
            pack_transposed(values, v.row, s.value_dim, length, values_by_column);
            if (later) {
                for (index f = 0; f < s.head_dim; f += WIDTH<T>)
                    for (index column = 0; column < s.value_dim; column += WIDTH<T>)
                        pack_transposed(
                            transposed + f * columns + column * WIDTH<T>, WIDTH<T>, std::min<index>(WIDTH<T>, s.head_dim - f),
                            std::min<index>(WIDTH<T>, s.value_dim - column), state + column * s.head_dim + f * WIDTH<T>
                        );
                by_rows(length, [&](index j, auto m) {
                    for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                        Tile<T, m()> tile(transposed + column * columns + s.value_dim * WIDTH<T>, 0);  // the row of z, for every key
                        tile.add_product(values + j * v.row, v.row, 1, transposed + column * columns, s.value_dim);
                        tile.store(d_keys + j * dim + column, dim, WIDTH<T>);
                    }
                    for (index column = 0; column < s.value_dim; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(key_rows + j * dim, dim, 1, state + column * s.head_dim, s.head_dim);
                        tile.store(at<T>(d_v, item, kv_head, start + j) + column, d_v.row, s.value_dim - column);
                    }
                });
            }
            for (index head = first_head; head < first_head + s.group(); ++head) {
                feature_rows(q, item, head, start, length, s.head_dim, query_rows, dim);
                pack(query_rows, dim, length, s.head_dim, queries);
                by_rows(length, [&](index i, auto m) {
                    sum_gradients<T, m()>(d_out, out, normaliser, item, head, start + i, s.value_dim, sums + i * wide, wide);
                });
                pack(sums, wide, length, s.value_dim, packed_sums);
                by_rows(length, [&](index i, auto m) {
                    const T *query = query_rows + i * dim, *d_sum = sums + i * wide;
                    T *score = scores + i * row, *d_score = d_scores + i * row;
                    causal_scores<T, m()>(query, dim, keys_by_feature, s.head_dim, i, nullptr, score, row);
                    causal_scores<T, m()>(d_sum, wide, values_by_column, s.value_dim, i, d_sum + s.value_dim, d_score, row);
                    for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(d_score, row, 1, keys + column * length, i + m);
                        tile.store(at<T>(d_q, item, head, start + i) + column, d_q.row, s.head_dim - column, read);
                    }
                    for (int a = 0; a < m; ++a) {
                        T* d_query = at<T>(d_q, item, head, start + i + a);
                        features_backward(d_query, query_rows + (i + a) * dim, s.head_dim, d_query);
                    }
                });
                const bool add = later || head > first_head;
                by_rows(length, [&](index j, auto m) {  // from the tokens that see these keys
                    for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(d_scores + j * row + j, 1, row, queries + column * length + j * WIDTH<T>, length - j);
                        tile.store(d_keys + j * dim + column, dim, WIDTH<T>, add);
                    }
                    for (index column = 0; column < s.value_dim; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(scores + j * row + j, 1, row, packed_sums + column * length + j * WIDTH<T>, length - j);
                        tile.store(at<T>(d_v, item, kv_head, start + j) + column, d_v.row, s.value_dim - column, add);
                    }
                });
                if (start || d_initial.data) add_outer(sums, wide, columns, queries, length, s.head_dim, transposed, columns);
            }
            for (index j = 0; j < length; ++j)
                features_backward(d_keys + j * dim, key_rows + j * dim, s.head_dim, at<T>(d_k, item, kv_head, start + j));
        });
        if (d_initial.data)
            for (index h = 0; h < kv_heads; ++h)
                for (index f = 0; f < s.head_dim; ++f)
                    for (index column = 0; column < columns; ++column)
                        at<T>(d_initial, item, first_kv + h, f)[column] =
                            states[h * state_size + f / WIDTH<T> * WIDTH<T> * columns + column * WIDTH<T> + f % WIDTH<T>];
    });
}

}  // namespace

#define FUNCTIONS(TYPE, T)                                                                   \
    FUNCTION(forward, Sizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7])        \
    FUNCTION(backward, Sizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11])
extern "C" {
FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
}
