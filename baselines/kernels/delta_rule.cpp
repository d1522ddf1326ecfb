// The delta rule and the gated delta rule on a CPU. A task takes key heads from their first chunk to their last: the state S stays
// in the cache of one core, and each chunk's keys, values and queries are read once.
//
// Symbols, for a chunk of c tokens that begins with the state S [d, e]: γ_i = α_1 … α_i, D_ij = γ_i / γ_j for j <= i and else 0,
// a = tril(K Kᵀ ⊙ D, -1). The solutions X = V − Γ K S − a E with E = diag(β) X are found row by row; outputs are
// Γ Q S + (Q Kᵀ ⊙ D) E, and the next state is γ_c S + Kᵀ diag(γ_c / γ) E. Without decays, all γ are 1.

#include "tensors.h"

namespace {

constexpr index SEGMENT = 8;  // chunks; the forward pass keeps the state at the start of each segment for the backward pass

/// chunk_size: tokens solved together. parts: tasks that share the value columns of a head. together: key heads of a task, whose
/// chunks take turns.
struct RuleSizes {
    std::int64_t batch, heads, kv_heads, time, chunk_size, head_dim, value_dim, parts, together, backward, threads;

    index chunks() const { return panels(time, chunk_size); }

    template <class T>
    index columns() const {
        return panels(panels(value_dim, WIDTH<T>), parts) * WIDTH<T>;
    }

    template <class T>
    index scratch_size() const {
        const index c = padded<T>(chunk_size) + 16, d = padded<T>(head_dim) + 16, e = padded<T>(value_dim) + 16;
        const index chunk = 2 * c * d + 3 * c * c + 3 * c * e + d * e + 8 * c;
        if (!backward) return chunk + together * d * e;
        return SEGMENT * chunk + d * e * 4 + 4 * c * c + 8 * c * (d + e) + 3 * c * LANES<T>;
    }
};

/// The numbers of one chunk of a key head. Packed: in panels, as right operands of products.
template <class T>
struct Chunk {
    index count;      // tokens
    index row;        // distance of the rows of decays and overlaps
    bool has_state;   // whether S is not 0
    T* key;           // K [c, d]
    T* keys;          // Kᵀ, packed [d, c]
    T* decays;        // D [c, c]
    T* overlaps;      // −a [c, c]; its diagonal and what is above are never read
    T* rates;         // β
    T* since_start;   // γ
    T* minus_since_start;
    T* until_end;     // γ_c / γ, the last row of D
    T* state;         // S, packed [d, e]
    T* solutions;     // X, packed [c, e]; null if they are not kept
    T* corrections;   // E, packed [c, e]
    T* decayed;       // diag(γ_c / γ) E, packed [c, e]
    const T *next_key, *next_value;  // rows of the next chunk, which are prefetched
    index key_row, value_row;

