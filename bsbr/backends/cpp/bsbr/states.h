// States of chunks: F_s = φ(K_s)ᵀ V_s, or what the delta rule makes of them.

#pragma once

#include "bsbr/sizes.h"

namespace {

/// A chunk of one kv head.
template <class T>
struct Stored {
    index item, head, number, start;
    const T *key, *value;

    Stored(const ChunkSizes& s, const Tensor& keys, const Tensor& v, index task)
        : item(task / s.kv_heads / s.chunks), head(task % s.kv_heads), number(task / s.kv_heads % s.chunks),
          start(number * s.chunk_size), key(at<T>(keys, item, head, start)), value(at<T>(v, item, head, start)) {}
};

/// Copies rows of φ(k), of unit norm if `unit_norm`; `inverse` receives the factors.
template <class T>
void copy_features(const T* key, index key_row, index count, const ChunkSizes& s, T* to, index row, T* inverse) {
    for (index i = 0; i < count; ++i) {
        fetch(key + (i + AHEAD) * key_row, s.features);
        inverse[i] = s.unit_norm ? inverse_norm(key + i * key_row, s.features) : T(1);
        scaled(key + i * key_row, inverse[i], s.features, to + i * row);
    }
}

// --- sums ---------------------------------------------------------------------------------------

template <class T>
void sum_state(const ChunkSizes& s, const Stored<T>& chunk, index key_row, index value_row, T* state, Scratch<T> scratch) {
    const index count = s.chunk_size;
    T *features = scratch.take(count * s.features), *inverse = scratch.take(count);
    copy_features(chunk.key, key_row, count, s, features, s.features, inverse);
    T* values = scratch.take(count * padded<T>(s.head_dim));
    pack(chunk.value, value_row, count, s.head_dim, values);
    for (index column = 0; column < s.head_dim; column += WIDTH<T>)
        by_rows(s.features, [&](index f, auto m) {
            Tile<T, m()> tile;
            tile.add_product(features + f, 1, s.features, values + column * count, count);
            tile.store(state + f * s.head_dim + column, s.head_dim, s.head_dim - column);
        });
}

template <class T>
void sum_state_backward(
    const ChunkSizes& s, const Stored<T>& chunk, index key_row, index value_row, const T* d_state, T* d_key, index d_key_row,
    T* d_value, index d_value_row, bool add, Scratch<T> scratch
) {
    const index row = s.features + WIDTH<T>;
    T* by_feature = scratch.take(s.features * padded<T>(s.head_dim));
    T* by_dim = scratch.take(s.head_dim * padded<T>(s.features));
    pack(d_state, s.head_dim, s.features, s.head_dim, by_feature);
    pack_transposed(d_state, s.head_dim, s.head_dim, s.features, by_dim);
    T *features = scratch.take(ROWS * row), *gradient = scratch.take(ROWS * row);
    by_rows(s.chunk_size, [&](index i, auto m) {
        T inverse[ROWS];
        copy_features(chunk.key + i * key_row, key_row, m, s, features, row, inverse);
        for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
            Tile<T, m()> tile;
            tile.add_product(features, row, 1, by_feature + column * s.features, s.features);
            tile.store(d_value + i * d_value_row + column, d_value_row, s.head_dim - column, add);
        }
        for (index column = 0; column < s.features; column += WIDTH<T>) {
            Tile<T, m()> tile;
            tile.add_product(chunk.value + i * value_row, value_row, 1, by_dim + column * s.head_dim, s.head_dim);
            tile.store(gradient + column, row, WIDTH<T>);
        }
        for (int a = 0; a < m; ++a) {
            T *to = d_key + (i + a) * d_key_row, *from = gradient + a * row;
            if (s.unit_norm) unit_norm_backward(from, features + a * row, inverse[a], s.features, to, add);
            else std::copy(from, from + s.features, to);
        }
    });
}

// --- the delta rule -----------------------------------------------------------------------------
//
// A block of tokens with keys K (rows φ(k_i)), values V and rates β, after the state S, stores u_i = β_i z_i where
//     z_i = v_i − Sᵀ k_i − Σ_{j<i} (k_i·k_j) β_j z_j,      S' = S + Kᵀ U
// which is (I + tril(K Kᵀ diag(β), −1)) Z = V − K S. Products with S are matrix products; the small system is substituted in registers.
// Given D, the gradient of S', the gradient of U is K D, and
//     w_j = (K D)_j − Σ_{i>j} (k_j·k_i) β_i w_i,   y = β w
// are those of the values (y) and, times z, of the rates. D' = D − Kᵀ Y;  dK = U Dᵀ − Y Sᵀ + G K with G_ij = G_ji = −y_i·u_j for j < i.

