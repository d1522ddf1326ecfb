// Softmax attention of every query over ranges of keys: a window of the tokens before it, or its block and the summaries of earlier
// blocks. key_ranges.py documents the functions.
//
// A panel is as many queries as a vector has lanes. Its scores are computed transposed, [key, query], so that a query keeps its lane
// from the scores to the output: maxima, sums and masks are operations on whole vectors, and no key or value is packed per query.

#include <vector>

#include "tensors.h"

namespace {

constexpr int MOST_ROWS = BYTES == 64 ? 24 : 12, STEP = MOST_ROWS / 3;  // rows of a column of sums: a multiple of STEP, at most MOST_ROWS
constexpr index QUERIES = 128, KEYS = 256;                    // of a task, and of a chunk of keys that is packed at once
constexpr index KEY_ROW = KEYS + 16;                          // rows of packed keys are not a power of two apart in the cache
constexpr index MARGIN = ROWS;                                // rows of zeros around the weights of a chunk
constexpr index UNBOUNDED = index(1) << 40;                   // a window or block longer than any sequence

inline index up_to(index size, index multiple) { return panels(size, multiple) * multiple; }

/// Query i is at position keys - time + i. It sees the tokens of its block of `block` positions up to itself, of these at most the last
/// `window`, and, if there are summaries, the first seen + (number of its block) * summary of their rows.
struct RangeSizes {
    std::int64_t batch, heads, kv_heads, time, keys, summaries, head_dim, value_dim, window, block, summary, seen, spans, threads;

    index position(index query) const { return keys - time + query; }
    index group() const { return heads / kv_heads; }
    index dim() const { return up_to(head_dim, STEP); }
    index wide() const { return up_to(value_dim, STEP); }

    template <class T>
    index max_panels() const {
        return panels(QUERIES, LANES<T>) + (block < UNBOUNDED && block >= LANES<T> ? panels(QUERIES, block) + 1 : 0);
    }

    /// Of the most demanding function.
    template <class T>
    index scratch_size() const {
        const index most = max_panels<T>() * LANES<T>, weights = (KEYS + 2 * MARGIN + MOST_ROWS) * (most + LANES<T>);
        const index keys_and_values = (KEY_ROW + KEYS) * (dim() + wide() + 4 * STEP), columns = padded<T>(head_dim) + padded<T>(value_dim);
        return keys_and_values + group() * most * (3 * dim() + 2 * wide() + columns + 8) + 2 * weights + 64 * 16;
    }
};

/// to = left [M, depth] times right [depth, LANES] + to * factor, or without the last term if `fresh`. left(i, k) is at i + k * step;
/// rows of right are right_row apart, those of `to` to_row. Not inlined: so the compiler keeps all sums in registers.
template <class T, int M>
__attribute__((noinline)) void tall_product(
    const T* left, index step, const T* right, index right_row, index depth, T* to, index to_row, bool fresh, Vector<T> factor
) {
    Vector<T> sum[M];
#pragma GCC unroll 24
    for (int i = 0; i < M; ++i) sum[i] = fresh ? Vector<T>{} : vector(to + i * to_row) * factor;
    for (index k = 0; k < depth; ++k, left += step, right += right_row) {
        const Vector<T> values = vector(right);
#pragma GCC unroll 24
        for (int i = 0; i < M; ++i) sum[i] += left[i] * values;
    }
#pragma GCC unroll 24
    for (int i = 0; i < M; ++i) vector(to + i * to_row) = sum[i];
}

/// `tall_product` for any number of rows, rounded up to STEP.
template <class T>
void product(
    index rows, const T* left, index step, const T* right, index right_row, index depth, T* to, index to_row, bool fresh,
    Vector<T> factor = Vector<T>{} + T(1)
) {
    operations += 2 * up_to(rows, STEP) * LANES<T> * depth;
    while (rows > 0) {
        const auto run = rows > 2 * STEP ? tall_product<T, MOST_ROWS> : rows > STEP ? tall_product<T, 2 * STEP> : tall_product<T, STEP>;
        run(left, step, right, right_row, depth, to, to_row, fresh, factor);
        rows -= MOST_ROWS, left += MOST_ROWS, to += MOST_ROWS * to_row;
    }
}

/// to[column, row] = from[row, column] * factor for `rows` <= LANES rows. Lanes of `to` after the last row become 0.
template <class T>
void transpose_rows(const T* from, index from_row, index rows, index columns, T factor, T* to, index to_row) {
    for (int i = 0; i < LANES<T>; ++i) fetch(from + (LANES<T> + i) * from_row, columns);
    index column = 0;
    if (rows == LANES<T>)
        for (; column + LANES<T> <= columns; column += LANES<T>) {
            Vector<T> square[LANES<T>];
#pragma GCC unroll 16
            for (int i = 0; i < LANES<T>; ++i) square[i] = vector(from + i * from_row + column);
            transpose<T>(square);
#pragma GCC unroll 16
            for (int i = 0; i < LANES<T>; ++i) vector(to + (column + i) * to_row) = square[i] * factor;
        }
    for (; column < columns; ++column)
        for (index i = 0; i < LANES<T>; ++i) to[column * to_row + i] = i < rows ? from[i * from_row + column] * factor : T(0);
}

/// to[i, column] = from[column, i] * factor[i] for `rows` <= LANES rows of `to`.
template <class T>
void transpose_columns(const T* from, index columns, Vector<T> factor, index rows, T* to, index to_row) {
    index column = 0;
    if (rows == LANES<T>)
        for (; column + LANES<T> <= columns; column += LANES<T>) {
            Vector<T> square[LANES<T>];
#pragma GCC unroll 16
            for (int i = 0; i < LANES<T>; ++i) square[i] = vector(from + (column + i) * LANES<T>) * factor;
            transpose<T>(square);
#pragma GCC unroll 16
            for (int i = 0; i < LANES<T>; ++i) vector(to + i * to_row + column) = square[i];
        }
    for (; column < columns; ++column)
        for (index i = 0; i < rows; ++i) to[i * to_row + column] = from[column * LANES<T> + i] * factor[i];
}

/// A source of keys and values: the tokens, or the summaries.
struct Source {
    Tensor k, v, d_k, d_v;
    bool summaries;
};

/// Up to LANES successive queries of one head, and the keys that each of them sees: lane i those from low[i] to high[i] - 1.
template <class T>
struct Panel {
    index head, start, count;
    index low[LANES<T>], high[LANES<T>];