    Chunk() = default;
    Chunk(const RuleSizes& s, index columns, bool decay, bool keep, Scratch<T>& scratch) {
        const index c = s.chunk_size, values = c * padded<T>(columns);
        row = padded<T>(c);
        key = scratch.take(c * s.head_dim);
        keys = scratch.take(s.head_dim * row);
        decays = scratch.take(c * row);
        overlaps = scratch.take(c * row);
        rates = scratch.take(c), since_start = scratch.take(row), minus_since_start = scratch.take(row);
        state = scratch.take(s.head_dim * padded<T>(columns));
        solutions = keep ? scratch.take(values) : nullptr;
        corrections = scratch.take(values);
        decayed = decay ? scratch.take(values) : corrections;
        if (decay) return;
        std::fill_n(since_start, row, T(1));
        std::fill_n(minus_since_start, row, T(-1));
        for (index i = 0; i < c; ++i) std::fill_n(decays + i * row, row, T(0)), std::fill_n(decays + i * row, i + 1, T(1));
        until_end = since_start;
    }
};

/// Reads the keys, values and rates of the chunk that begins at `start`. The values become the corrections' first content.
template <class T>
void load(
    const RuleSizes& s, Chunk<T>& x, index item, index head, index start, index first, index columns, const Tensor& k, const Tensor& v,
    const Tensor& beta
) {
    x.count = std::min<index>(s.chunk_size, s.time - start);
    for (index i = 0; i < x.count; ++i) {
        std::memcpy(x.key + i * s.head_dim, at<T>(k, item, head, start + i), s.head_dim * sizeof(T));
        x.rates[i] = *at<T>(beta, item, head, start + i);
    }
    x.next_key = at<T>(k, item, head, start + x.count), x.key_row = k.row;
    x.next_value = at<T>(v, item, head, start + x.count) + first, x.value_row = v.row;
    pack_transposed(x.key, s.head_dim, s.head_dim, x.count, x.keys);
    pack(at<T>(v, item, head, start) + first, v.row, x.count, columns, x.corrections);
}

/// D and γ from log α. e^log α below the smallest normal number is 0 already at −800, so a sum of what is cut off there is the same,
/// and −∞ − (−∞) does not arise. Sums are in float64, kept as two numbers: what decays is a difference of sums.
template <class T>
void decay(Chunk<T>& x, const Tensor& log_alpha, index item, index head, index start, Scratch<T> scratch) {
    T *high = scratch.take(x.row), *low = scratch.take(x.row);
    std::fill_n(high, x.row, T(0)), std::fill_n(low, x.row, T(0));
    double sum = 0;
    for (index i = 0; i < x.count; ++i) {
        sum += std::max(double(*at<T>(log_alpha, item, head, start + i)), -800.0);
        high[i] = T(sum), low[i] = T(sum - double(high[i]));
    }
    for (index j = 0; j < x.count; j += LANES<T>) {
        vector(x.since_start + j) = exponential(vector(high + j) + vector(low + j));
        vector(x.minus_since_start + j) = -vector(x.since_start + j);
    }
    x.since_start[x.count - 1] = T(std::exp(sum));  // exact: its error would grow with the number of chunks
    for (index i = 0; i < x.count; ++i) {
        T* to = x.decays + i * x.row;
        for (index j = 0; j <= i; j += LANES<T>)
            vector(to + j) = exponential((high[i] - vector(high + j)) + (low[i] - vector(low + j)));
        std::fill(to + i + 1, to + x.row, T(0));
    }
    x.until_end = x.decays + (x.count - 1) * x.row;
}

/// sign · (rows Yᵀ ⊙ D) of M rows and VECTORS vectors of columns; Yᵀ is packed.
template <class T, int M, int VECTORS>
void decayed_products(const T* rows, index stride, const T* packed, index depth, const T* decays, index row, T sign, T* to) {
    Tile<T, M, VECTORS> tile;
    tile.add_product(rows, stride, 1, packed, depth);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) tile.sum[i][j] *= vector(decays + i * row + j * LANES<T>) * sign;
    tile.store(to, row, WIDTH<T>);
}

/// The same for the first `visible` columns; to and decays have rows of the same length.
template <class T, int M>
void decayed_products(
    const T* rows, index stride, const T* packed, index depth, const T* decays, index row, index visible, T sign, T* to
) {
    for (index column = 0; column < visible; column += WIDTH<T>, packed += WIDTH<T> * depth) {
        if (visible - column > LANES<T>) decayed_products<T, M, 2>(rows, stride, packed, depth, decays + column, row, sign, to + column);
        else decayed_products<T, M, 1>(rows, stride, packed, depth, decays + column, row, sign, to + column);
    }
}