/// A block of tokens, with zeros after the last one.
template <class T>
struct DeltaBlock {
    index row;        // between rows of `keys`
    T *keys;          // φ(K) [BLOCK, features]
    T *inverse;       // the factors of φ
    T *rates;         // β
    T *weights;       // −(k_i·k_j) β_j [BLOCK, BLOCK], all of them
    T *by_feature;    // φ(K)ᵀ, packed: scratch of `load`

    DeltaBlock(const ChunkSizes& s, Scratch<T>& scratch) : row(panels(s.features, 16) * 16) {
        keys = scratch.take(BLOCK * row), inverse = scratch.take(BLOCK), rates = scratch.take(BLOCK);
        weights = scratch.take(BLOCK * BLOCK), by_feature = scratch.take(s.features * padded<T>(BLOCK));
    }

    void load(const ChunkSizes& s, const T* key, index key_row, const T* rate, index rate_row, index count) {
        copy_features(key, key_row, count, s, keys, row, inverse);
        std::fill(keys + count * row, keys + BLOCK * row, T(0));
        for (index i = 0; i < BLOCK; ++i) rates[i] = i < count ? rate[i * rate_row] : T(0);
        pack_transposed(keys, row, s.features, BLOCK, by_feature);
        for (index column = 0; column < BLOCK; column += LANES<T>)
            by_rows<TALL>(BLOCK, [&](index i, auto m) {
                Tile<T, m(), 1> tile;
                tile.add_product(keys + i * row, row, 1, half_panel(by_feature, s.features, column), s.features);
                const Vector<T> by = -vector(rates + column);
#pragma GCC unroll 16
                for (int a = 0; a < m; ++a) vector(weights + (i + a) * BLOCK + column) = tile.sum[a][0] * by;
            });
    }
};

/// Solves the block's system in place, on x [BLOCK, WIDTH]; or, if TRANSPOSED, that of the gradients.
template <class T, bool TRANSPOSED>
void substitute(const T* weights, T* x) {
    for (int half = 0; half < 2; ++half, x += LANES<T>) {
        Vector<T> r[BLOCK];
#pragma GCC unroll 16
        for (int i = 0; i < BLOCK; ++i) r[i] = vector(x + i * WIDTH<T>);
#pragma GCC unroll 16
        for (int solved = 0; solved < BLOCK; ++solved) {
            const int j = TRANSPOSED ? int(BLOCK) - 1 - solved : solved;
#pragma GCC unroll 16
            for (int i = 0; i < BLOCK; ++i)
                if (TRANSPOSED ? i < j : i > j) r[i] += weights[i * BLOCK + j] * r[j];
        }
#pragma GCC unroll 16
        for (int i = 0; i < BLOCK; ++i) vector(x + i * WIDTH<T>) = r[i];
    }
    operations += BLOCK * (BLOCK - 1) * WIDTH<T>;
}

/// to = diag(rates) x, both [BLOCK, WIDTH].
template <class T>
void scale_block(const T* x, const T* rates, T* to) {
    for (index i = 0; i < BLOCK; ++i) scaled(x + i * WIDTH<T>, rates[i], WIDTH<T>, to + i * WIDTH<T>);
}

/// Z of the panel of columns, in place of the values x [BLOCK, WIDTH]. state: that panel [features, WIDTH], or null for 0.
template <class T>
void solve_values(const DeltaBlock<T>& block, const T* state, index features, T* x) {
    if (state)
        by_rows<8>(BLOCK, [&](index i, auto m) {
            Tile<T, m()> tile;
            tile.add_product(block.keys + i * block.row, block.row, 1, state, features);
            tile.negate();
            tile.store(x + i * WIDTH<T>, WIDTH<T>, WIDTH<T>, true);
        });
    substitute<T, false>(block.weights, x);
}

/// state += Kᵀ x of one panel; state is 0 before the first block.
template <class T>
void add_block(const DeltaBlock<T>& block, const T* x, index features, T* state, bool first) {
    by_rows(features, [&](index f, auto m) {
        Tile<T, m()> tile;
        if (!first) tile = Tile<T, m()>(state + f * WIDTH<T>, WIDTH<T>);
        tile.add_product(block.keys + f, 1, block.row, x, BLOCK);
        tile.store(state + f * WIDTH<T>, WIDTH<T>, WIDTH<T>);
    });
}

/// Packs the transpose of what is packed: [rows, columns], in panels, to [columns, rows].
template <class T>
void transpose_packed(const T* packed, index rows, index columns, T* to, T* flat) {
    unpack(packed, rows, columns, flat, columns);
    pack_transposed(flat, columns, columns, rows, to);
}

