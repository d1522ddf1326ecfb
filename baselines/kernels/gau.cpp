// The gated attention unit on a CPU, chunk by chunk; the state Σ lin_k vᵀ stays in the cache. gau.py documents the functions.

#include "tensors.h"

namespace {

constexpr index MAX_COLUMNS = 512;  // of the values that a task computes: chunk and state then fit a core's L2 cache
constexpr index BLOCK = 128;        // columns of the values from which gradients are computed together

/// Sizes of all functions. chunks_before: chunks that `past` holds.
struct Sizes {
    std::int64_t batch, time, chunk_size, key_dim, value_dim, chunks_before, threads;

    index chunk() const { return std::min(chunk_size, time); }
    index chunks() const { return (time + chunk_size - 1) / chunk_size; }
    index length(index start) const { return std::min<index>(chunk_size, time - start); }

    /// Whether the chunk is added to the state, and something reads it.
    bool writes(index start, bool final) const { return start + chunk_size < time || (final && start + chunk_size == time); }

    /// The factor of the linear term: 1 over the number of tokens before the chunk.
    template <class T>
    T inverse_tokens(index start) const {
        return 1 / T(std::max<index>(1, chunks_before * chunk_size + start));
    }

    /// Number of parts of the value columns, for so many tasks without parts.
    template <class T>
    index parts(index tasks) const {
        const index all = panels(value_dim, WIDTH<T>);
        return std::min(all, std::max(panels(threads, tasks), panels(all, MAX_COLUMNS / WIDTH<T>)));
    }

    /// Distance between rows of scores.
    template <class T>
    index score_row() const {
        return padded<T>(chunk()) + LANES<T>;
    }