/// Solves (I − lower) X = tile in registers, lower [M, ROWS] strictly lower triangular; if REVERSED, strictly upper triangular.
template <bool REVERSED, class T, int M, int STEP = 0>
__attribute__((always_inline)) inline void substitute(Tile<T, M>& tile, const T* lower) {
    if constexpr (STEP + 1 < M) {
        constexpr int source = REVERSED ? M - 1 - STEP : STEP;
#pragma GCC unroll 12
        for (int step = STEP + 1; step < M; ++step) {
            const int target = REVERSED ? M - 1 - step : step;
            tile.sum[target][0] += lower[target * ROWS + source] * tile.sum[source][0];
            tile.sum[target][1] += lower[target * ROWS + source] * tile.sum[source][1];
        }
        substitute<REVERSED, T, M, STEP + 1>(tile, lower);
    } else {
        operations += M * (M - 1) * WIDTH<T>;
    }
}

template <class T, int M>
__attribute__((always_inline)) inline void add_rows(Tile<T, M>& tile, const T* from) {
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i)
        tile.sum[i][0] += vector(from + i * WIDTH<T>), tile.sum[i][1] += vector(from + i * WIDTH<T> + LANES<T>);
}

/// X, E and the decayed E of a chunk, whose corrections hold V.
template <class T>
void solve(const RuleSizes& s, Chunk<T>& x, index columns) {
    by_rows(x.count, [&](index i, auto m) {
        for (int a = 0; a < m; ++a) {
            fetch(x.next_key + (i + a) * x.key_row, s.head_dim);
            fetch(x.next_value + (i + a) * x.value_row, columns);
        }
        const T* key = x.key + i * s.head_dim;
        T* overlaps = x.overlaps + i * x.row;
        decayed_products<T, m()>(key, s.head_dim, x.keys, s.head_dim, x.decays + i * x.row, x.row, i + m, T(-1), overlaps);
        T lower[ROWS * ROWS];
        for (int a = 1; a < m; ++a)
            for (int b = 0; b < a; ++b) lower[a * ROWS + b] = overlaps[a * x.row + i + b] * x.rates[i + b];
        for (index column = 0; column < columns; column += WIDTH<T>) {
            const index place = column * x.count + i * WIDTH<T>;
            Tile<T, m()> tile;
            if (x.has_state) {
                tile.add_product(key, s.head_dim, 1, x.state + column * s.head_dim, s.head_dim);
                tile.scale_rows(x.minus_since_start + i);
            }
            tile.add_product(overlaps, x.row, 1, x.corrections + column * x.count, i);
            add_rows(tile, x.corrections + place);
            substitute<false>(tile, lower);
            if (x.solutions) tile.store(x.solutions + place, WIDTH<T>, WIDTH<T>);
            tile.scale_rows(x.rates + i);
            tile.store(x.corrections + place, WIDTH<T>, WIDTH<T>);
            if (x.decayed == x.corrections) continue;
            tile.scale_rows(x.until_end + i);
            tile.store(x.decayed + place, WIDTH<T>, WIDTH<T>);
        }
    });
}

/// Writes the state after a chunk to `next`, which may be the chunk's own.
template <class T>
void advance(const RuleSizes& s, const Chunk<T>& x, index columns, T* next) {
    T remaining[ROWS];
    std::fill_n(remaining, ROWS, x.since_start[x.count - 1]);
    for (index column = 0; column < columns; column += WIDTH<T>)
        by_rows(s.head_dim, [&](index f, auto m) {
            const index place = column * s.head_dim + f * WIDTH<T>;
            Tile<T, m()> tile;
            if (x.has_state) {
                add_rows(tile, x.state + place);
                tile.scale_rows(remaining);
            }
            tile.add_product(x.key + f, 1, s.head_dim, x.decayed + column * x.count, x.count);
            tile.store(next + place, WIDTH<T>, WIDTH<T>);
        });
}