    void look_at(const RangeSizes& s, bool summaries) {
        index position = s.position(start), number = position / s.block;
        for (index i = 0; i < LANES<T>; ++i) {
            low[i] = summaries ? 0 : std::max<index>({0, position - s.window + 1, number * s.block});
            high[i] = summaries ? s.seen + number * s.summary : position + 1;
            if (i + 1 >= count) continue;  // lanes without a query see what the last query sees
            ++position;
            number += position == (number + 1) * s.block;
        }
    }
    index first() const { return low[0]; }
    index last() const { return high[LANES<T> - 1]; }
};

/// The panels of the queries from `start` on, for all heads of a key head. A panel ends where a block ends, so that its queries see
/// nearly the same keys, unless blocks are shorter than a panel.
template <class T>
index make_panels(const RangeSizes& s, index kv_head, index start, index stop, Panel<T>* to) {
    index number = 0;
    for (index head = kv_head * s.group(); head < (kv_head + 1) * s.group(); ++head)
        for (index i = start; i < stop;) {
            index end = std::min(stop, i + LANES<T>);
            if (s.block >= LANES<T>) end = std::min(end, i + s.block - s.position(i) % s.block);
            to[number++] = {head, i, end - i, {}, {}};
            i = end;
        }
    return number;
}

/// What one panel sees of one chunk of keys: keys `from` to `to` - 1 by some of its queries, and all of full_from to full_to - 1 by each.
/// All count from the chunk's first key.
template <class T>
struct View {
    index from, to, full_from, full_to;
    Vector<T> low, high;

    View(const Panel<T>& panel, index chunk, index length) {
        const auto inside = [&](index key) { return std::clamp<index>(key - chunk, 0, length); };
        from = full_from = inside(panel.low[0]), to = full_to = inside(panel.high[0]);
        for (int i = 0; i < LANES<T>; ++i) {
            const index lane_from = inside(panel.low[i]), lane_to = inside(panel.high[i]);
            from = std::min(from, lane_from), full_from = std::max(full_from, lane_from);
            to = std::max(to, lane_to), full_to = std::min(full_to, lane_to);
            low[i] = T(lane_from), high[i] = T(lane_to);
        }
    }
    bool is_empty() const { return from >= to; }

