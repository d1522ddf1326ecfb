// Vectors of numbers: transposes in registers, reductions of several rows at once, exponentials, and functions of one row.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;  // of a vector
#else
constexpr int BYTES = 32;  // a register of AVX2; two of NEON
#endif

using index = std::ptrdiff_t;

template <class T, int SIZE = BYTES>
struct Lanes {
    typedef T type __attribute__((vector_size(SIZE), aligned(alignof(T)), may_alias));
};
template <class T>
using Vector = typename Lanes<T>::type;
template <class T>
constexpr int LANES = BYTES / sizeof(T);

/// The vector that begins at an address, which need not be aligned.
template <class T>
Vector<T>& vector(T* at) {
    return *reinterpret_cast<Vector<T>*>(at);
}
template <class T>
const Vector<T>& vector(const T* at) {
    return *reinterpret_cast<const Vector<T>*>(at);
}

inline index panels(index columns, index width) { return (columns + width - 1) / width; }

// --- between lanes ------------------------------------------------------------------------------

/// Lanes of a and b: lane i of the result is lane LANE_i of a followed by b.
template <class V, int... LANE>
inline V shuffled(V a, V b, std::integer_sequence<int, LANE...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, LANE...);
#else
    typedef decltype(a < b) Mask;
    return __builtin_shuffle(a, b, Mask{LANE...});
#endif
}

/// Exchanges of lanes that are D apart: lane i of `low` is lane i of a where i has not the bit D, else lane i - D of b; lane i of
/// `high` is lane i + D of a where i has not the bit D, else lane i of b.
template <int D, int... I>
constexpr auto low_lanes(std::integer_sequence<int, I...>) {
    return std::integer_sequence<int, (I & D ? int(sizeof...(I)) + I - D : I)...>{};
}
template <int D, int... I>
constexpr auto high_lanes(std::integer_sequence<int, I...>) {
    return std::integer_sequence<int, (I & D ? int(sizeof...(I)) + I : I + D)...>{};
}
template <class T, int D>
inline Vector<T> low(Vector<T> a, Vector<T> b) {
    return shuffled(a, b, low_lanes<D>(std::make_integer_sequence<int, LANES<T>>{}));
}
template <class T, int D>
inline Vector<T> high(Vector<T> a, Vector<T> b) {
    return shuffled(a, b, high_lanes<D>(std::make_integer_sequence<int, LANES<T>>{}));
}

/// Transposes LANES rows of LANES numbers, in registers.
template <class T, int D = 1>
__attribute__((always_inline)) inline void transpose(Vector<T>* rows) {
    if constexpr (D < LANES<T>) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES<T>; ++i)
            if (!(i & D)) {
                const Vector<T> a = rows[i], b = rows[i + D];
                rows[i] = low<T, D>(a, b), rows[i + D] = high<T, D>(a, b);
            }
        transpose<T, 2 * D>(rows);
    }
}

/// Reduces each of LANES rows to one number: lane i of the result is row i, reduced by `combine` of two vectors.
template <class T, int D = 1, class Combine>
__attribute__((always_inline)) inline Vector<T> reduce(Vector<T>* rows, Combine combine) {
    if constexpr (D < LANES<T>) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES<T>; i += 2 * D)
            rows[i] = combine(low<T, D>(rows[i], rows[i + D]), high<T, D>(rows[i], rows[i + D]));
        return reduce<T, 2 * D>(rows, combine);
    } else {
        return rows[0];
    }
}

/// Reduces M rows, writing one number each to `to`, which has room for whole vectors.
template <class T, int M, class Combine>
__attribute__((always_inline)) inline void reduce_rows(const Vector<T>* rows, T* to, Combine combine) {
    for (int start = 0; start < M; start += LANES<T>) {
        Vector<T> block[LANES<T>];
        for (int i = 0; i < LANES<T>; ++i) block[i] = rows[start + i < M ? start + i : M - 1];
        vector(to + start) = reduce<T>(block, combine);
    }
}

/// Elements that `reduce_rows` writes for M rows: whole vectors.
template <class T, int M>
constexpr int REDUCED = (M + LANES<T> - 1) / LANES<T> * LANES<T>;

template <class T>
inline T total(Vector<T> x) {
    T sum = 0;
    for (int i = 0; i < LANES<T>; ++i) sum += x[i];
    return sum;
}

/// The greater of each lane; NaN if b is.
template <class T>
inline Vector<T> greater(Vector<T> a, Vector<T> b) {
    return a > b ? a : b;
}

/// The first `count` lanes of x, and `fill` in the others.
template <class T, int... I>
inline Vector<T> first_lanes(Vector<T> x, index count, T fill, std::integer_sequence<int, I...>) {
    typedef std::remove_const_t<decltype(x < x)> Numbers;
    typedef std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t> Number;
    return Numbers{I...} < static_cast<Number>(count) ? x : fill - Vector<T>{};
}
template <class T>
inline Vector<T> first_lanes(Vector<T> x, index count, T fill) {
    return first_lanes<T>(x, count, fill, std::make_integer_sequence<int, LANES<T>>{});
}

// --- exponentials -------------------------------------------------------------------------------

// e^x = 2^n e^r with n = x / ln 2 rounded, so |r| <= ln 2 / 2. Adding 1.5 * 2^(mantissa bits) leaves n in the low bits.