template <class T>
index delta_rule(
    const RuleSizes& s, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor log_alpha, Tensor initial, Tensor out, Tensor final,
    Tensor starts, T* memory
) {
    const index group = s.heads / s.kv_heads, d = s.head_dim, teams = s.kv_heads / s.together;
    return in_parallel(s.batch * teams * s.parts, s, memory, [&](index task, Scratch<T> scratch) {
        const index part = task % s.parts, first_head = task / s.parts % teams * s.together, item = task / s.parts / teams;
        const index first = part * s.columns<T>(), columns = std::min<index>(s.columns<T>(), s.value_dim - first);
        if (columns <= 0) return;
        Chunk<T> x(s, columns, log_alpha.data, false, scratch);
        T* scores = scratch.take(ROWS * x.row);
        const index size = d * padded<T>(columns);
        T* states = scratch.take(s.together * size);
        for (index own = 0; own < s.together; ++own) {
            if (initial.data) pack(at<T>(initial, item, first_head + own, 0) + first, initial.row, d, columns, states + own * size);
            else if (starts.data) std::fill_n(states + own * size, size, T(0));
        }
        for (index number = 0, start = 0; start < s.time; ++number, start += s.chunk_size)
            for (index own = 0; own < s.together; ++own) {
                const index kv_head = first_head + own;
                x.state = states + own * size;
                x.has_state = initial.data || number > 0;
                if (starts.data && number % SEGMENT == 0)
                    std::copy_n(x.state, size, at<T>(starts, item, kv_head, number / SEGMENT) + first * d);
                load(s, x, item, kv_head, start, first, columns, k, v, beta);
                if (log_alpha.data) decay(x, log_alpha, item, kv_head, start, scratch);
                solve(s, x, columns);
                for (index head = kv_head * group; head < (kv_head + 1) * group; ++head)
                    by_rows(x.count, [&](index i, auto m) {
                        const T* query = at<T>(q, item, head, start + i);
                        for (int a = 0; a < m; ++a) {
                            const index next = start + s.chunk_size + i + a;
                            fetch(at<T>(q, item, head, next), d);
                            fetch(at<T>(out, item, head, next) + first, columns);
                        }
                        decayed_products<T, m()>(
                            query, q.row, x.keys, d, x.decays + i * x.row, x.row, i + m, T(1), scores
                        );
                        for (index column = 0; column < columns; column += WIDTH<T>) {
                            Tile<T, m()> tile;
                            if (x.has_state) {
                                tile.add_product(query, q.row, 1, x.state + column * d, d);
                                tile.scale_rows(x.since_start + i);
                            }
                            tile.add_product(scores, x.row, 1, x.corrections + column * x.count, i + m);
                            tile.store(at<T>(out, item, head, start + i) + first + column, out.row, columns - column);
                        }
                    });
                if (start + x.count < s.time || final.data) advance(s, x, columns, x.state);
            }
        for (index own = 0; own < s.together && final.data; ++own)
            unpack(states + own * size, d, columns, at<T>(final, item, first_head + own, 0) + first, final.row);
    });
}

// --- backward -------------------------------------------------------------------------------------

/// `by_rows` from the last row to the first.
template <int M = ROWS, class Body>
inline void by_rows_backwards(index rows, Body&& body) {
    for (; rows >= M; rows -= M) body(rows - M, std::integral_constant<int, M>{});
    if constexpr (M > 1) by_rows_backwards<(M > 4 ? 4 : M > 2 ? 2 : 1)>(rows, body);
}

/// Packs the transpose of x [count, columns], which is packed itself.
template <class T>
void transpose_packed(const T* x, index count, index columns, T* packed) {
    for (index column = 0; column < columns; column += WIDTH<T>)
        for (index start = 0; start < count; start += WIDTH<T>) {
            const index depth = std::min<index>(WIDTH<T>, columns - column), wide = std::min<index>(WIDTH<T>, count - start);
            pack_transposed(x + column * count + start * WIDTH<T>, WIDTH<T>, depth, wide, packed + start * columns + column * WIDTH<T>);
        }
}

/// Σ x y, not yet summed over lanes.
template <class T>
Vector<T> lane_products(const T* x, const T* y, index size) {
    Vector<T> sum{};
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) sum += vector(x + i) * vector(y + i);
    for (; i < size; ++i) sum[0] += x[i] * y[i];
    return sum;
}

