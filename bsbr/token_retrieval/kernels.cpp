// Retrieval per token on a CPU. build.py compiles this file; cpp.py documents its functions.
//
// A task takes some thousand tokens of one head. Their candidates are chosen from the scores of a few rows at a time; the pairs of a
// token and a state are sorted by state; each state, once in the cache, is read by all of its tokens in one product in registers.

#include <vector>

#include "bsbr/attention.h"
#include "bsbr/states.h"

namespace {

// --- states and keys of chunks --------------------------------------------------------------------

/// F_s of every chunk, and z_s: what the same rule makes of values of 1. Without beta, sums.
template <class T>
index stored(const ChunkSizes& s, Tensor keys, Tensor v, Tensor beta, Tensor states, Tensor ones, T* memory) {
    prefer_huge_pages<T>(states.data, s.batch * s.kv_heads * s.chunks * s.features * s.head_dim);
    return in_parallel(s.batch * s.chunks * s.kv_heads, s, memory, [&](index task, Scratch<T> scratch) {
        const Stored<T> chunk(s, keys, v, task);
        T *state = at<T>(states, chunk.item, chunk.head, chunk.number), *z = at<T>(ones, chunk.item, chunk.head, chunk.number);
        std::fill_n(z, s.features, T(0));
        if (!beta.data) {
            sum_state(s, chunk, keys.row, v.row, state, scratch);
            for (index i = 0; i < s.chunk_size; ++i)
                for (index f = 0; f < s.features; ++f) z[f] += chunk.key[i * keys.row + f];
            return;
        }
        const T* rate = at<T>(beta, chunk.item, chunk.head, chunk.start);
        DeltaBlock<T> block(s, scratch);
        T *packed = scratch.take(s.features * padded<T>(s.head_dim)), *x = scratch.take(BLOCK * padded<T>(s.head_dim));
        for (index start = 0; start < s.chunk_size; start += BLOCK) {
            const index count = std::min<index>(BLOCK, s.chunk_size - start);
            block.load(s, chunk.key + start * keys.row, keys.row, rate + start * beta.row, beta.row, count);
            pack(chunk.value + start * v.row, v.row, count, s.head_dim, x, BLOCK);
            for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                T *panel = x + column * BLOCK, *of_state = packed + column * s.features;
                solve_values(block, start ? of_state : nullptr, s.features, panel);
                scale_block(panel, block.rates, panel);
                add_block(block, panel, s.features, of_state, start == 0);
            }
            T u[BLOCK];
            for (index i = 0; i < count; ++i) u[i] = 1 - dot(block.keys + i * block.row, z, s.features);
            for (index i = 0; i < count; ++i)
                for (index j = 0; j < i; ++j) u[i] += block.weights[i * BLOCK + j] * u[j];
            for (index i = 0; i < count; ++i)
                for (index f = 0; f < s.features; ++f) z[f] += block.rates[i] * u[i] * block.keys[i * block.row + f];
        }
        unpack(packed, s.features, s.head_dim, state, s.head_dim);
    });
}

// --- softmax inside chunks ------------------------------------------------------------------------

/// softmax(QKᵀ/√d ⊙ M_in) V: `attend` of bsbr/attention.h with states of no rows.
template <class T>
index local(const ChunkSizes& s, Tensor q, Tensor k, Tensor v, Tensor out, T* memory) {
    prefer_huge_pages<T>(out.data, s.batch * s.heads * s.time * s.head_dim);
    return attend(s, q, k, v, Tensor{}, Tensor{}, Tensor{}, out, memory);
}

// --- retrieval ------------------------------------------------------------------------------------

/// Sizes of retrieval by `time` tokens that begin at a chunk boundary, after `seen` chunks, from `chunks` chunks. candidates: k.
struct TokenSizes {
    std::int64_t batch, heads, kv_heads, time, chunk_size, seen, chunks, head_dim, features, candidates, threads;

