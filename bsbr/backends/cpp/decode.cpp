// One token of BSBR that continues a chunk: attention to the chunk's tokens so far, the read-out of what the chunk retrieved, and
// the state of the chunk after the token. decode.py documents it.

#include "tensors.h"

namespace {

/// cached: keys before the token's own. factors: numbers that features are made of. features: d_r. quadratic: whether φ is the
/// pairwise products of factors of unit norm; otherwise the factors are φ.
struct TokenSizes {
    std::int64_t batch, heads, kv_heads, cached, head_dim, factors, features, quadratic, threads;

    template <class T>
    index scratch_size() const {
        return panels(padded<T>(cached + 1), 16) * 16 + panels(features + factors, 16) * 16 + panels(2 * factors, 16) * 16 +
               panels(head_dim, 16) * 16;
    }
};

constexpr index PARALLEL = 1 << 17;  // numbers below which a thread takes longer to wake than to work

/// Adds the weighted sum of the rows of x [rows, size], times `factor`, to `to`.
template <class T>
void add_weighted(const T* x, index row, const T* weights, index rows, index size, T factor, T* to) {
    operations += 2 * rows * size;
    index j = 0;
    for (; j + LANES<T> <= size; j += LANES<T>) {
        Vector<T> even{}, odd{};
        index i = 0;
        for (; i + 2 <= rows; i += 2) {
            even += vector(x + i * row + j) * weights[i];
            odd += vector(x + (i + 1) * row + j) * weights[i + 1];
        }
        if (i < rows) even += vector(x + i * row + j) * weights[i];
        vector(to + j) += (even + odd) * factor;
    }
    for (; j < size; ++j)
        for (index i = 0; i < rows; ++i) to[j] += factor * weights[i] * x[i * row + j];
}

/// to = x + y * factor
template <class T>
void sum_scaled(const T* x, const T* y, T factor, index size, T* to) {
    operations += 2 * size;
    index j = 0;
    for (; j + LANES<T> <= size; j += LANES<T>) vector(to + j) = vector(x + j) + vector(y + j) * factor;
    for (; j < size; ++j) to[j] = x[j] + y[j] * factor;
}

/// φ of a row of factors; what lies behind the features is overwritten, up to as many numbers as there are factors.
template <class T>
const T* features_of(const TokenSizes& s, const T* factors, T* unit, T* to) {
    if (!s.quadratic) return factors;
    scaled(factors, inverse_norm(factors, s.factors), s.factors, unit);
    std::copy(unit, unit + s.factors, unit + s.factors);
    for (index step = 0; step * s.factors < s.features; ++step)
        for (index i = 0; i < s.factors; ++i)
            to[step * s.factors + i] = unit[i] * unit[step + i] * (step ? std::sqrt(T(2)) : T(1));
    return to;
}

/// Copies the rows of a head and appends one.
template <class T>
T* appended(const TokenSizes& s, const Tensor& from, const Tensor& token, const Tensor& to, index item, index head) {
    T* rows = at<T>(to, item, head, 0);
    for (index i = 0; i < s.cached; ++i) std::memcpy(rows + i * to.row, at<T>(from, item, head, i), s.head_dim * sizeof(T));
    std::memcpy(rows + s.cached * to.row, at<T>(token, item, head, 0), s.head_dim * sizeof(T));
    return rows;
}

template <class T>
index token(TokenSizes s, Tensor q, Tensor k, Tensor v, Tensor q_factors, Tensor k_factors, Tensor beta, Tensor keys, Tensor values,
            Tensor retrieved, Tensor state, Tensor out, Tensor new_keys, Tensor new_values, Tensor new_state, T* memory) {
    const index group = s.heads / s.kv_heads;
    const T scale = 1 / std::sqrt(T(s.head_dim));
    if (s.batch * s.heads * (s.cached + s.features) * s.head_dim < PARALLEL) s.threads = 1;
    return in_parallel(s.batch * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index item = task / s.kv_heads, kv_head = task % s.kv_heads;
        T* scores = scratch.take(padded<T>(s.cached + 1));
        T* line = scratch.take(s.features + s.factors);
        T* unit = scratch.take(2 * s.factors);
        T* value = scratch.take(s.head_dim);

        // S' = S + φ(k) uᵀ with u = v, or with β u = β (v − Sᵀ φ(k)).
        const T* phi = features_of(s, at<T>(k_factors, item, kv_head, 0), unit, line);
        const T* before = at<T>(state, item, kv_head, 0);
        std::fill_n(value, s.head_dim, T(0));
        if (beta.data) add_weighted(before, s.head_dim, phi, s.features, s.head_dim, T(1), value);
        const T rate = beta.data ? *at<T>(beta, item, kv_head, 0) : T(1);
        const T* given = at<T>(v, item, kv_head, 0);
        for (index i = 0; i < s.head_dim; ++i) value[i] = rate * (given[i] - value[i]);
        T* after = at<T>(new_state, item, kv_head, 0);
        for (index f = 0; f < s.features; ++f)
            sum_scaled(before + f * s.head_dim, value, phi[f], s.head_dim, after + f * s.head_dim);

        const T* all_keys = appended<T>(s, keys, k, new_keys, item, kv_head);
        const T* all_values = appended<T>(s, values, v, new_values, item, kv_head);
        const index visible = s.cached + 1;
        for (index head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            const T* query = at<T>(q, item, head, 0);
            T* to = at<T>(out, item, head, 0);
            score(query, all_keys, new_keys.row, visible, s.head_dim, scale, scores);
            const T inverse = 1 / exponentials(scores, visible, visible);
            std::fill_n(to, s.head_dim, T(0));
            add_weighted(all_values, new_values.row, scores, visible, s.head_dim, inverse, to);
            phi = features_of(s, at<T>(q_factors, item, head, 0), unit, line);
            add_weighted(at<T>(retrieved, item, head, 0), s.head_dim, phi, s.features, s.head_dim, T(1), to);
        }
    });
}

}  // namespace

#define FUNCTIONS(TYPE, T) \
    FUNCTION(token, TokenSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12], x[13])
extern "C" {
FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
}