    template <class T>
    index scratch_size() const {
        const index tokens = padded<T>(chunk()), keys = padded<T>(key_dim) + ROWS;
        const index columns = padded<T>(std::min<index>(MAX_COLUMNS, value_dim));
        const index forward = columns * (keys + 2 * tokens) + tokens * 2 * keys + ROWS * score_row<T>();
        const index backward = 3 * tokens * score_row<T>() + 3 * tokens * BLOCK + 3 * BLOCK * keys + 2 * tokens * keys;
        return panels(std::max(forward, backward) + 16 * 16, 16) * 16;
    }
};

/// Part of the value columns: whole panels, but for the last column.
struct Columns {
    index first, count;
    template <class T>
    static Columns of(const Sizes& s, index part, index parts) {
        const index all = panels(s.value_dim, WIDTH<T>), first = part * all / parts * WIDTH<T>;
        return {first, std::min<index>(s.value_dim, (part + 1) * all / parts * WIDTH<T>) - first};
    }
};

/// Copies x [length, size] into blocks of ROWS columns, each [length, ROWS]: what a tile of a transposed left operand reads together
/// is stored together.
template <class T>
void block_rows(const T* x, index row, index length, index size, T* blocks) {
    const index whole = size / ROWS * ROWS;
    for (index i = 0; i < length; ++i, x += row) {
        for (index f = 0; f < whole; f += ROWS) std::memcpy(blocks + f * length + i * ROWS, x + f, ROWS * sizeof(T));
        for (index f = whole; f < size; ++f) blocks[whole * length + i * ROWS + f - whole] = x[f];
    }
}

/// state += left^T right: left [length, key_dim] in blocks, right [length, columns] and state [key_dim, columns] packed.
template <class T>
void add_outer(const Sizes& s, const T* blocks, const T* right, index length, index columns, T* state) {
    for (index column = 0; column < columns; column += WIDTH<T>)
        by_rows(s.key_dim, [&](index f, auto m) {
            T* to = state + column * s.key_dim + f * WIDTH<T>;
            Tile<T, m()> tile(to, WIDTH<T>);
            tile.add_product(blocks + f / ROWS * ROWS * length + f % ROWS, 1, ROWS, right + column * length, length);
            tile.store(to, WIDTH<T>, WIDTH<T>);
        });
}

/// relu(quad_q quad_k^T / c) of rows i … i + M with the keys up to their own, and zeros up to the end of their last panel.
template <class T, int M>
void scores(const Sizes& s, const T* query, index row, const T* keys, index i, T* to, index to_row) {
    T scale[M];
    std::fill(scale, scale + M, 1 / T(s.chunk_size));
    for (index column = 0; column < i + M; column += WIDTH<T>) {
        Tile<T, M> tile;
        tile.add_product(query, row, 1, keys + column * s.key_dim, s.key_dim);
        tile.scale_rows(scale);
        for (int a = 0; a < M; ++a)
            for (Vector<T>& x : tile.sum[a]) x = x < T(0) ? Vector<T>{} : x;
        tile.store(to + column, to_row, WIDTH<T>);
    }
    for (int a = 0; a < M; ++a) std::fill(to + a * to_row + i + a + 1, to + a * to_row + padded<T>(i + M), T(0));
}

/// Multiplies the tile by M rows of which `columns` columns are left.
template <class T, int M>
void multiply(Tile<T, M>& tile, const T* by, index row, index columns) {
    for (int a = 0; a < M; ++a, by += row) {
        T rest[WIDTH<T>] = {};
        const T* from = by;
        if (columns < WIDTH<T>) std::copy(by, by + columns, rest), from = rest;
        for (int j = 0; j < 2; ++j) tile.sum[a][j] *= vector(from + j * LANES<T>);
    }
}

/// The outputs; if they are given, the outputs before the gate, and the state after all complete chunks. A task computes some of the
/// value columns; each of them computes the scores.
template <class T>
index forward(
    const Sizes& s, Tensor u, Tensor v, Tensor quad_q, Tensor quad_k, Tensor lin_q, Tensor lin_k, Tensor past, Tensor out, Tensor attended,
    Tensor final, T* memory
) {
    const index parts = s.parts<T>(s.batch), row = s.score_row<T>();
    return in_parallel(s.batch * parts, s, memory, [&](index task, Scratch<T> scratch) {
        const index item = task / parts;
        const auto [first, columns] = Columns::of<T>(s, task % parts, parts);
        T *state = scratch.take(s.key_dim * padded<T>(columns)), *values = scratch.take(s.chunk() * padded<T>(columns));
        T *keys = scratch.take(s.key_dim * padded<T>(s.chunk())), *blocks = scratch.take(s.chunk() * (s.key_dim + ROWS));
        T* weights = scratch.take(ROWS * row);
        if (past.data) pack(at<T>(past, item, 0, 0) + first, past.row, s.key_dim, columns, state);
        else std::fill_n(state, s.key_dim * padded<T>(columns), T(0));
        for (index start = 0; start < s.time; start += s.chunk_size) {
            const index length = s.length(start);
            pack_transposed(at<T>(quad_k, item, 0, start), quad_k.row, s.key_dim, length, keys);
            pack(at<T>(v, item, 0, start) + first, v.row, length, columns, values);
            by_rows(length, [&](index i, auto m) {
                scores<T, m()>(s, at<T>(quad_q, item, 0, start + i), quad_q.row, keys, i, weights, row);
                for (int a = 0; a < m; ++a)
                    for (index j = 0; j < i + m; j += LANES<T>) vector(weights + a * row + j) *= vector(weights + a * row + j);
                T scale[m()];
                std::fill(scale, scale + m(), s.inverse_tokens<T>(start));
                for (index column = 0; column < columns; column += WIDTH<T>) {
                    const index at_column = first + column, left = columns - column;
                    Tile<T, m()> tile;
                    if (past.data || start) {
                        tile.add_product(at<T>(lin_q, item, 0, start + i), lin_q.row, 1, state + column * s.key_dim, s.key_dim);
                        tile.scale_rows(scale);
                    }
                    tile.add_product(weights, row, 1, values + column * length, i + m);
                    if (attended.data) tile.store(at<T>(attended, item, 0, start + i) + at_column, attended.row, left);
                    multiply(tile, at<T>(u, item, 0, start + i) + at_column, u.row, left);
                    tile.store(at<T>(out, item, 0, start + i) + at_column, out.row, left);
                }
            });
            if (s.writes(start, final.data)) {
                block_rows(at<T>(lin_k, item, 0, start), lin_k.row, length, s.key_dim, blocks);
                add_outer(s, blocks, values, length, columns, state);
            }
        }
        if (final.data) unpack(state, s.key_dim, columns, at<T>(final, item, 0, 0) + first, final.row);
    });
}

/// to = x ⊙ y * factor
template <class T>
void product(const T* x, const T* y, T factor, index size, T* to) {
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) vector(to + i) = vector(x + i) * vector(y + i) * factor;
    for (; i < size; ++i) to[i] = x[i] * y[i] * factor;
}