    /// x where a query sees the key, else `hidden`.
    Vector<T> visible(Vector<T> x, index key, T hidden) const {
        const Vector<T> at = Vector<T>{} + T(key), other = Vector<T>{} + hidden;
        return (at >= low) & (at < high) ? x : other;
    }

    /// Replaces the scores [to - from, LANES] of keys that a query does not see by -infinity.
    void hide(T* scores, index row) const {
        for (index key = from; key < to; ++key) {
            if (key == full_from && full_from < full_to) key = full_to;
            if (key == to) return;
            T* score = scores + (key - from) * row;
            vector(score) = visible(vector(score), key, -std::numeric_limits<T>::infinity());
        }
    }
};

/// The maxima of `known` and `number` vectors.
template <class T>
Vector<T> largest(const T* scores, index number, Vector<T> known) {
    constexpr int CHAINS = 4;
    Vector<T> most[CHAINS] = {known, known, known, known};
    index j = 0;
    for (; j + CHAINS <= number; j += CHAINS)
        for (int i = 0; i < CHAINS; ++i) most[i] = greater<T>(vector(scores + (j + i) * LANES<T>), most[i]);
    for (int i = 1; i < CHAINS; ++i) most[0] = greater<T>(most[i], most[0]);
    for (; j < number; ++j) most[0] = greater<T>(vector(scores + j * LANES<T>), most[0]);
    return most[0];
}

/// Replaces `number` vectors x by e^(x - origin), and returns their sum.
template <class T>
Vector<T> exponentials(T* scores, index number, Vector<T> origin) {
    Vector<T> sum{};
    for (index j = 0; j < number; ++j) sum += vector(scores + j * LANES<T>) = exponential(vector(scores + j * LANES<T>) - origin);
    return sum;
}

template <class T>
bool is_finite(T x) {
    return x - x == 0;
}

/// Copies rows to rows of `width` elements, with zeros after the last column. Returns whether all are finite.
template <class T>
bool copy_rows(const T* x, index row, index rows, index columns, T* to, index width) {
    Vector<T> zeros{};
    T rest = 0;
    for (index i = 0; i < rows; ++i) {
        const T* from = x + i * row;
        T* copy = to + i * width;
        fetch(from + AHEAD * row, columns);
        index c = 0;
        for (; c + LANES<T> <= columns; c += LANES<T>) {
            const Vector<T> values = vector(copy + c) = vector(from + c);
            zeros += values - values;
        }
        for (; c < columns; ++c) copy[c] = from[c], rest += from[c] - from[c];
        for (; c < width; ++c) copy[c] = 0;
    }
    return total<T>(zeros) + rest == 0;
}

/// Keys by dimension, [dim, KEY_ROW].
template <class T>
void by_dimension(const T* x, index row, index rows, index columns, T* to) {
    for (index i = 0; i < rows; i += LANES<T>)
        transpose_rows(x + i * row, row, std::min<index>(LANES<T>, rows - i), columns, T(1), to + i, KEY_ROW);
}

/// Calls body(chunk's first key, its length) for the keys of a source that any of the panels sees.
template <class T, class Body>
void for_each_chunk(const RangeSizes& s, bool summaries, Panel<T>* panel, index number, Body&& body) {
    index first = UNBOUNDED, last = 0;
    for (index p = 0; p < number; ++p) {
        panel[p].look_at(s, summaries);
        first = std::min(first, panel[p].first()), last = std::max(last, panel[p].last());
    }
    for (; first < last; first += KEYS) body(first, std::min(KEYS, last - first));
}

/// softmax(QKᵀ/√d) V over the visible keys, and the log-sum-exp of the scores if it is asked for. Chunk by chunk of the keys, each panel
/// keeps its maximum, its sum and its unnormalised output, which are scaled down when a greater maximum comes.
template <class T>
index attend(
    const RangeSizes& s, Tensor q, Tensor k, Tensor v, Tensor k_summary, Tensor v_summary, Tensor out, Tensor lse, T* memory
) {
    const index blocks = panels(s.time, QUERIES), most = s.group() * s.max_panels<T>(), dim = s.head_dim, wide = s.wide();
    const T scale = 1 / std::sqrt(T(dim)), hidden = -std::numeric_limits<T>::infinity();
    const Source sources[] = {{k, v, {}, {}, false}, {k_summary, v_summary, {}, {}, true}};
    return in_parallel(s.batch * s.kv_heads * blocks, s, memory, [&](index task, Scratch<T> scratch) {
        const index kv_head = task % s.kv_heads, block = task / s.kv_heads % blocks, item = task / s.kv_heads / blocks;
        const index start = block * QUERIES, stop = std::min<index>(s.time, start + QUERIES);
        T* keys = scratch.take(dim * KEY_ROW);
        T* values = scratch.take(KEYS * wide);
        T* weights = scratch.take((KEYS + MOST_ROWS) * LANES<T>);
        T* queries = scratch.take(most * dim * LANES<T>);
        T* outs = scratch.take(most * wide * LANES<T>);
        T *maxima = scratch.take(most * LANES<T>), *sums = scratch.take(most * LANES<T>);
        std::vector<Panel<T>> panel(most);
        const index number = make_panels(s, kv_head, start, stop, panel.data());
        for (index p = 0; p < number; ++p) {
            const T* query = at<T>(q, item, panel[p].head, panel[p].start);
            transpose_rows(query, q.row, panel[p].count, dim, scale, queries + p * dim * LANES<T>, LANES<T>);
        }
        std::fill(maxima, maxima + most * LANES<T>, hidden);
        std::fill(sums, sums + most * LANES<T>, T(0));
        std::fill(outs, outs + number * wide * LANES<T>, T(0));

        for (const Source& source : sources) {
            if (!source.k.data) continue;
            for_each_chunk(s, source.summaries, panel.data(), number, [&](index chunk, index length) {
                const T* value_rows = at<T>(source.v, item, kv_head, chunk);
                by_dimension(at<T>(source.k, item, kv_head, chunk), source.k.row, length, dim, keys);
                const bool finite = copy_rows(value_rows, source.v.row, length, s.value_dim, values, wide);
                if (!finite) std::replace_if(values, values + length * wide, [](T x) { return !is_finite(x); }, T(0));
                for (index p = 0; p < number; ++p) {
                    const View<T> view(panel[p], chunk, length);
                    if (view.is_empty()) continue;
                    Vector<T>&maximum = vector(maxima + p * LANES<T>), &sum = vector(sums + p * LANES<T>);
                    T* columns = outs + p * wide * LANES<T>;
                    const index seen = view.to - view.from;
                    product<T>(seen, keys + view.from, KEY_ROW, queries + p * dim * LANES<T>, LANES<T>, dim, weights, LANES<T>, true);
                    view.hide(weights, LANES<T>);
                    const Vector<T> greatest = largest(weights, seen, maximum);
                    const Vector<T> origin = greatest == hidden ? Vector<T>{} : greatest;  // a query may see no key of this chunk
                    const Vector<T> factor = exponential(maximum - origin);
                    maximum = greatest;
                    sum = sum * factor + exponentials(weights, seen, origin);
                    product<T>(s.value_dim, values + view.from * wide, wide, weights, LANES<T>, seen, columns, LANES<T>, false, factor);
                    if (finite) continue;
                    // 0 times NaN or infinity is NaN: such a value counts for the queries that see it, and for no other.
                    for (index key = view.from; key < view.to; ++key)
                        for (index c = 0; c < s.value_dim; ++c)
                            if (const T x = value_rows[key * source.v.row + c]; !is_finite(x))
                                vector(columns + c * LANES<T>) +=
                                    view.visible(vector(weights + (key - view.from) * LANES<T>) * x, key, T(0));
                }
            });
        }
        for (index p = 0; p < number; ++p) {
            const Vector<T> sum = vector(sums + p * LANES<T>), inverse = 1 / sum;
            T* to = at<T>(out, item, panel[p].head, panel[p].start);
            transpose_columns(outs + p * wide * LANES<T>, s.value_dim, inverse, panel[p].count, to, out.row);
            if (!lse.data) continue;
            for (index i = 0; i < panel[p].count; ++i)
                *at<T>(lse, item, panel[p].head, panel[p].start + i) = maxima[p * LANES<T> + i] + std::log(sum[i]);
        }
    });
}

/// Products of a and b, summed to as many numbers as a vector has lanes.
template <class T>
Vector<T> lane_products(const T* a, const T* b, index size) {
    Vector<T> sum{};
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) sum += vector(a + i) * vector(b + i);
    for (; i < size; ++i) sum[0] += a[i] * b[i];
    return sum;
}

