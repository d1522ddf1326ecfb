// BSBR on a CPU, one chunk of one head at a time: all that a chunk needs stays in the cache of one core, every product
// runs in registers, and only results go to memory. `bsbr/native.py` compiles this file and says what the functions compute.
//
// A product takes its right operand *packed*: in panels of WIDTH columns, one after the other, each row of a panel
// contiguous, zeros behind the last column. Its left operand stays where it is, under any two strides.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <omp.h>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, ROWS = 12;  // of a vector; of a tile: ROWS x 2 sums and what feeds them fill 32 registers
#else
constexpr int BYTES = 32, ROWS = 6;  // 16 registers of AVX2; 32 of half the size of NEON
#endif

using index = std::ptrdiff_t;

template <class T>
struct Lanes {
    typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
using Vector = typename Lanes<T>::type;
template <class T>
constexpr int LANES = BYTES / sizeof(T);
template <class T>
constexpr int WIDTH = 2 * LANES<T>;

template <class T>
Vector<T>& vector(T* at) {
    return *reinterpret_cast<Vector<T>*>(at);
}
template <class T>
const Vector<T>& vector(const T* at) {
    return *reinterpret_cast<const Vector<T>*>(at);
}

index panels(index columns, index width) { return (columns + width - 1) / width; }

// --- products -----------------------------------------------------------------------------------

/// Floating point operations of this thread's products; a test holds them against what BSBR declares.
thread_local index operations;

/// Sums of M rows and WIDTH columns, in registers.
template <class T, int M>
struct Tile {
    Vector<T> sum[M][2];

    Tile() : sum{} {}