    /// Tokens of a task: so many that a state is read by some of them, and their reads fit the cache of a core.
    index tokens() const {
        const index wanted = std::max<index>(1024, 16 * chunks / candidates), most = (index(1) << 19) / (candidates * head_dim);
        return std::clamp<index>(std::min(wanted, most), 1, time);
    }

    template <class T>
    index scratch_size() const {
        const index pairs = tokens() * candidates, dim = padded<T>(head_dim);
        return panels(pairs * (head_dim + 1) + features * (padded<T>(chunks) + dim + ROWS) + ROWS * (score_row<T>(chunks) + dim + 16), 16) *
            16 + 256;
    }
};

/// Indices of the `count` highest of `size` scores, the highest first and the earliest of equals. highest: scratch of `count` numbers.
template <class T>
void select_highest(const T* score, index size, index count, T* highest, std::int32_t* best) {
    index found = 0;
    for (index start = 0; start < size; start += LANES<T>) {
        const index stop = std::min<index>(size, start + LANES<T>);
        if (found == count) {  // most vectors have no score above the lowest of the best
            const auto above = vector(score + start) > highest[count - 1] + Vector<T>{};
            bool any = false;
            for (int j = 0; j < LANES<T>; ++j) any |= above[j] != 0;
            if (!any) continue;
        }
        for (index j = start; j < stop; ++j) {
            if (found == count && !(score[j] > highest[count - 1])) continue;
            index place = found < count ? found++ : count - 1;
            for (; place > 0 && score[j] > highest[place - 1]; --place) highest[place] = highest[place - 1], best[place] = best[place - 1];
            highest[place] = score[j], best[place] = static_cast<std::int32_t>(j);
        }
    }
}

/// to += x * factor
template <class T>
void add_scaled(const T* x, T factor, index size, T* to) {
    index i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) vector(to + i) += vector(x + i) * factor;
    for (; i < size; ++i) to[i] += x[i] * factor;
}

/// Weights γ ∝ (e + ε)^p of `count` energies, in their place, times `factor`.
template <class T>
void weigh(T* energies, index count, T exponent, T factor) {
    constexpr T EPSILON = T(1e-6);
    T most = -std::numeric_limits<T>::infinity(), sum = 0;
    for (index j = 0; j < count; ++j) most = std::max(most, energies[j] = exponent * std::log(energies[j] + EPSILON));
    for (index j = 0; j < count; ++j) sum += energies[j] = std::exp(energies[j] - most);
    for (index j = 0; j < count; ++j) energies[j] *= factor / sum;
}