/// Sums over the lanes of each of `count` vectors; there is room for whole vectors of sums, and memory behind the last vector.
template <class T>
void sum_lanes(const T* vectors, index count, T* sums) {
    for (index start = 0; start < count; start += LANES<T>) {
        Vector<T> block[LANES<T>];
        for (int i = 0; i < LANES<T>; ++i) block[i] = vector(vectors + (start + i) * LANES<T>);
        vector(sums + start) = reduce<T>(block, [](Vector<T> a, Vector<T> b) { return a + b; });
    }
}

/// What the backward pass holds beside the chunks of a segment: dS, and of one chunk, its tensors in other orders and gradients.
template <class T>
struct Gradients {
    T *state, *state_by_value, *start_by_value;            // dS packed [d, e]; dSᵀ and Sᵀ packed [e, d]
    T *keys_by_token, *corrections_by_value, *decayed;     // K packed [c, d]; Eᵀ packed [e, c]; rows of diag(γ_c / γ) E [c, e]
    T *query, *queries, *outputs, *decayed_outputs;        // Q [c, d], and packed; dO and Γ dO packed [c, e]
    T *weights, *scores, *overlaps;                        // Q Kᵀ ⊙ D, and the gradients of Q Kᵀ and of K Kᵀ [c, c]
    T *corrections, *values, *minus_decayed_values;        // dE, then W = (I + a diag(β))⁻ᵀ dE; dV = diag(β) W; −Γ dV; packed [c, e]
    T *log_decays, *rates;                                 // Σ q dq − v dv and Σ W X of each token, in lanes [c, LANES]
    T *token;                                              // one number a token

    Gradients(const RuleSizes& s, index row, Scratch<T>& scratch) {
        const index c = s.chunk_size, d = s.head_dim, e = s.value_dim, wide_d = padded<T>(d), wide_e = padded<T>(e);
        for (T** x : {&state, &state_by_value, &start_by_value}) *x = scratch.take(std::max(d * wide_e, e * wide_d));
        for (T** x : {&keys_by_token, &query, &queries}) *x = scratch.take(c * wide_d);
        for (T** x : {&decayed, &outputs, &decayed_outputs, &corrections, &values, &minus_decayed_values}) *x = scratch.take(c * wide_e);
        for (T** x : {&weights, &scores, &overlaps}) *x = scratch.take(c * row);
        corrections_by_value = scratch.take(e * row);
        for (T** x : {&log_decays, &rates}) *x = scratch.take(row * LANES<T>);
        token = scratch.take(row);
    }
};

