// silu(x) / |silu(x)| of rows, and its gradient, each in one pass over memory. unit_silu.py documents the functions.

#include "tensors.h"

namespace {

constexpr index TOKENS = 64;  // of a task

struct Sizes {
    std::int64_t batch, heads, time, dim, threads;

    template <class T>
    index scratch_size() const {
        return padded<T>(dim) * 3;
    }
};

/// 1 / (1 + e^-x), from the exponential of a number that is not positive.
template <class T>
Vector<T> sigmoid(Vector<T> x) {
    const Vector<T> zero{}, small = exponential(x < zero ? x : -x), one = zero + T(1);
    return (x < zero ? small : one) / (one + small);
}

/// Copies a row to whole vectors, with zeros after its end.
template <class T>
void copy_row(const T* from, index size, T* to) {
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) vector(to + i) = vector(from + i);
    if (i == size) return;
    for (index j = 0; j < LANES<T>; ++j) to[i + j] = i + j < size ? from[i + j] : T(0);
}

/// Writes silu(x) to `to`, which has room for whole vectors and may be x, and returns 1 / max(|silu(x)|, 1e-6).
template <class T>
T silu(const T* x, index size, T* to) {
    Vector<T> squares{};
    for (index i = 0; i < size; i += LANES<T>) {
        const Vector<T> value = vector(x + i), y = value * sigmoid<T>(value);
        vector(to + i) = y;
        squares += y * y;
    }
    return 1 / std::max(std::sqrt(total<T>(squares)), T(1e-6));
}

/// Calls body(item, head, token, scratch memory of three rows) for every row.
template <class T, class Body>
index for_rows(const Sizes& s, T* memory, Body&& body) {
    const index blocks = panels(s.time, TOKENS);
    return in_parallel(s.batch * blocks, s, memory, [&](index task, Scratch<T> scratch) {
        const index item = task / blocks, start = task % blocks * TOKENS;
        T* rows = scratch.take(3 * padded<T>(s.dim));
        for (index t = start; t < std::min<index>(s.time, start + TOKENS); ++t)
            for (index head = 0; head < s.heads; ++head) body(item, head, t, rows);
    });
}

template <class T>
index forward(const Sizes& s, Tensor x, Tensor out, T* memory) {
    return for_rows(s, memory, [&](index item, index head, index t, T* row) {
        copy_row(at<T>(x, item, head, t), s.dim, row);
        const T inverse = silu(row, s.dim, row);
        scaled(row, inverse, s.dim, at<T>(out, item, head, t));
    });
}

/// With y = s / n, s = silu(x) and n = |s|: the gradient of s is (g - y (y.g)) / n, and that of x times sigmoid(x) (1 + x - s).
template <class T>
index backward(const Sizes& s, Tensor d_out, Tensor x, Tensor d_x, T* memory) {
    return for_rows(s, memory, [&](index item, index head, index t, T* rows) {
        T *in = rows, *y = in + padded<T>(s.dim), *g = y + padded<T>(s.dim);
        copy_row(at<T>(x, item, head, t), s.dim, in);
        copy_row(at<T>(d_out, item, head, t), s.dim, g);
        const T inverse = silu(in, s.dim, y);
        Vector<T> products{};
        for (index i = 0; i < s.dim; i += LANES<T>) products += vector(y + i) * vector(g + i);
        const T along = inverse < T(1e6) ? total<T>(products) * inverse * inverse : T(0);  // a norm below 1e-6 counts as 1e-6
        for (index i = 0; i < s.dim; i += LANES<T>) {
            const Vector<T> value = vector(in + i), out = vector(y + i);
            vector(g + i) = (vector(g + i) - out * along) * inverse * sigmoid<T>(value) * (value - out + T(1));
        }
        std::copy(g, g + s.dim, at<T>(d_x, item, head, t));
    });
}

}  // namespace

#define FUNCTIONS(TYPE, T)                         \
    FUNCTION(forward, Sizes, TYPE, T, x[0], x[1])  \
    FUNCTION(backward, Sizes, TYPE, T, x[0], x[1], x[2])
extern "C" {
FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
}