template <class T>
void delta_state(
    const ChunkSizes& s, const Stored<T>& chunk, index key_row, index value_row, const T* rate, index rate_row, T* state,
    Scratch<T> scratch
) {
    DeltaBlock<T> block(s, scratch);
    T *packed = scratch.take(s.features * padded<T>(s.head_dim)), *x = scratch.take(BLOCK * padded<T>(s.head_dim));
    for (index start = 0; start < s.chunk_size; start += BLOCK) {
        const index count = std::min<index>(BLOCK, s.chunk_size - start);
        block.load(s, chunk.key + start * key_row, key_row, rate + start * rate_row, rate_row, count);
        pack(chunk.value + start * value_row, value_row, count, s.head_dim, x, BLOCK);
        for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
            T *panel = x + column * BLOCK, *of_state = packed + column * s.features;
            solve_values(block, start ? of_state : nullptr, s.features, panel);
            scale_block(panel, block.rates, panel);
            add_block(block, panel, s.features, of_state, start == 0);
        }
    }
    unpack(packed, s.features, s.head_dim, state, s.head_dim);
}

template <class T>
void delta_state_backward(
    const ChunkSizes& s, const Stored<T>& chunk, index key_row, index value_row, const T* rate, index rate_row, const T* d_state,
    T* d_key, index d_key_row, T* d_value, index d_value_row, T* d_rate, index d_rate_row, bool add, Scratch<T> scratch
) {
    const index dim = padded<T>(s.head_dim), size = s.features * dim, blocks = panels(s.chunk_size, BLOCK);
    DeltaBlock<T> block(s, scratch);
    T *states = scratch.take(blocks * size), *z = scratch.take(blocks * BLOCK * dim), *u = scratch.take(BLOCK * dim);
    const auto load = [&](index b) {
        const index start = b * BLOCK, count = std::min<index>(BLOCK, s.chunk_size - start);
        block.load(s, chunk.key + start * key_row, key_row, rate + start * rate_row, rate_row, count);
        return count;
    };
    for (index b = 0; b < blocks; ++b) {  // the state before each block, and its Z
        const index count = load(b);
        pack(chunk.value + b * BLOCK * value_row, value_row, count, s.head_dim, z + b * BLOCK * dim, BLOCK);
        for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
            T *panel = z + (b * dim + column) * BLOCK, *of_state = states + b * size + column * s.features;
            solve_values(block, b ? of_state : nullptr, s.features, panel);
            if (b + 1 == blocks) continue;
            scale_block(panel, block.rates, u);
            if (b) std::copy(of_state, of_state + s.features * WIDTH<T>, of_state + size);
            add_block(block, u, s.features, of_state + size, b == 0);
        }
    }
    T *d = scratch.take(size), *y = scratch.take(BLOCK * dim), *rows = scratch.take(BLOCK * dim), *y_rows = scratch.take(BLOCK * dim);
    T *d_by_dim = scratch.take(s.head_dim * padded<T>(s.features)), *state_by_dim = scratch.take(s.head_dim * padded<T>(s.features));
    T *flat = scratch.take(size), *u_by_dim = scratch.take(dim * padded<T>(BLOCK)), *pairs = scratch.take(BLOCK * BLOCK);
    T *packed_keys = scratch.take(BLOCK * padded<T>(s.features)), *gradient = scratch.take(BLOCK * padded<T>(s.features));
    pack(d_state, s.head_dim, s.features, s.head_dim, d);
    for (index b = blocks - 1; b >= 0; --b) {
        const index count = load(b), start = b * BLOCK;
        T along[BLOCK] = {};
        // D is needed by its rows and by its columns. Rows of padding have rates and keys of 0.
        transpose_packed(d, s.features, s.head_dim, d_by_dim, flat);
        for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
            T *panel = y + column * BLOCK, *of_d = d + column * s.features;
            const T* solved = z + (b * dim + column) * BLOCK;
            by_rows<8>(BLOCK, [&](index i, auto m) {
                Tile<T, m()> tile;
                tile.add_product(block.keys + i * block.row, block.row, 1, of_d, s.features);
                tile.store(panel + i * WIDTH<T>, WIDTH<T>, WIDTH<T>);
            });
            substitute<T, true>(block.weights, panel);
            for (index i = 0; i < BLOCK; ++i) along[i] += dot(panel + i * WIDTH<T>, solved + i * WIDTH<T>, WIDTH<T>);
            scale_block(panel, block.rates, panel);
            scale_block(solved, block.rates, u + column * BLOCK);
            T minus[BLOCK * WIDTH<T>];
            for (index i = 0; i < BLOCK * WIDTH<T>; i += LANES<T>) vector(minus + i) = -vector(panel + i);
            add_block(block, minus, s.features, of_d, false);
        }
        for (index i = 0; i < count; ++i) d_rate[(start + i) * d_rate_row] = along[i];
        unpack(y, BLOCK, s.head_dim, y_rows, s.head_dim);
        unpack(u, BLOCK, s.head_dim, rows, s.head_dim);
        for (index i = 0; i < count; ++i) {
            const T* from = y_rows + i * s.head_dim;
            T* to = d_value + (start + i) * d_value_row;
            for (index e = 0; e < s.head_dim; ++e) to[e] = from[e] + (add ? to[e] : T(0));
        }

        // G = −tril(Y Uᵀ, −1) and its transpose
        pack_transposed(rows, s.head_dim, s.head_dim, BLOCK, u_by_dim);
        for (index column = 0; column < BLOCK; column += LANES<T>)
            by_rows<TALL>(BLOCK, [&](index i, auto m) {
                Tile<T, m(), 1> tile;
                tile.add_product(y_rows + i * s.head_dim, s.head_dim, 1, half_panel(u_by_dim, s.head_dim, column), s.head_dim);
                tile.negate();
                tile.store(pairs + i * BLOCK + column, BLOCK, LANES<T>);
            });
        for (index i = 0; i < BLOCK; ++i) {
            pairs[i * BLOCK + i] = 0;
            for (index j = i + 1; j < BLOCK; ++j) pairs[i * BLOCK + j] = pairs[j * BLOCK + i];
        }
        if (b) transpose_packed(states + b * size, s.features, s.head_dim, state_by_dim, flat);
        pack(block.keys, block.row, BLOCK, s.features, packed_keys);
        const index row = padded<T>(s.features);
        for (index column = 0; column < s.features; column += WIDTH<T>)
            by_rows<8>(BLOCK, [&](index i, auto m) {
                Tile<T, m()> tile;
                if (b) tile.add_product(y_rows + i * s.head_dim, s.head_dim, 1, state_by_dim + column * s.head_dim, s.head_dim);
                tile.negate();
                tile.add_product(rows + i * s.head_dim, s.head_dim, 1, d_by_dim + column * s.head_dim, s.head_dim);
                tile.add_product(pairs + i * BLOCK, BLOCK, 1, packed_keys + column * BLOCK, BLOCK);
                tile.store(gradient + i * row + column, row, WIDTH<T>);
            });
        for (index i = 0; i < count; ++i) {
            T *to = d_key + (start + i) * d_key_row, *from = gradient + i * row;
            if (s.unit_norm) unit_norm_backward(from, block.keys + i * block.row, block.inverse[i], s.features, to, add);
            else std::copy(from, from + s.features, to);
        }
    }
}