/// Adds g Σ_s γ_is F_sᵀ φ(q_i) over the k candidates of each token, by the energy of what is read, to `out`.
template <class T>
index retrieve(const TokenSizes& s, Tensor features, Tensor keys, Tensor states, Tensor gain, Tensor exponent, Tensor out, T* memory) {
    const index length = s.tokens(), blocks = panels(s.time, length), group = s.heads / s.kv_heads, k = s.candidates;
    const index dim = padded<T>(s.head_dim), row = score_row<T>(s.chunks);
    const bool packs = s.head_dim % WIDTH<T>;
    return in_parallel(s.batch * s.heads * blocks, s, memory, [&](index task, Scratch<T> scratch) {
        const index head = task % s.heads, item = task / s.heads % s.batch, first = task / s.heads / s.batch * length;
        const index last = std::min<index>(s.time, first + length);
        const auto visible_from = [&](index token) { return std::min<index>(s.chunks, s.seen + token / s.chunk_size); };
        const index most = visible_from(last - 1), begin = std::max<index>(first, s.seen ? 0 : s.chunk_size);
        if (!most || begin >= last) return;
        const index tokens = last - begin;
        T *reads = scratch.take(tokens * k * s.head_dim), *energies = scratch.take(tokens * k);
        std::vector<std::int32_t> best(tokens * k), order(tokens * k), end(most + 1);

        T* packed_keys = scratch.take(s.features * padded<T>(s.chunks));
        T* scores = scratch.take(ROWS * row);
        T* highest = scratch.take(std::max<index>(k, 16));
        if (most > k) pack_transposed(at<T>(keys, item, head / group, 0), keys.row, s.features, most, packed_keys);
        for (index token = begin, next; token < last; token = next) {
            next = std::min(last, (token / s.chunk_size + 1) * s.chunk_size);
            const index visible = visible_from(token);
            by_rows(next - token, [&](index i, auto m) {
                std::int32_t* chosen = best.data() + (token - begin + i) * k;
                if (visible > k)
                    products<T, m()>(at<T>(features, item, head, token + i), features.row, packed_keys, s.features, visible, scores, row);
                for (int a = 0; a < m; ++a, chosen += k) {
                    if (visible > k) select_highest(scores + a * row, visible, k, highest, chosen);
                    else for (index j = 0; j < visible; ++j) chosen[j] = static_cast<std::int32_t>(j);
                    for (index j = 0; j < std::min(visible, k); ++j) ++end[chosen[j] + 1];
                }
            });
        }
        // `order` has the pairs of each state together; end[s] becomes the end of those of state s.
        for (index state = 0; state < most; ++state) end[state + 1] += end[state];
        for (index token = begin; token < last; ++token)
            for (index j = 0; j < std::min(visible_from(token), k); ++j) {
                const index pair = (token - begin) * k + j;
                order[end[best[pair]]++] = static_cast<std::int32_t>(pair);
            }

        T *rows = scratch.take(ROWS * s.features), *read = scratch.take(ROWS * dim), *packed = scratch.take(s.features * dim);
        for (index state = 0, start = 0; state < most; start = end[state++]) {
            if (end[state] == start) continue;
            const T* from = at<T>(states, item, head / group, state);
            if (packs) pack(from, s.head_dim, s.features, s.head_dim, packed);
            by_rows(end[state] - start, [&](index i, auto m) {
                const std::int32_t* pairs = order.data() + start + i;
                for (int a = 0; a < m; ++a)
                    std::copy_n(at<T>(features, item, head, begin + pairs[a] / k), s.features, rows + a * s.features);
                for (index column = 0; column < s.head_dim; column += WIDTH<T>) {
                    Tile<T, m()> tile;
                    if (packs) tile.add_product(rows, s.features, 1, packed + column * s.features, s.features);
                    else tile.add_product(rows, s.features, 1, from + column, s.features, s.head_dim);
                    tile.store(read + column, dim, WIDTH<T>);
                }
                for (int a = 0; a < m; ++a) {
                    std::copy_n(read + a * dim, s.head_dim, reads + pairs[a] * s.head_dim);
                    energies[pairs[a]] = dot(read + a * dim, read + a * dim, s.head_dim) / s.head_dim;
                }
            });
        }
        const T factor = *at<T>(gain, 0, 0, head), power = *at<T>(exponent, 0, 0, head);
        for (index token = begin; token < last; ++token) {
            const index count = std::min(visible_from(token), k);
            T *weights = energies + (token - begin) * k, *to = at<T>(out, item, head, token);
            weigh(weights, count, power, factor);
            for (index j = 0; j < count; ++j) add_scaled(reads + ((token - begin) * k + j) * s.head_dim, weights[j], s.head_dim, to);
        }
    });
}

// --- decoding -------------------------------------------------------------------------------------

/// What the states of complete chunks are stored as.
enum StateType : std::int64_t { EXACT, BFLOAT16, INT8 };

/// Sizes of retrieval by one token from `pages` pages, each with `page` chunks but the last, which has `last`.
struct PageSizes {
    std::int64_t batch, heads, kv_heads, pages, page, last, head_dim, features, candidates, type, threads;

    index chunks() const { return (pages - 1) * page + last; }

    template <class T>
    index scratch_size() const {
        const index all = panels(chunks(), WIDTH<T>) * WIDTH<T> + WIDTH<T>;
        return panels(all + candidates * (padded<T>(head_dim) + 2) + 64, 16) * 16;
    }
};