/// Copies the panel's rows of x to its slots in panels of WIDTH columns, as products take their right operand; other slots are 0.
template <class T>
void pack_slots(const T* x, index row, index count, index columns, index slots, T* packed) {
    for (index column = 0; column < columns; column += WIDTH<T>, packed += slots * WIDTH<T>)
        for (index i = 0; i < LANES<T>; ++i) {
            T* to = packed + i * WIDTH<T>;
            const index wide = i < count ? std::min<index>(WIDTH<T>, columns - column) : 0;
            if (wide == WIDTH<T>) std::memcpy(to, x + i * row + column, WIDTH<T> * sizeof(T));
            else for (index c = 0; c < WIDTH<T>; ++c) to[c] = c < wide ? x[i * row + column + c] : T(0);
        }
}

/// Gradients of `attend`, added to those of keys and values. The weights are computed again from the log-sum-exp, chunk by chunk of the
/// keys for all queries of a block; dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O)).
template <class T>
index attend_backward(
    const RangeSizes& s, Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor k_summary, Tensor v_summary, Tensor out, Tensor lse,
    Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_k_summary, Tensor d_v_summary, T* memory
) {
    const index group = s.group(), dim = s.head_dim, wide = s.value_dim, most = group * s.max_panels<T>();
    const index span_length = up_to(panels(s.time, s.spans), QUERIES);
    const T scale = 1 / std::sqrt(T(dim));
    const Source sources[] = {{k, v, d_k, d_v, false}, {k_summary, v_summary, d_k_summary, d_v_summary, true}};

    const auto block = [&](index item, index kv_head, index span, index start, Scratch<T> scratch) {
        std::vector<Panel<T>> panel(most);
        const index number = make_panels(s, kv_head, start, std::min({s.time, start + QUERIES, (span + 1) * span_length}), panel.data());
        const index per_head = number / group, slots = per_head * LANES<T>, row = slots + LANES<T>;
        T *keys = scratch.take(dim * KEY_ROW), *values = scratch.take(wide * KEY_ROW), *key_rows = scratch.take(KEYS * s.dim());
        T* queries = scratch.take(number * dim * LANES<T>);
        T* d_outs = scratch.take(number * wide * LANES<T>);
        T* d_queries = scratch.take(number * s.dim() * LANES<T>);
        T* query_rows = scratch.take(group * slots * padded<T>(dim));
        T* d_out_rows = scratch.take(group * slots * padded<T>(wide));
        T *normaliser = scratch.take(number * LANES<T>), *along = scratch.take(number * LANES<T>);
        T* weights = scratch.take((KEYS + 2 * MARGIN + MOST_ROWS) * row);
        T* d_scores = scratch.take((KEYS + 2 * MARGIN + MOST_ROWS) * row);
        std::vector<index> low(slots), high(slots);
        for (index p = 0; p < number; ++p) {
            const auto [head, first, count, _, __] = panel[p];
            const T *query = at<T>(q, item, head, first), *d_row = at<T>(d_out, item, head, first);
            const index slot = p / per_head * slots, offset = p % per_head * LANES<T> * WIDTH<T>;
            transpose_rows(query, q.row, count, dim, scale, queries + p * dim * LANES<T>, LANES<T>);
            transpose_rows(d_row, d_out.row, count, wide, T(1), d_outs + p * wide * LANES<T>, LANES<T>);
            pack_slots(query, q.row, count, dim, slots, query_rows + slot * padded<T>(dim) + offset);
            pack_slots(d_row, d_out.row, count, wide, slots, d_out_rows + slot * padded<T>(wide) + offset);
            Vector<T> products[LANES<T>] = {};
            for (index i = 0; i < LANES<T>; ++i) {  // an unused lane has weight 0
                normaliser[p * LANES<T> + i] = i < count ? *at<T>(lse, item, head, first + i) : std::numeric_limits<T>::infinity();
                if (i < count) products[i] = lane_products(d_row + i * d_out.row, at<T>(out, item, head, first + i), wide);
            }
            vector(along + p * LANES<T>) = reduce<T>(products, [](Vector<T> a, Vector<T> b) { return a + b; });
        }
        std::fill(d_queries, d_queries + number * s.dim() * LANES<T>, T(0));

        for (const Source& source : sources) {
            if (!source.k.data) continue;
            const index first_row = source.summaries ? span * s.summaries : 0;  // each span has its own gradients of the summaries
            for_each_chunk(s, source.summaries, panel.data(), number, [&](index chunk, index length) {
                const T *key = at<T>(source.k, item, kv_head, chunk), *value = at<T>(source.v, item, kv_head, chunk);
                by_dimension(key, source.k.row, length, dim, keys);
                by_dimension(value, source.v.row, length, wide, values);
                copy_rows(key, source.k.row, length, dim, key_rows, s.dim());
                for (index h = 0; h < group; ++h) {
                    for (index slot = 0; slot < slots; slot += LANES<T>) {
                        const index p = h * per_head + slot / LANES<T>;
                        const View<T> view(panel[p], chunk, length);
                        for (index i = 0; i < LANES<T>; ++i) low[slot + i] = index(view.low[i]), high[slot + i] = index(view.high[i]);
                        if (view.is_empty()) continue;
                        const index seen = view.to - view.from;
                        T *weight = weights + (MARGIN + view.from) * row + slot, *d_score = d_scores + (weight - weights);
                        const T *query = queries + p * dim * LANES<T>, *d_row = d_outs + p * wide * LANES<T>;
                        product<T>(seen, keys + view.from, KEY_ROW, query, LANES<T>, dim, weight, row, true);
                        product<T>(seen, values + view.from, KEY_ROW, d_row, LANES<T>, wide, d_score, row, true);
                        view.hide(weight, row);
                        const Vector<T> origin = vector(normaliser + p * LANES<T>), own = vector(along + p * LANES<T>);
                        for (index j = 0; j < seen * row; j += row) {
                            const Vector<T> x = vector(weight + j) = exponential(vector(weight + j) - origin);
                            vector(d_score + j) = x * (vector(d_score + j) - own) * scale;
                        }
                        for (index j = 1; j <= MARGIN; ++j)  // tiles of keys read beyond what the panel sees
                            for (T* x : {weight, d_score}) vector(x - j * row) = vector(x + (seen + j - 1) * row) = Vector<T>{};
                        product<T>(
                            dim, key_rows + view.from * s.dim(), s.dim(), d_score, row, seen, d_queries + p * s.dim() * LANES<T>,
                            LANES<T>, false
                        );
                    }
                    index from = 0, to = 0;  // the slots that see a tile of keys
                    by_rows(length, [&](index j, auto m) {
                        while (from < slots && high[from] <= j) ++from;
                        while (to < slots && low[to] < j + m) ++to;
                        if (from >= to) return;
                        const index at_weights = (MARGIN + j) * row + from;
                        const auto add = [&](const T* left, const T* right, index columns, const Tensor& gradient) {
                            T* target = at<T>(gradient, item, kv_head, first_row + chunk + j);
                            for (index column = 0; column < columns; column += WIDTH<T>) {
                                Tile<T, m()> tile;
                                tile.add_product(left, row, 1, right + (column * slots + from * WIDTH<T>), to - from);
                                tile.store(target + column, gradient.row, columns - column, true);
                            }
                        };
                        add(d_scores + at_weights, query_rows + h * slots * padded<T>(dim), dim, source.d_k);
                        add(weights + at_weights, d_out_rows + h * slots * padded<T>(wide), wide, source.d_v);
                    });
                }
            });
        }
        for (index p = 0; p < number; ++p)
            transpose_columns(
                d_queries + p * s.dim() * LANES<T>, dim, Vector<T>{} + T(1), panel[p].count,
                at<T>(d_q, item, panel[p].head, panel[p].start), d_q.row
            );
    };

    // Neighbouring spans add to the gradients of the same keys: first every other span runs, then those between.
    index total = 0;
    for (const index parity : {0, 1})
        total += in_parallel(s.batch * s.kv_heads * ((s.spans + 1 - parity) / 2), s, memory, [&](index task, Scratch<T> scratch) {
            const index kv_head = task % s.kv_heads, item = task / s.kv_heads % s.batch;
            const index span = task / s.kv_heads / s.batch * 2 + parity;
            for (index start = span * span_length; start < std::min(s.time, (span + 1) * span_length); start += QUERIES)
                block(item, kv_head, span, start, scratch);
        });
    return total;
}

}  // namespace

#define FUNCTIONS(TYPE, T)                                                                              \
    FUNCTION(attend, RangeSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6])                     \
    FUNCTION(attend_backward, RangeSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], \
             x[9], x[10], x[11], x[12])
extern "C" {
FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
}