/// e^x for x <= 88, 0 below -87. The polynomial has degree 5 and a relative error of 8e-8; with n ln 2 subtracted in one step the
/// error of the result is at most 2e-7 + 2e-8 |x|, and a softmax takes |x| times its weight e^x.
inline Vector<float> exponential(Vector<float> x) {
    typedef std::int32_t Bits __attribute__((vector_size(BYTES)));
    typedef float Aligned __attribute__((vector_size(BYTES)));
    const float magic = 12582912.f;
    const Aligned shifted = x * 1.44269504f + magic;
    const Aligned r = x - (shifted - magic) * 0.693147181f;
    Aligned p = r * 8.2976194935e-03f + 4.1915629882e-02f;
    p = p * r + 1.6667576545e-01f;
    p = p * r + 4.9998892656e-01f;
    p = p * r + 9.9999969107e-01f;
    p = p * r + 1.0000000719e+00f;
    const Aligned result = (Aligned)((Bits)p + ((Bits)shifted << 23));
    return x < -87.f ? Vector<float>{} : Vector<float>(result);
}

/// e^x for x <= 709, 0 below -708, with an error of 2 ulp: the Taylor polynomial of degree 12.
inline Vector<double> exponential(Vector<double> x) {
    typedef std::int64_t Bits __attribute__((vector_size(BYTES)));
    typedef double Aligned __attribute__((vector_size(BYTES)));
    const double magic = 6755399441055744.;
    const Aligned shifted = x * 1.4426950408889634 + magic;
    const Aligned n = shifted - magic;
    const Aligned r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    Aligned p = r * (1. / 479001600) + 1. / 39916800;
    for (double factorial : {3628800., 362880., 40320., 5040., 720., 120., 24., 6., 2., 1., 1.}) p = p * r + 1. / factorial;
    const Aligned result = (Aligned)((Bits)p + ((Bits)shifted << 52));
    return x < -708. ? Vector<double>{} : Vector<double>(result);
}

/// Softmax of M rows of scores without the division: replaces the first visible + a scores of row a by e^(scale (score - maximum))
/// and the others, up to column `wide`, by 0. Rows are `row` apart and have whole vectors.
///
/// Returns:
///     the sum of each row, in `sums`.
template <class T, int M>
inline void exponentials(T* scores, index row, index visible, index wide, T scale, T* sums) {
    const T infinity = std::numeric_limits<T>::infinity();
    Vector<T> most[M], sum[M];
    for (int a = 0; a < M; ++a) {
        T* x = scores + a * row;
        const index end = (visible + a) / LANES<T> * LANES<T>, rest = visible + a - end;
        if (rest) vector(x + end) = first_lanes<T>(vector(x + end), rest, -infinity);
        Vector<T> m = vector(x);
        for (index j = LANES<T>; j < end + (rest ? LANES<T> : 0); j += LANES<T>) m = greater<T>(vector(x + j), m);
        most[a] = m;
    }
    T maxima[REDUCED<T, M>];
    reduce_rows<T, M>(most, maxima, greater<T>);
    for (int a = 0; a < M; ++a) {
        T* x = scores + a * row;
        const T shift = maxima[a] * scale;
        Vector<T> s{};
        index j = 0;
        for (; j < visible + a; j += LANES<T>) s += vector(x + j) = exponential(vector(x + j) * scale - shift);
        for (; j < wide; j += LANES<T>) vector(x + j) = Vector<T>{};
        sum[a] = s;
    }
    T all[REDUCED<T, M>];
    reduce_rows<T, M>(sum, all, [](Vector<T> a, Vector<T> b) { return a + b; });
    std::copy(all, all + M, sums);
}

/// Replaces the first `visible` scores by e^(score - maximum) and those up to `wide` by 0. Returns the sum.
template <class T>
inline T exponentials(T* scores, index visible, index wide) {
    T sum;
    exponentials<T, 1>(scores, 0, visible, wide, T(1), &sum);
    return sum;
}

// --- rows ---------------------------------------------------------------------------------------

template <class T>
inline T dot(const T* a, const T* b, index size) {
    Vector<T> sum{};
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) sum += vector(a + i) * vector(b + i);
    T rest = total<T>(sum);
    for (; i < size; ++i) rest += a[i] * b[i];
    return rest;
}

/// to = x * factor
template <class T>
inline void scaled(const T* x, T factor, index size, T* to) {
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) vector(to + i) = vector(x + i) * factor;
    for (; i < size; ++i) to[i] = x[i] * factor;
}

/// The factor that brings a row to unit norm: 1 / sqrt(|x|^2 + 1e-6).
template <class T>
inline T inverse_norm(const T* x, index size) {
    return 1 / std::sqrt(dot(x, x, size) + T(1e-6));
}

/// Gradient of y = x * inverse(x) with respect to x, from that with respect to y: to = (g - y (y.g)) * inverse, or added to `to`.
template <class T>
inline void unit_norm_backward(const T* gradient, const T* normed, T inverse, index size, T* to, bool add = false) {
    const T along = dot(gradient, normed, size);
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) {
        const Vector<T> found = (vector(gradient + i) - vector(normed + i) * along) * inverse;
        vector(to + i) = add ? vector(to + i) + found : found;
    }
    for (; i < size; ++i) to[i] = (gradient[i] - normed[i] * along) * inverse + (add ? to[i] : T(0));
}

}  // namespace