/// For each chunk, the state before it, and the gradient of the state after it: states[batch, 0 or 1, chunk], each
/// [key_dim, value_dim]; and d_past, the gradient of the state before all.
template <class T>
index states(
    const Sizes& s, Tensor u, Tensor v, Tensor lin_q, Tensor lin_k, Tensor past, Tensor d_out, Tensor d_final, Tensor states, Tensor d_past,
    T* memory
) {
    const index parts = s.parts<T>(2 * s.batch);
    return in_parallel(2 * s.batch * parts, s, memory, [&](index task, Scratch<T> scratch) {
        const index item = task / parts / 2;
        const bool gradient = task / parts % 2;
        const auto [first, columns] = Columns::of<T>(s, task % parts, parts);
        T *state = scratch.take(s.key_dim * padded<T>(columns)), *right = scratch.take(s.chunk() * padded<T>(columns));
        T *blocks = scratch.take(s.chunk() * (s.key_dim + ROWS)), *rows = scratch.take(s.chunk() * padded<T>(columns));
        const Tensor& begin = gradient ? d_final : past;
        if (begin.data) pack(at<T>(begin, item, 0, 0) + first, begin.row, s.key_dim, columns, state);
        else std::fill_n(state, s.key_dim * padded<T>(columns), T(0));
        for (index step = 0; step < s.chunks(); ++step) {
            const index number = gradient ? s.chunks() - 1 - step : step, start = number * s.chunk_size, length = s.length(start);
            unpack(state, s.key_dim, columns, at<T>(states, item, gradient, number) + first, s.value_dim);
            if (gradient ? !start && !d_past.data : start + length == s.time) break;
            const Tensor& left = gradient ? lin_q : lin_k;
            block_rows(at<T>(left, item, 0, start), left.row, length, s.key_dim, blocks);
            if (gradient) {
                for (index i = 0; i < length; ++i)
                    product(
                        at<T>(d_out, item, 0, start + i) + first, at<T>(u, item, 0, start + i) + first, s.inverse_tokens<T>(start), columns,
                        rows + i * columns
                    );
                pack(rows, columns, length, columns, right);
            } else {
                pack(at<T>(v, item, 0, start) + first, v.row, length, columns, right);
            }
            add_outer(s, blocks, right, length, columns, state);
        }
        if (gradient && d_past.data) unpack(state, s.key_dim, columns, at<T>(d_past, item, 0, 0) + first, d_past.row);
    });
}