inline float number(float x) { return x; }
inline double number(double x) { return x; }
inline float number(std::int8_t x) { return x; }
inline float number(std::uint16_t x) {  // bfloat16
    const std::uint32_t bits = std::uint32_t(x) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof bits);
    return result;
}

/// read = Fᵀ φ of one state [features, dim].
template <class T, class Number>
void read_state(const T* phi, const Number* state, index features, index dim, T* read) {
    std::fill_n(read, dim, T(0));
    for (index f = 0; f < features; ++f) {
        const T factor = phi[f];
        const Number* row = state + f * dim;
#pragma omp simd
        for (index j = 0; j < dim; ++j) read[j] += factor * T(number(row[j]));
    }
    operations += 2 * features * dim;
}

/// Adds what one token retrieves to `out`. pages: addresses of keys, states and scales of each page [1, 1, pages, 3].
template <class T>
index decode(PageSizes s, Tensor features, Tensor pages, Tensor gain, Tensor exponent, Tensor out, T* memory) {
    const index group = s.heads / s.kv_heads, chunks = s.chunks(), k = s.candidates, dim = s.head_dim;
    if (s.batch * s.heads * (chunks + k * dim) * s.features < (1 << 17)) s.threads = 1;  // a thread would take longer to wake
    return in_parallel(s.batch * s.heads, s, memory, [&](index task, Scratch<T> scratch) {
        const index head = task % s.heads, item = task / s.heads, sequence = item * s.kv_heads + head / group;
        const T* phi = at<T>(features, item, head, 0);
        const auto address = [&](index page, int what) { return reinterpret_cast<const char*>(*(at<std::int64_t>(pages, 0, 0, page) + what)); };
        const auto length = [&](index page) { return page + 1 < s.pages ? index(s.page) : index(s.last); };
        T *scores = scratch.take(panels(chunks, WIDTH<T>) * WIDTH<T> + WIDTH<T>), *reads = scratch.take(k * dim);
        T *energies = scratch.take(k), *highest = scratch.take(k);
        std::vector<std::int32_t> best(k);
        for (index page = 0; page < s.pages; ++page) {
            const T* keys = reinterpret_cast<const T*>(address(page, 0)) + sequence * length(page) * s.features;
            score(phi, keys, s.features, length(page), s.features, T(1), scores + page * s.page);
        }
        select_highest(scores, chunks, k, highest, best.data());
        for (index j = 0; j < k; ++j) {
            const index page = best[j] / s.page, place = sequence * length(page) + best[j] % s.page;
            const index offset = place * s.features * dim;
            T* read = reads + j * dim;
            if (s.type == INT8) {
                read_state(phi, reinterpret_cast<const std::int8_t*>(address(page, 1)) + offset, s.features, dim, read);
                const float* scale = reinterpret_cast<const float*>(address(page, 2)) + place * dim;
                for (index i = 0; i < dim; ++i) read[i] *= scale[i];
            } else if (s.type == BFLOAT16) {
                read_state(phi, reinterpret_cast<const std::uint16_t*>(address(page, 1)) + offset, s.features, dim, read);
            } else {
                read_state(phi, reinterpret_cast<const T*>(address(page, 1)) + offset, s.features, dim, read);
            }
            energies[j] = dot(read, read, dim) / dim;
        }
        weigh(energies, k, *at<T>(exponent, 0, 0, head), *at<T>(gain, 0, 0, head));
        for (index j = 0; j < k; ++j) add_scaled(reads + j * dim, energies[j], dim, at<T>(out, item, head, 0));
    });
}

}  // namespace

#define FUNCTIONS(TYPE, T)                                                                                                             \
    FUNCTION(stored, ChunkSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4])                                                                \
    FUNCTION(local, ChunkSizes, TYPE, T, x[0], x[1], x[2], x[3])                                                                       \
    FUNCTION(retrieve, TokenSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5])                                                      \
    FUNCTION(decode, PageSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4])
extern "C" {
FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
}
