// Matrix products in registers, and functions of rows: dot products, exponentials, the unit norm.
//
// A product takes its right operand *packed*: in panels of WIDTH columns, one after the other, each row of a panel
// contiguous, with zeros after the last column. Its left operand stays where it is, under any two strides.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, ROWS = 12;  // bytes of a vector; rows of a tile: ROWS x 2 sums and their operands fill 32 registers
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

/// Floating point operations of this thread's products; a test compares them with those that BSBR declares.
thread_local index operations;

/// M rows and WIDTH columns of sums, in registers.
template <class T, int M>
struct Tile {
    Vector<T> sum[M][2];

    Tile() : sum{} {}

    /// Adds left [M, depth] times right [depth, WIDTH]; left(i, k) is at i * row + k * step, right is packed.
    /// Not inlined: in a function of its own the compiler keeps all sums in registers.
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

    /// Writes the first `columns` columns, or adds them to what `to` holds; columns may exceed WIDTH.
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

/// Calls body(first row, number of rows as a constant) for all rows: blocks of ROWS, then smaller blocks for the remainder.
template <int M = ROWS, class Body>
inline void by_rows(index rows, Body&& body, index start = 0) {
    for (; start + M <= rows; start += M) body(start, std::integral_constant<int, M>{});
    if constexpr (M > 1) by_rows<(M > 4 ? 4 : M > 2 ? 2 : 1)>(rows, body, start);
}

constexpr int AHEAD = 16;  // rows

/// Prefetches a row that is read soon: rows of a head are too far apart for the processor's own prefetcher.
template <class T>
inline void fetch(const T* row, index size) {
    for (index i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

/// Packs x [depth, columns], whose rows are `row` elements apart.
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

/// Packs the transpose of x [columns, depth], whose rows are `row` elements apart.
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

/// Unpacks [depth, columns] into x, whose rows are `row` elements apart.
template <class T>
void unpack(const T* packed, index depth, index columns, T* x, index row) {
    for (index start = 0; start < columns; start += WIDTH<T>) {
        const index wide = std::min<index>(WIDTH<T>, columns - start);
        for (index k = 0; k < depth; ++k, packed += WIDTH<T>) std::copy(packed, packed + wide, x + k * row + start);
    }
}

// --- rows ---------------------------------------------------------------------------------------

inline Vector<float> exponential(Vector<float> x) {
    // e^x = 2^n e^r with |r| <= ln 2 / 2; n is in the low bits of x / ln 2 + 1.5 * 2^23. The polynomial is that of Cephes,
    // with an error of about 1 ulp.
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

/// Replaces the first `visible` scores by e^(score - maximum) and those up to `wide` by 0. Returns the sum.
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

/// The factor that brings a row to unit norm: 1 / sqrt(|x|^2 + 1e-6).
template <class T>
T inverse_norm(const T* x, index size) {
    return 1 / std::sqrt(dot(x, x, size) + T(1e-6));
}

/// Gradient of y = x * inverse(x) with respect to x, from that with respect to y: to = (g - y (y.g)) * inverse.
template <class T>
void unit_norm_backward(const T* gradient, const T* normed, T inverse, index size, T* to) {
    const T along = dot(gradient, normed, size);
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) vector(to + i) = (vector(gradient + i) - vector(normed + i) * along) * inverse;
    for (; i < size; ++i) to[i] = (gradient[i] - normed[i] * along) * inverse;
}

}  // namespace