// --- all chunks ---------------------------------------------------------------------------------

/// F_s of every chunk; φ(k) is the key or its unit norm. Without beta, the sum.
template <class T>
index chunk_states(const ChunkSizes& s, Tensor keys, Tensor v, Tensor beta, Tensor states, T* memory) {
    return in_parallel(s.batch * s.chunks * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const Stored<T> chunk(s, keys, v, task);
        T* state = at<T>(states, chunk.item, chunk.head, chunk.number);
        if (beta.data) delta_state(s, chunk, keys.row, v.row, at<T>(beta, chunk.item, chunk.head, chunk.start), beta.row, state, scratch);
        else sum_state(s, chunk, keys.row, v.row, state, scratch);
    });
}

/// Gradients of keys, values and beta, from that of the states. With `add`, those of the values, and of the keys if `unit_norm`, are
/// added to what is there.
template <class T>
index chunk_states_backward(
    const ChunkSizes& s, Tensor keys, Tensor v, Tensor beta, Tensor d_states, Tensor d_keys, Tensor d_v, Tensor d_beta, T* memory
) {
    prefer_huge_pages<T>(d_keys.data, s.batch * s.kv_heads * s.time * s.features);
    return in_parallel(s.batch * s.chunks * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const Stored<T> chunk(s, keys, v, task);
        const T* d_state = at<T>(d_states, chunk.item, chunk.head, chunk.number);
        T *d_key = at<T>(d_keys, chunk.item, chunk.head, chunk.start), *d_value = at<T>(d_v, chunk.item, chunk.head, chunk.start);
        if (beta.data) {
            const T* rate = at<T>(beta, chunk.item, chunk.head, chunk.start);
            T* d_rate = at<T>(d_beta, chunk.item, chunk.head, chunk.start);
            delta_state_backward(
                s, chunk, keys.row, v.row, rate, beta.row, d_state, d_key, d_keys.row, d_value, d_v.row, d_rate, d_beta.row, s.add, scratch
            );
        } else {
            sum_state_backward(s, chunk, keys.row, v.row, d_state, d_key, d_keys.row, d_value, d_v.row, s.add, scratch);
        }
    });
}

}  // namespace