/// One query head's part: dQ, and what it adds to dE, to dK and, after the decay of the chunk if it is the `first` head, to dS.
template <class T>
void query_backward(
    const RuleSizes& s, const Chunk<T>& x, Gradients<T>& g, const Tensor& q, const Tensor& d_out, const Tensor& d_q, const Tensor& d_k,
    index item, index head, index kv_head, index start, bool first, bool has_gradient
) {
    const index d = s.head_dim, e = s.value_dim, count = x.count, row = x.row;
    const T* d_rows = at<T>(d_out, item, head, start);
    for (index i = 0; i < count; ++i) std::memcpy(g.query + i * d, at<T>(q, item, head, start + i), d * sizeof(T));
    pack(g.query, d, count, d, g.queries);
    pack(d_rows, d_out.row, count, e, g.outputs);
    for (index column = 0; column < e; column += WIDTH<T>)
        for (index i = 0; i < count; ++i) {
            const index place = column * count + i * WIDTH<T>;
            scaled(g.outputs + place, x.since_start[i], WIDTH<T>, g.decayed_outputs + place);
        }
    by_rows(count, [&](index i, auto m) {
        const T *query = g.query + i * d, *d_row = d_rows + i * d_out.row, *decays = x.decays + i * row;
        for (int a = 0; a < m; ++a) {
            const index earlier = start - s.chunk_size + i + a;
            fetch(at<T>(q, item, head, earlier), d);
            fetch(at<T>(d_out, item, head, earlier), e);
            fetch(at<T>(d_q, item, head, earlier), d);
        }
        decayed_products<T, m()>(query, d, x.keys, d, decays, row, i + m, T(1), g.weights + i * row);
        decayed_products<T, m()>(d_row, d_out.row, g.corrections_by_value, e, decays, row, i + m, T(1), g.scores + i * row);
        T* d_query = at<T>(d_q, item, head, start + i);
        for (index column = 0; column < d; column += WIDTH<T>) {
            Tile<T, m()> tile;
            if (x.has_state) {
                tile.add_product(d_row, d_out.row, 1, g.start_by_value + column * e, e);
                tile.scale_rows(x.since_start + i);
            }
            tile.add_product(g.scores + i * row, row, 1, g.keys_by_token + column * count, i + m);
            tile.store(d_query + column, d_q.row, d - column);
        }
        for (int a = 0; a < m; ++a)
            vector(g.log_decays + (i + a) * LANES<T>) += lane_products(query + a * d, d_query + a * d_q.row, d);
    });
    by_rows(count, [&](index j, auto m) {
        for (index column = 0; column < e; column += WIDTH<T>) {
            Tile<T, m()> tile;
            const index place = column * count + j * WIDTH<T>;
            tile.add_product(g.weights + j * row + j, 1, row, g.outputs + place, count - j);
            tile.store(g.corrections + place, WIDTH<T>, WIDTH<T>, true);
        }
        for (index column = 0; column < d; column += WIDTH<T>) {
            Tile<T, m()> tile;
            tile.add_product(g.scores + j * row + j, 1, row, g.queries + column * count + j * WIDTH<T>, count - j);
            tile.store(at<T>(d_k, item, kv_head, start + j) + column, d_k.row, d - column, !first);
        }
    });
    if (!x.has_state) return;  // nobody asks for dS
    T remaining[ROWS];
    std::fill_n(remaining, ROWS, first ? x.since_start[count - 1] : T(1));
    by_rows(d, [&](index f, auto m) {
        for (index column = 0; column < e; column += WIDTH<T>) {
            Tile<T, m()> tile;
            T* to = g.state + column * d + f * WIDTH<T>;
            if (has_gradient || !first) {
                add_rows(tile, to);
                tile.scale_rows(remaining);
            }
            tile.add_product(g.query + f, 1, d, g.decayed_outputs + column * count, count);
            tile.store(to, WIDTH<T>, WIDTH<T>);
        }
    });
}

/// Solves for W, and writes dV = diag(β) W.
template <class T>
void solve_backward(const RuleSizes& s, const Chunk<T>& x, Gradients<T>& g, T* d_value, index d_value_row) {
    by_rows_backwards(x.count, [&](index i, auto m) {
        const index after = i + m;
        T upper[ROWS * ROWS];
        for (int b = 1; b < m; ++b)
            for (int a = 0; a < b; ++a) upper[a * ROWS + b] = x.overlaps[(i + b) * x.row + i + a] * x.rates[i + b];
        for (index column = 0; column < s.value_dim; column += WIDTH<T>) {
            const index panel = column * x.count, place = panel + i * WIDTH<T>;
            Tile<T, m()> tile;
            tile.add_product(x.overlaps + after * x.row + i, 1, x.row, g.values + panel + after * WIDTH<T>, x.count - after);
            add_rows(tile, g.corrections + place);
            substitute<true>(tile, upper);
            tile.store(g.corrections + place, WIDTH<T>, WIDTH<T>);
            tile.scale_rows(x.rates + i);
            tile.store(g.values + place, WIDTH<T>, WIDTH<T>);
            tile.store(d_value + i * d_value_row + column, d_value_row, s.value_dim - column);
            tile.scale_rows(x.minus_since_start + i);
            tile.store(g.minus_decayed_values + place, WIDTH<T>, WIDTH<T>);
        }
    });
}