/// The gradients of all tokens, from what `states` writes. Chunks are independent. past and d_final: only whether they are given.
template <class T>
index backward(
    const Sizes& s, Tensor u, Tensor v, Tensor quad_q, Tensor quad_k, Tensor lin_k, Tensor past, Tensor attended, Tensor d_out, Tensor d_final,
     Tensor states, Tensor d_u, Tensor d_v, Tensor d_quad_q, Tensor d_quad_k, Tensor d_lin_q, Tensor d_lin_k, T* memory
) {
    const index row = s.score_row<T>();
    for (const Tensor& x : {d_u, d_v}) prefer_huge_pages<T>(x.data, s.batch * s.time * s.value_dim);
    for (const Tensor& x : {d_quad_q, d_quad_k, d_lin_q, d_lin_k}) prefer_huge_pages<T>(x.data, s.batch * s.time * s.key_dim);
    return in_parallel(s.batch * s.chunks(), s, memory, [&](index task, Scratch<T> scratch) {
        const index item = task / s.chunks(), number = task % s.chunks(), start = number * s.chunk_size, length = s.length(start);
        const bool read = past.data || start, written = s.writes(start, d_final.data);
        const T* keys = at<T>(quad_k, item, 0, start);
        T *weights = scratch.take(length * row), *roots = scratch.take(length * row), *d_scores = scratch.take(length * row);
        T *d_rows = scratch.take(length * BLOCK), *d_packed = scratch.take(length * BLOCK);
        T* values = scratch.take(BLOCK * padded<T>(length));
        T *state = scratch.take(BLOCK * padded<T>(s.key_dim)), *d_state = scratch.take(BLOCK * padded<T>(s.key_dim));
        T *d_state_by_key = scratch.take(BLOCK * s.key_dim), *packed = scratch.take(padded<T>(length) * padded<T>(s.key_dim));
        pack_transposed(keys, quad_k.row, s.key_dim, length, packed);
        by_rows(length, [&](index i, auto m) {
            scores<T, m()>(s, at<T>(quad_q, item, 0, start + i), quad_q.row, packed, i, roots + i * row, row);
            for (index a = i; a < i + m; ++a)
                for (index j = 0; j < i + m; j += LANES<T>)
                    vector(weights + a * row + j) = vector(roots + a * row + j) * vector(roots + a * row + j);
        });
        for (index first = 0; first < s.value_dim; first += BLOCK) {
            const index columns = std::min<index>(BLOCK, s.value_dim - first);
            const T* value = at<T>(v, item, 0, start) + first;
            for (index i = start; i < start + length; ++i) {
                const T* gradient = at<T>(d_out, item, 0, i) + first;
                product(gradient, at<T>(u, item, 0, i) + first, T(1), columns, d_rows + (i - start) * BLOCK);
                product(gradient, at<T>(attended, item, 0, i) + first, T(1), columns, at<T>(d_u, item, 0, i) + first);
            }
            pack(d_rows, BLOCK, length, columns, d_packed);
            pack_transposed(value, v.row, columns, length, values);
            if (read) pack_transposed(at<T>(states, item, 0, number) + first, s.value_dim, columns, s.key_dim, state);
            if (written) {
                pack_transposed(at<T>(states, item, 1, number) + first, s.value_dim, columns, s.key_dim, d_state);
                pack(at<T>(states, item, 1, number) + first, s.value_dim, s.key_dim, columns, d_state_by_key);
            }
            by_rows(length, [&](index i, auto m) {
                for (index column = 0; column < i + m; column += WIDTH<T>) {
                    T* to = d_scores + i * row + column;
                    Tile<T, m()> tile;
                    if (first) tile = Tile<T, m()>(to, row);
                    tile.add_product(d_rows + i * BLOCK, BLOCK, 1, values + column * columns, columns);
                    tile.store(to, row, WIDTH<T>);
                }
                T scale[m()];
                std::fill(scale, scale + m(), s.inverse_tokens<T>(start));
                for (index column = 0; column < s.key_dim; column += WIDTH<T>) {
                    Tile<T, m()> by_query, by_key;
                    if (read) by_query.add_product(d_rows + i * BLOCK, BLOCK, 1, state + column * columns, columns);
                    by_query.scale_rows(scale);
                    by_query.store(at<T>(d_lin_q, item, 0, start + i) + column, d_lin_q.row, s.key_dim - column, first);
                    if (written) by_key.add_product(value + i * v.row, v.row, 1, d_state + column * columns, columns);
                    by_key.store(at<T>(d_lin_k, item, 0, start + i) + column, d_lin_k.row, s.key_dim - column, first);
                }
                for (index column = 0; column < columns; column += WIDTH<T>) {
                    Tile<T, m()> tile;
                    tile.add_product(weights + i * row + i, 1, row, d_packed + column * length + i * WIDTH<T>, length - i);
                    if (written)
                        tile.add_product(at<T>(lin_k, item, 0, start + i), lin_k.row, 1, d_state_by_key + column * s.key_dim, s.key_dim);
                    tile.store(at<T>(d_v, item, 0, start + i) + first + column, d_v.row, columns - column);
                }
            });
        }
        // Through the square and the relu, whose root is 0 where it cuts off.
        pack(keys, quad_k.row, length, s.key_dim, packed);
        by_rows(length, [&](index i, auto m) {
            for (index a = i; a < i + m; ++a)
                for (index j = 0; j < padded<T>(i + m); j += LANES<T>)
                    vector(d_scores + a * row + j) *= vector(roots + a * row + j) * (2 / T(s.chunk_size));
            for (index column = 0; column < s.key_dim; column += WIDTH<T>) {
                Tile<T, m()> tile;
                tile.add_product(d_scores + i * row, row, 1, packed + column * length, i + m);
                tile.store(at<T>(d_quad_q, item, 0, start + i) + column, d_quad_q.row, s.key_dim - column);
            }
        });
        pack(at<T>(quad_q, item, 0, start), quad_q.row, length, s.key_dim, packed);
        by_rows(length, [&](index j, auto m) {
            for (index column = 0; column < s.key_dim; column += WIDTH<T>) {
                Tile<T, m()> tile;
                tile.add_product(d_scores + j * row + j, 1, row, packed + column * length + j * WIDTH<T>, length - j);
                tile.store(at<T>(d_quad_k, item, 0, start + j) + column, d_quad_k.row, s.key_dim - column);
            }
        });
    });
}

}  // namespace

#define FUNCTIONS(TYPE, T)                                                                                     \
    FUNCTION(forward, Sizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9])              \
    FUNCTION(states, Sizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8])                     \
    FUNCTION(backward, Sizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10],      \
             x[11], x[12], x[13], x[14], x[15])
extern "C" {
FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
}