    /// += left [M, depth] right [depth, WIDTH]; left(i, k) lies at i * row + k * step.
    /// A function of its own, so that the compiler keeps all sums in registers.
    __attribute__((noinline)) void add_product(const T* left, index row, index step, const T* right, index depth) {
        operations += 2 * M * WIDTH<T> * depth;
        Vector<T> local[M][2];
#pragma GCC unroll 12
        for (int i = 0; i < M; ++i) local[i][0] = sum[i][0], local[i][1] = sum[i][1];
        for (index k = 0; k < depth; ++k, left += step, right += WIDTH<T>) {
            Vector<T> first = vector(right), second = vector(right + LANES<T>);
#pragma GCC unroll 12
            for (int i = 0; i < M; ++i) {
                local[i][0] += left[i * row] * first;
                local[i][1] += left[i * row] * second;
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < M; ++i) sum[i][0] = local[i][0], sum[i][1] = local[i][1];
    }

    __attribute__((always_inline)) void scale_rows(const T* by) {
#pragma GCC unroll 12
        for (int i = 0; i < M; ++i) sum[i][0] *= by[i], sum[i][1] *= by[i];
    }

    /// Writes `columns` of it, at most WIDTH, or adds them to what is there.
    __attribute__((always_inline)) void store(T* to, index row, index columns, bool add = false) {
        if (columns >= WIDTH<T>) {
            if (add) {
#pragma GCC unroll 12
                for (int i = 0; i < M; ++i) sum[i][0] += vector(to + i * row), sum[i][1] += vector(to + i * row + LANES<T>);
            }
#pragma GCC unroll 12
            for (int i = 0; i < M; ++i) vector(to + i * row) = sum[i][0], vector(to + i * row + LANES<T>) = sum[i][1];
            return;
        }
        T rows[M][WIDTH<T>];
#pragma GCC unroll 12
        for (int i = 0; i < M; ++i) vector(rows[i]) = sum[i][0], vector(rows[i] + LANES<T>) = sum[i][1];
        for (int i = 0; i < M; ++i)
            for (index j = 0; j < std::min<index>(columns, WIDTH<T>); ++j) to[i * row + j] = rows[i][j] + (add ? to[i * row + j] : T(0));
    }
};

/// Calls body(first row, number of rows as a constant) for all rows, in blocks of ROWS and smaller ones for what is left.
template <int M = ROWS, class Body>
inline void by_rows(index rows, Body&& body, index start = 0) {
    for (; start + M <= rows; start += M) body(start, std::integral_constant<int, M>{});
    if constexpr (M > 1) by_rows<(M > 4 ? 4 : M > 2 ? 2 : 1)>(rows, body, start);
}

constexpr int AHEAD = 16;  // rows

/// Asks for a row that is read soon: rows of a head lie too far apart for the processor to guess.
template <class T>
inline void fetch(const T* row, index size) {
    for (index i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

/// Packs x [depth, columns], whose rows lie `row` apart.
template <class T>
void pack(const T* x, index row, index depth, index columns, T* packed) {
    for (index start = 0; start < columns; start += WIDTH<T>) {
        const index wide = std::min<index>(WIDTH<T>, columns - start);
        for (index k = 0; k < depth; ++k, packed += WIDTH<T>) {
            const T* from = x + k * row + start;
            if (start == 0) fetch(from + AHEAD * row, columns);
            if (wide == WIDTH<T>) {
                vector(packed) = vector(from), vector(packed + LANES<T>) = vector(from + LANES<T>);
            } else {
                for (index j = 0; j < WIDTH<T>; ++j) packed[j] = j < wide ? from[j] : T(0);
            }
        }
    }
}

/// Packs the transpose of x [columns, depth], whose rows lie `row` apart.
template <class T>
void pack_transposed(const T* x, index row, index depth, index columns, T* packed) {
    for (index start = 0; start < columns; start += WIDTH<T>, packed += depth * WIDTH<T>) {
        const index wide = std::min<index>(WIDTH<T>, columns - start);
        if (wide < WIDTH<T>) std::fill(packed, packed + depth * WIDTH<T>, T(0));
        for (index j = 0; j < wide; ++j) {
            const T* from = x + (start + j) * row;
            fetch(from + AHEAD * row, depth);
            for (index k = 0; k < depth; ++k) packed[k * WIDTH<T> + j] = from[k];
        }
    }
}

/// Writes what was packed [depth, columns] to x, whose rows lie `row` apart.
template <class T>
void unpack(const T* packed, index depth, index columns, T* x, index row) {
    for (index start = 0; start < columns; start += WIDTH<T>) {
        const index wide = std::min<index>(WIDTH<T>, columns - start);
        for (index k = 0; k < depth; ++k, packed += WIDTH<T>) std::copy(packed, packed + wide, x + k * row + start);
    }
}

// --- rows ---------------------------------------------------------------------------------------

inline Vector<float> exponential(Vector<float> x) {
    // e^x = 2^n e^r, |r| <= ln 2 / 2; n sits in the low bits of x / ln 2 + 1.5 * 2^23. Cephes' polynomial, error 1 ulp or so.
    typedef std::int32_t Bits __attribute__((vector_size(BYTES)));
    typedef float Aligned __attribute__((vector_size(BYTES)));
    const float magic = 12582912.f;
    const Aligned shifted = x * 1.44269504f + magic;
    const Aligned n = shifted - magic;
    const Aligned r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Aligned p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const Aligned result = (Aligned)((Bits)p + ((Bits)shifted << 23));
    return x < -87.f ? Vector<float>{} : Vector<float>(result);
}

inline Vector<double> exponential(Vector<double> x) {
    for (int i = 0; i < LANES<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

template <class T>
T total(Vector<T> x) {
    T sum = 0;
    for (int i = 0; i < LANES<T>; ++i) sum += x[i];
    return sum;
}

/// Turns scores [wide] into e^(score - their maximum) of the first `visible`, and 0 behind them. Returns their sum.
template <class T>
T exponentials(T* scores, index visible, index wide) {
    std::fill(scores + visible, scores + wide, -std::numeric_limits<T>::infinity());
    const index end = panels(visible, LANES<T>) * LANES<T>;
    Vector<T> most = vector(scores);
    for (index j = LANES<T>; j < end; j += LANES<T>) {
        const Vector<T> x = vector(scores + j);
        most = x > most ? x : most;
    }
    T maximum = most[0];
    for (int i = 1; i < LANES<T>; ++i) maximum = most[i] > maximum ? most[i] : maximum;
    Vector<T> sum{};
    for (index j = 0; j < end; j += LANES<T>) sum += vector(scores + j) = exponential(vector(scores + j) - maximum);
    std::fill(scores + end, scores + wide, T(0));
    return total<T>(sum);
}

template <class T>
T dot(const T* a, const T* b, index size) {
    Vector<T> sum{};
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) sum += vector(a + i) * vector(b + i);
    T rest = total<T>(sum);
    for (; i < size; ++i) rest += a[i] * b[i];
    return rest;
}

/// to = x * factor
template <class T>
void scaled(const T* x, T factor, index size, T* to) {
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) vector(to + i) = vector(x + i) * factor;
    for (; i < size; ++i) to[i] = x[i] * factor;
}

/// What `unit_norm` multiplies a row with.
template <class T>
T inverse_norm(const T* x, index size) {
    return 1 / std::sqrt(dot(x, x, size) + T(1e-6));
}

/// to = (g - y (y.g)) * inverse: the gradient by x of y = x * inverse(x), from that by y.
template <class T>
void unit_norm_backward(const T* gradient, const T* normed, T inverse, index size, T* to) {
    const T along = dot(gradient, normed, size);
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) vector(to + i) = (vector(gradient + i) - vector(normed + i) * along) * inverse;
    for (; i < size; ++i) to[i] = (gradient[i] - normed[i] * along) * inverse;
}

// --- tensors ------------------------------------------------------------------------------------

}  // namespace

extern "C" {

/// [batch, heads, time, dim], or [batch, heads, chunks, d_r, dim] with its last two contiguous, as one dimension; null
/// where there is none.
struct Tensor {
    void* data;
    std::int64_t item, head, time;  // strides, of elements
};

struct Sizes {
    std::int64_t batch, heads, kv_heads, time, before, chunk_size, overlap, chunks, head_dim, features, normed, threads;
};

/// Of retrieval from `chunks` states, of which the first of `rows` chunks sees `seen`. size: of a state, or how many are chosen.
struct Mixing {
    std::int64_t batch, heads, kv_heads, rows, chunks, seen, size, add, threads;
};

/// Of `size` products of two of `factors` numbers, times min(position / chunk_size, most) of tokens from position `first` on;
/// a chunk_size of 0 leaves that out.
struct Mapping {
    std::int64_t batch, heads, time, factors, size, threads;
};
}

namespace {

template <class T>
T* at(const Tensor& x, index item, index head, index time) {
    return static_cast<T*>(x.data) + item * x.item + head * x.head + time * x.time;
}

/// A chunk: its tokens, and the keys that it sees, counted as q and as k count them.
struct Chunk {
    index start, length, first_key, keys, seen_before;
    Chunk(const Sizes& s, index number) {
        start = number * s.chunk_size;
        length = std::min<index>(s.chunk_size, s.time - start);
        first_key = std::max<index>(0, s.before + start - s.overlap);
        keys = s.before + start + length - first_key;
        seen_before = keys - length;
    }
};

/// Scratch of one thread, handed out in pieces that begin at a cache line.
template <class T>
struct Scratch {
    T* next;
    T* take(index size) {
        T* piece = next;
        next += panels(size, 16) * 16;
        return piece;
    }
};

template <class T>
index padded(index columns) {
    return panels(columns, WIDTH<T>) * WIDTH<T>;
}

/// The distance between rows of scores, with a panel to spare for zeros.
template <class T>
index score_row(index keys) {
    return padded<T>(keys) + 2 * WIDTH<T>;
}

index most_keys(const Sizes& s) { return std::min(s.chunk_size, s.time) + s.overlap; }

/// What one thread needs for the most demanding of the functions, of elements: a whole number of cache lines.
template <class T>
index scratch_size(const Sizes& s) {
    const index keys = padded<T>(most_keys(s)), dim = padded<T>(std::max(s.head_dim, s.features));
    return 6 * keys * dim + dim * dim + 2 * keys * score_row<T>(keys) + 3 * ROWS * score_row<T>(std::max(keys, dim));
}

constexpr index DEPTH = 256, COLUMNS = 128;  // of states that lie in a core's second cache, a panel of them in its first

template <class T>
index scratch_size(const Mixing& s) {
    return std::max<index>(DEPTH * COLUMNS, panels(s.size, 16) * 16);
}

template <class T>
index scratch_size(const Mapping& s) {
    return 3 * (panels(2 * s.factors + s.size + 2 * LANES<T>, 16) * 16);
}

/// Calls body(task, scratch of its thread) for all tasks. Returns the floating point operations of their products.
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

// --- storing ------------------------------------------------------------------------------------

template <class T>
index store(const Sizes& s, Tensor keys, Tensor v, Tensor states, T* memory) {
    const index depth = s.chunk_size;
    return in_parallel(s.batch * s.chunks * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index head = task % s.kv_heads, chunk = task / s.kv_heads % s.chunks, item = task / s.kv_heads / s.chunks;
        const T* key = at<T>(keys, item, head, chunk * depth);
        // Blocks of ROWS features, each [token, ROWS]: what a tile reads together lies together.
        T* blocks = scratch.take((s.features + ROWS) * depth);
        T* line = scratch.take(s.features + ROWS);
        for (index token = 0; token < depth; ++token) {
            const T* row = key + token * keys.time;
            fetch(row + AHEAD * keys.time, s.features);
            scaled(row, s.normed ? inverse_norm(row, s.features) : T(1), s.features, line);
            for (index f = 0; f < s.features; f += ROWS)
                std::memcpy(blocks + f * depth + token * ROWS, line + f, ROWS * sizeof(T));
        }
        T* values = scratch.take(depth * padded<T>(s.head_dim));
        pack(at<T>(v, item, head, chunk * depth), v.time, depth, s.head_dim, values);
        T* state = at<T>(states, item, head, chunk);
        for (index column = 0; column < s.head_dim; column += WIDTH<T>)
            by_rows(s.features, [&](index f, auto m) {
                Tile<T, m()> tile;
                tile.add_product(blocks + f / ROWS * ROWS * depth + f % ROWS, 1, ROWS, values + column * depth, depth);
                tile.store(state + f * s.head_dim + column, s.head_dim, s.head_dim - column);
            });
    });
}

template <class T>
index store_backward(const Sizes& s, Tensor keys, Tensor v, Tensor d_states, Tensor d_keys, Tensor d_v, T* memory) {
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
                const T* from = key + (i + a) * keys.time;
                inverse[a] = s.normed ? inverse_norm(from, s.features) : T(1);
                scaled(from, inverse[a], s.features, stored + a * row);
            }
            for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                Tile<T, m()> tile;
                tile.add_product(stored, row, 1, by_feature + column * s.features, s.features);
                tile.store(d_value + i * d_v.time + column, d_v.time, s.head_dim - column);
            }
            for (index column = 0; column < s.features; column += WIDTH<T>) {
                Tile<T, m()> tile;
                tile.add_product(value + i * v.time, v.time, 1, by_dim + column * s.head_dim, s.head_dim);
                tile.store(gradient + column, row, WIDTH<T>);
            }
            for (int a = 0; a < m; ++a) {
                T* to = d_key + (i + a) * d_keys.time;
                if (s.normed) unit_norm_backward(gradient + a * row, stored + a * row, inverse[a], s.features, to);
                else std::copy(gradient + a * row, gradient + a * row + s.features, to);
            }
        });
    });
}