/// With W, gradients are dβ_i = W_i · X_i, d log α_t = Σ_{i >= t} (q_i · dq_i − v_i · dv_i) + ⟨S, dS⟩ at the end of the chunk, and
/// those of the products: dE = (Q Kᵀ ⊙ D)ᵀ dO + diag(γ_c / γ) K dS', dQ = Γ dO Sᵀ + (dO Eᵀ ⊙ D) K,
/// dK = (dO Eᵀ ⊙ D)ᵀ Q − Γ dV Sᵀ + diag(γ_c / γ) E dS'ᵀ + (N + Nᵀ) K with N = −tril(dV Eᵀ ⊙ D, −1), and
/// dS = γ_c dS' + Qᵀ Γ dO − Kᵀ Γ dV, where dS' belongs to the next chunk's state.
template <class T>
index delta_rule_backward(
    const RuleSizes& s, Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor log_alpha, Tensor initial, Tensor starts,
    Tensor final, Tensor d_final, Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_beta, Tensor d_log_alpha, Tensor d_initial, T* memory
) {
    const index group = s.heads / s.kv_heads, d = s.head_dim, e = s.value_dim, size = d * padded<T>(e);
    const double forgotten = std::log(std::numeric_limits<T>::min());
    return in_parallel(s.batch * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index kv_head = task % s.kv_heads, item = task / s.kv_heads;
        Chunk<T> segment[SEGMENT];
        for (Chunk<T>& x : segment) x = Chunk<T>(s, e, log_alpha.data, true, scratch);
        const index row = segment[0].row;
        Gradients<T> g(s, row, scratch);
        bool has_gradient = d_final.data;
        T inner = 0;  // ⟨S, dS⟩ after the chunk
        if (has_gradient) {
            pack(at<T>(final, item, kv_head, 0), final.row, d, e, segment[0].state);
            pack(at<T>(d_final, item, kv_head, 0), d_final.row, d, e, g.state);
            inner = total<T>(lane_products(segment[0].state, g.state, size));
        }
        for (index stop = s.chunks(); stop > 0;) {
            const index begin = (stop - 1) / SEGMENT * SEGMENT;
            std::copy_n(at<T>(starts, item, kv_head, begin / SEGMENT), size, segment[0].state);
            for (index number = begin; number < stop; ++number) {
                Chunk<T>& x = segment[number - begin];
                const index start = number * s.chunk_size;
                x.has_state = initial.data || number > 0;
                load(s, x, item, kv_head, start, 0, e, k, v, beta);
                if (log_alpha.data) decay(x, log_alpha, item, kv_head, start, scratch);
                solve(s, x, e);
                if (number + 1 < stop) advance(s, x, e, segment[number + 1 - begin].state);
            }
            for (; stop > begin; --stop) {
                const Chunk<T>& x = segment[stop - 1 - begin];
                const index start = (stop - 1) * s.chunk_size, count = x.count;
                std::fill_n(g.log_decays, count * LANES<T>, T(0));
                pack(x.key, d, count, d, g.keys_by_token);
                unpack(x.decayed, count, e, g.decayed, e);
                transpose_packed(x.corrections, count, e, g.corrections_by_value);
                if (x.has_state) transpose_packed(x.state, d, e, g.start_by_value);
                if (has_gradient) {
                    transpose_packed(g.state, d, e, g.state_by_value);
                    by_rows(count, [&](index i, auto m) {
                        for (index column = 0; column < e; column += WIDTH<T>) {
                            Tile<T, m()> tile;
                            tile.add_product(x.key + i * d, d, 1, g.state + column * d, d);
                            tile.scale_rows(x.until_end + i);
                            tile.store(g.corrections + column * count + i * WIDTH<T>, WIDTH<T>, WIDTH<T>);
                        }
                    });
                } else {
                    std::fill_n(g.corrections, count * padded<T>(e), T(0));
                }
                for (index head = kv_head * group; head < (kv_head + 1) * group; ++head)
                    query_backward(
                        s, x, g, q, d_out, d_q, d_k, item, head, kv_head, start, head == kv_head * group, has_gradient
                    );
                T* d_value = at<T>(d_v, item, kv_head, start);
                solve_backward(s, x, g, d_value, d_v.row);
                by_rows(count, [&](index i, auto m) {
                    T* overlaps = g.overlaps + i * row;
                    for (int a = 0; a < m; ++a) {
                        const index earlier = start - s.chunk_size + i + a;
                        fetch(at<T>(d_k, item, kv_head, earlier), d);
                        fetch(at<T>(d_v, item, kv_head, earlier), e);
                    }
                    decayed_products<T, m()>(
                        d_value + i * d_v.row, d_v.row, g.corrections_by_value, e, x.decays + i * row, row, i + m, T(-1), overlaps
                    );
                    for (int a = 0; a < m; ++a) overlaps[a * row + i + a] = 0;
                });
                by_rows(count, [&](index j, auto m) {
                    for (index column = 0; column < d; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        if (x.has_state) {
                            tile.add_product(d_value + j * d_v.row, d_v.row, 1, g.start_by_value + column * e, e);
                            tile.scale_rows(x.minus_since_start + j);
                        }
                        if (has_gradient) tile.add_product(g.decayed + j * e, e, 1, g.state_by_value + column * e, e);
                        const T* keys = g.keys_by_token + column * count;
                        tile.add_product(g.overlaps + j * row, row, 1, keys, j + m);
                        tile.add_product(g.overlaps + j * row + j, 1, row, keys + j * WIDTH<T>, count - j);
                        tile.store(at<T>(d_k, item, kv_head, start + j) + column, d_k.row, d - column, true);
                    }
                });
                if (x.has_state) by_rows(d, [&](index f, auto m) {
                    for (index column = 0; column < e; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        T* to = g.state + column * d + f * WIDTH<T>;
                        tile.add_product(x.key + f, 1, d, g.minus_decayed_values + column * count, count);
                        tile.store(to, WIDTH<T>, WIDTH<T>, true);
                    }
                });
                for (index i = 0; i < count; ++i) {
                    Vector<T> along{};
                    for (index place = i * WIDTH<T>; place < count * padded<T>(e); place += count * WIDTH<T>)
                        along += lane_products(g.corrections + place, x.solutions + place, WIDTH<T>);
                    vector(g.rates + i * LANES<T>) = along;
                    vector(g.log_decays + i * LANES<T>) -=
                        lane_products(at<T>(v, item, kv_head, start + i), d_value + i * d_v.row, e);
                }
                sum_lanes(g.rates, count, g.token);
                for (index i = 0; i < count; ++i) *at<T>(d_beta, item, kv_head, start + i) = g.token[i];
                if (log_alpha.data) {
                    sum_lanes(g.log_decays, count, g.token);
                    for (index i = count - 1; i >= 0; --i) {
                        inner += g.token[i];
                        const bool reset = *at<T>(log_alpha, item, kv_head, start + i) < forgotten;
                        *at<T>(d_log_alpha, item, kv_head, start + i) = reset ? T(0) : inner;
                    }
                    inner = x.has_state ? total<T>(lane_products(g.state, x.state, size)) : T(0);
                }
                has_gradient = true;
            }
        }
        if (d_initial.data) unpack(g.state, d, e, at<T>(d_initial, item, kv_head, 0), d_initial.row);
    });
}

}  // namespace

#define FUNCTIONS(TYPE, T)                                                                                                     \
    FUNCTION(delta_rule, RuleSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8])                             \
    FUNCTION(                                                                                                                  \
        delta_rule_backward, RuleSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11],     \
        x[12], x[13], x[14], x[15]                                                                                             \
    )
extern "C" {
FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
}
