// Quadratic features: pairwise products of a token's numbers.

#pragma once

#include "bsbr/sizes.h"

namespace {

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
    prefer_huge_pages<T>(features.data, s.batch * s.heads * s.time * s.size);
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

}  // namespace