// --- correcting ---------------------------------------------------------------------------------

/// Of rows [M, size], `apart` from each other: their products with the `packed` columns of panels from `first` on, up to `last`.
template <class T, int M>
void products(const T* rows, index apart, const T* packed, index size, index first, index last, T* to, index to_row) {
    for (index column = first / WIDTH<T> * WIDTH<T>; column < last; column += WIDTH<T>) {
        Tile<T, M> tile;
        tile.add_product(rows, apart, 1, packed + column * size, size);
        tile.store(to + column, to_row, WIDTH<T>);
    }
}

/// Turns x, packed [count, dim], into X of (I + L) X = x, L = tril(diag(rates) K K^T, -1); with `of_columns`,
/// L = tril(K K^T diag(rates), -1): from the last row to the first, that is the system of the gradients.
template <class T>
void substitute(
    const T* key, index apart, const T* rates, bool of_columns, index count, index features, index dim, const T* packed_keys,
    T* weights, T* x
) {
    const index row = score_row<T>(count);
    by_rows(count, [&](index i, auto m) {
        products<T, m()>(key + i * apart, apart, packed_keys, features, 0, i + m, weights, row);
        for (int a = 0; a < m; ++a)
            for (index j = 0; j < i + a; ++j) weights[a * row + j] *= -rates[of_columns ? j : i + a];
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

template <class T>
index correct(const Sizes& s, Tensor keys, Tensor v, Tensor beta, Tensor corrected, T* memory) {
    const index count = s.chunk_size;
    return in_parallel(s.batch * s.chunks * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index head = task % s.kv_heads, chunk = task / s.kv_heads % s.chunks, item = task / s.kv_heads / s.chunks;
        const index start = chunk * count;
        const T* key = at<T>(keys, item, head, start);
        T* packed_keys = scratch.take(s.features * padded<T>(count));
        pack_transposed(key, keys.time, s.features, count, packed_keys);
        T* rates = scratch.take(count);
        T* x = scratch.take(count * padded<T>(s.head_dim));
        pack(at<T>(v, item, head, start), v.time, count, s.head_dim, x);
        for (index i = 0; i < count; ++i) {
            rates[i] = *at<T>(beta, item, head, start + i);
            for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                T* own = x + column * count + i * WIDTH<T>;
                scaled(own, rates[i], WIDTH<T>, own);
            }
        }
        T* weights = scratch.take(ROWS * score_row<T>(count));
        substitute(key, keys.time, rates, false, count, s.features, s.head_dim, packed_keys, weights, x);
        unpack(x, count, s.head_dim, at<T>(corrected, item, head, start), corrected.time);
    });
}

/// W = (I + L)^-T dU. Then dV = diag(beta) W, dL = -tril(W U^T, -1), and the gradients of beta and K are those of L.
template <class T>
index correct_backward(
    const Sizes& s, Tensor keys, Tensor v, Tensor beta, Tensor corrected, Tensor gradient, Tensor d_keys, Tensor d_v, Tensor d_beta,
    T* memory
) {
    const index count = s.chunk_size, dim = s.head_dim, row = score_row<T>(count);
    return in_parallel(s.batch * s.chunks * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index head = task % s.kv_heads, chunk = task / s.kv_heads % s.chunks, item = task / s.kv_heads / s.chunks;
        const index start = chunk * count, last = start + count - 1;
        const T *key = at<T>(keys, item, head, start), *last_key = at<T>(keys, item, head, last);
        const T *value = at<T>(v, item, head, start), *u = at<T>(corrected, item, head, start);
        T* packed_keys = scratch.take(s.features * padded<T>(count));
        T *rates = scratch.take(count), *x = scratch.take(count * padded<T>(dim)), *weights = scratch.take(ROWS * row);
        for (index i = 0; i < count; ++i) rates[i] = *at<T>(beta, item, head, last - i);
        pack_transposed(last_key, -keys.time, s.features, count, packed_keys);
        pack(at<T>(gradient, item, head, last), -gradient.time, count, dim, x);
        substitute(last_key, -keys.time, rates, true, count, s.features, dim, packed_keys, weights, x);
        std::reverse(rates, rates + count);
        T* w = scratch.take(count * dim);
        unpack(x, count, dim, w + (count - 1) * dim, -dim);

        pack_transposed(key, keys.time, s.features, count, packed_keys);
        T* columns_of_u = scratch.take(dim * padded<T>(count));
        T* columns_of_w = scratch.take(dim * padded<T>(count));
        pack_transposed(u, corrected.time, dim, count, columns_of_u);
        pack_transposed(w, dim, dim, count, columns_of_w);
        T* rows_of_keys = scratch.take(count * padded<T>(s.features));
        pack(key, keys.time, count, s.features, rows_of_keys);
        T *before = scratch.take(ROWS * row), *after = scratch.take(ROWS * row);
        by_rows(count, [&](index i, auto m) {
            products<T, m()>(key + i * keys.time, keys.time, packed_keys, s.features, 0, i + m, weights, row);
            products<T, m()>(w + i * dim, dim, columns_of_u, dim, 0, i + m, before, row);
            products<T, m()>(u + i * corrected.time, corrected.time, columns_of_w, dim, i, count, after, row);
            for (int a = 0; a < m; ++a) {
                T *earlier = before + a * row, *later = after + a * row;
                const T* own = w + (i + a) * dim;
                scaled(own, rates[i + a], dim, at<T>(d_v, item, head, start + i + a));
                *at<T>(d_beta, item, head, start + i + a) =
                    dot(own, value + (i + a) * v.time, dim) - dot(earlier, weights + a * row, i + a);
                for (index j = 0; j < i + a; ++j) earlier[j] *= -rates[i + a];
                earlier[i + a] = 0;
                for (index j = i + a + 1; j < count; ++j) earlier[j] = later[j] * -rates[j];
            }
            for (index column = 0; column < s.features; column += WIDTH<T>) {
                Tile<T, m()> tile;
                tile.add_product(before, row, 1, rows_of_keys + column * count, count);
                tile.store(at<T>(d_keys, item, head, start + i) + column, d_keys.time, s.features - column);
            }
        });
    });
}

// --- mixing -------------------------------------------------------------------------------------

/// How many of the chunks row i of all rows sees.
inline index seen_by(const Mixing& s, index i) { return std::clamp<index>(s.seen + i, 0, s.chunks); }

template <class T>
index choose(const Mixing& s, Tensor scores, Tensor chosen, T* memory) {
    return in_parallel(s.batch * s.heads * s.rows, s, memory, [&](index task, Scratch<T> scratch) {
        const index row = task % s.rows, head = task / s.rows % s.heads, item = task / s.rows / s.heads;
        const T* score = at<T>(scores, item, head, row);
        std::int64_t* best = at<std::int64_t>(chosen, item, head, row);
        T* highest = scratch.take(s.size);
        index found = 0;
        const index seen = seen_by(s, row);
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

template <class T>
index mix(const Mixing& s, Tensor weights, Tensor states, Tensor mixed, T* memory) {
    const index group = s.heads / s.kv_heads, parts = panels(s.size, COLUMNS);
    return in_parallel(s.batch * s.kv_heads * parts, s, memory, [&](index task, Scratch<T> scratch) {
        const index first = task % parts * COLUMNS, kv_head = task / parts % s.kv_heads, item = task / parts / s.kv_heads;
        const index columns = std::min<index>(COLUMNS, s.size - first);
        T* packed = scratch.take(DEPTH * COLUMNS);
        for (index start = 0; start < s.chunks; start += DEPTH) {
            const index depth = std::min<index>(DEPTH, s.chunks - start);
            pack(at<T>(states, item, kv_head, start) + first, states.time, depth, columns, packed);
            for (index head = kv_head * group; head < (kv_head + 1) * group; ++head)
                by_rows(s.rows, [&](index i, auto m) {
                    // A row sees one chunk more than the row before it; what its tile sees beyond that weighs 0.
                    const index visible = std::clamp<index>(seen_by(s, i + m - 1) - start, 0, depth);
                    if (visible == 0 && (s.add || start)) return;
                    const T* weight = at<T>(weights, item, head, i) + start;
                    for (index column = 0; column < columns; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(weight, weights.time, 1, packed + column * depth, visible);
                        tile.store(at<T>(mixed, item, head, i) + first + column, mixed.time, columns - column, s.add || start);
                    }
                });
        }
    });
}

// --- features -----------------------------------------------------------------------------------

/// Calls body(item, head, token, the token's numbers at unit length, twice in a row, what made them so, room for as many and all
/// features) for all tokens of all heads.
template <class T, class Body>
index of_units(const Mapping& s, const Tensor& x, T* memory, Body&& body) {
    constexpr index TOKENS = 64;  // of a task
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

/// What products of numbers that stand `apart` are taken times: √2, so that those of i and j and of j and i are one.
template <class T>
T weight(bool apart) {
    return apart ? std::sqrt(T(2)) : T(1);
}

template <class T>
index quadratic(const Mapping& s, Tensor x, Tensor features, T* memory) {
    return of_units(s, x, memory, [&](index item, index head, index token, const T* unit, T, T* line) {
        // Whole vectors: what they write behind their step, the next step writes over.
        for (index step = 0; step * s.factors < s.size; ++step) {
            const T factor = weight<T>(step);
            for (index i = 0; i < s.factors; i += LANES<T>)
                vector(line + step * s.factors + i) = vector(unit + i) * vector(unit + step + i) * factor;
        }
        std::memcpy(at<T>(features, item, head, token), line, s.size * sizeof(T));
    });
}

template <class T>
index quadratic_backward(const Mapping& s, Tensor d_features, Tensor x, Tensor d_x, T* memory) {
    return of_units(s, x, memory, [&](index item, index head, index token, const T* unit, T inverse, T* d_unit) {
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

// --- attending ----------------------------------------------------------------------------------

/// Scores of M queries, from `query` on, with the first `visible` keys at least.
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

template <class T>
index attend(const Sizes& s, Tensor q, Tensor k, Tensor v, Tensor features, Tensor retrieved, Tensor out, T* memory) {
    const index row = score_row<T>(most_keys(s)), group = s.heads / s.kv_heads;
    const T scale = 1 / std::sqrt(T(s.head_dim));
    return in_parallel(s.batch * s.chunks * s.heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index head = task % s.heads, number = task / s.heads % s.chunks, item = task / s.heads / s.chunks;
        const Chunk chunk(s, number);
        T* keys = scratch.take(s.head_dim * padded<T>(chunk.keys));
        T* values = scratch.take(chunk.keys * padded<T>(s.head_dim));
        pack_transposed(at<T>(k, item, head / group, chunk.first_key), k.time, s.head_dim, chunk.keys, keys);
        pack(at<T>(v, item, head / group, chunk.first_key), v.time, chunk.keys, s.head_dim, values);
        T* state = scratch.take(s.features * padded<T>(s.head_dim));
        pack(at<T>(retrieved, item, head, number), s.head_dim, s.features, s.head_dim, state);
        T* scores = scratch.take(ROWS * row);
        T* reads = scratch.take(ROWS * s.features);
        const Tensor& source = features.data ? features : q;
        by_rows(chunk.length, [&](index i, auto m) {
            const T* query = at<T>(q, item, head, chunk.start + i);
            const index visible = chunk.seen_before + i + m, wide = padded<T>(visible);
            for (int a = 0; a < m; ++a) fetch(query + (a + m) * q.time, s.head_dim);
            score<T, m()>(query, q.time, keys, s.head_dim, scale, visible, scores, row);
            T sum[ROWS], share[ROWS];
            for (int a = 0; a < m; ++a) {
                sum[a] = exponentials(scores + a * row, visible - m + a + 1, wide);
                share[a] = 1 / sum[a];
                const T* read = at<T>(source, item, head, chunk.start + i + a);
                const T factor = features.data ? T(1) : inverse_norm(read, s.features);
                scaled(read, factor, s.features, reads + a * s.features);
            }
            for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                Tile<T, m()> tile;
                tile.add_product(reads, s.features, 1, state + column * s.features, s.features);
                tile.scale_rows(sum);
                tile.add_product(scores, row, 1, values + column * chunk.keys, visible);
                tile.scale_rows(share);
                tile.store(at<T>(out, item, head, chunk.start + i) + column, out.time, s.head_dim - column);
            }
        });
    });
}

template <class T>
index attend_backward(const Sizes& s, Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor features, Tensor retrieved, Tensor d_q,
                     Tensor d_k, Tensor d_v, Tensor d_features, Tensor d_retrieved, T* memory) {
    const index row = score_row<T>(most_keys(s)), group = s.heads / s.kv_heads;
    const T scale = 1 / std::sqrt(T(s.head_dim));
    // Chunks that overlap add to the same keys: then one thread takes all chunks of a head, in order.
    const index together = s.overlap ? s.chunks : 1;
    return in_parallel(s.batch * (s.chunks / together) * s.kv_heads, s, memory, [&](index task, const Scratch<T> whole) {
        const index kv_head = task % s.kv_heads, item = task / s.kv_heads / (s.chunks / together);
        const index first = together > 1 ? 0 : task / s.kv_heads % s.chunks;
        for (index number = first; number < first + together; ++number) {
            Scratch<T> scratch = whole;
            const Chunk chunk(s, number);
            const index key_row = k.time, value_row = v.time;
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
            T* reads = scratch.take(chunk.length * s.features);
            const index read_row = s.features + WIDTH<T>;
            T* d_reads = scratch.take(ROWS * read_row);

            for (index head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                const T *query = at<T>(q, item, head, chunk.start), *d_rows = at<T>(d_out, item, head, chunk.start);
                pack_transposed(at<T>(retrieved, item, head, number), s.head_dim, s.head_dim, s.features, state);
                pack(query, q.time, chunk.length, s.head_dim, queries);
                pack(d_rows, d_out.time, chunk.length, s.head_dim, d_outs);
                by_rows(chunk.length, [&](index i, auto m) {
                    const index visible = chunk.seen_before + i + m, wide = padded<T>(visible);
                    T *weight = weights + i * row, *d_score = d_scores + i * row;
                    const T* d_row = d_rows + i * d_out.time;
                    score<T, m()>(query + i * q.time, q.time, keys_by_dim, s.head_dim, scale, visible, weight, row);
                    score<T, m()>(d_row, d_out.time, values_by_dim, s.head_dim, T(1), visible, d_score, row);
                    for (int a = 0; a < m; ++a) {
                        // Zeros reach a panel further than what is visible: tiles of keys read them.
                        T *p = weight + a * row, *d = d_score + a * row;
                        const T share = 1 / exponentials(p, visible - m + a + 1, wide + WIDTH<T>);
                        std::fill(d + wide, d + wide + WIDTH<T>, T(0));
                        for (index j = 0; j < wide; j += LANES<T>) vector(p + j) *= share;
                        const T along = dot(p, d, wide);
                        for (index j = 0; j < wide; j += LANES<T>) vector(d + j) = vector(p + j) * (vector(d + j) - along) * scale;
                    }

                    // By φ(Q), and by Q through it.
                    T inverse[ROWS];
                    for (int a = 0; a < m; ++a) {
                        const T* read = features.data ? at<T>(features, item, head, chunk.start + i + a) : query + (i + a) * q.time;
                        inverse[a] = features.data ? T(1) : inverse_norm(read, s.features);
                        scaled(read, inverse[a], s.features, reads + (i + a) * s.features);
                    }
                    for (index column = 0; column < s.features; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(d_row, d_out.time, 1, state + column * s.head_dim, s.head_dim);
                        tile.store(d_reads + column, read_row, WIDTH<T>);
                    }
                    T* d_query = at<T>(d_q, item, head, chunk.start + i);
                    for (int a = 0; a < m; ++a) {
                        const T* by_read = d_reads + a * read_row;
                        if (features.data) {
                            std::copy(by_read, by_read + s.features, at<T>(d_features, item, head, chunk.start + i + a));
                            std::fill(d_query + a * d_q.time, d_query + a * d_q.time + s.head_dim, T(0));
                        } else {
                            unit_norm_backward(by_read, reads + (i + a) * s.features, inverse[a], s.features, d_query + a * d_q.time);
                        }
                    }
                    for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(d_score, row, 1, keys + column * chunk.keys, visible);
                        tile.store(d_query + column, d_q.time, s.head_dim - column, true);
                    }
                });
                // By keys and values: only rows that see them.
                const bool add = s.overlap || head % group;
                by_rows(chunk.keys, [&](index j, auto m) {
                    const index from = std::max<index>(0, j - chunk.seen_before), rows = chunk.length - from;
                    for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                        const index packed = column * chunk.length + from * WIDTH<T>;
                        Tile<T, m()> by_key, by_value;
                        by_key.add_product(d_scores + from * row + j, 1, row, queries + packed, rows);
                        by_key.store(at<T>(d_k, item, kv_head, chunk.first_key + j) + column, d_k.time, s.head_dim - column, add);
                        by_value.add_product(weights + from * row + j, 1, row, d_outs + packed, rows);
                        by_value.store(at<T>(d_v, item, kv_head, chunk.first_key + j) + column, d_v.time, s.head_dim - column, add);
                    }
                });
                T* d_state = at<T>(d_retrieved, item, head, number);
                by_rows(s.features, [&](index f, auto m) {
                    for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                        Tile<T, m()> tile;
                        tile.add_product(reads + f, 1, s.features, d_outs + column * chunk.length, chunk.length);
                        tile.store(d_state + f * s.head_dim + column, s.head_dim, s.head_dim - column);
                    }
                });
            }
        }
    });
}

}  // namespace

#define FUNCTION(NAME, SIZES, TYPE, T, ...)                                                                             \
    std::int64_t NAME##_scratch_##TYPE(const SIZES* s) { return scratch_size<T>(*s); }                                  \
    std::int64_t NAME##_##TYPE(const SIZES* s, const Tensor* x, T* memory) { return NAME(*s, __VA_ARGS__, memory); }
#define FUNCTIONS(TYPE, T)                                                                                              \
    FUNCTION(store, Sizes, TYPE, T, x[0], x[1], x[2])                                                                   \
    FUNCTION(store_backward, Sizes, TYPE, T, x[0], x[1], x[2], x[3], x[4])                                              \
    FUNCTION(correct, Sizes, TYPE, T, x[0], x[1], x[2], x[3])                                                           \
    FUNCTION(correct_backward, Sizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7])                          \
    FUNCTION(choose, Mixing, TYPE, T, x[0], x[1])                                                                       \
    FUNCTION(mix, Mixing, TYPE, T, x[0], x[1], x[2])                                                                    \
    FUNCTION(quadratic, Mapping, TYPE, T, x[0], x[1])                                                                   \
    FUNCTION(quadratic_backward, Mapping, TYPE, T, x[0], x[1], x[2])                                                    \
    FUNCTION(attend, Sizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5])                                                \
    FUNCTION(attend_backward, Sizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10])
extern "C" {
FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
}
