// Matrix products in registers.
//
// A product takes its right operand *packed*: in panels of WIDTH columns, one after the other, each row of a panel
// contiguous, with zeros after the last column. Its left operand stays where it is, under any two strides.

#pragma once

#include "vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 12, TALL = 16;  // of a tile of two vectors, and of one: the sums and their operands fill 32 registers
#else
constexpr int ROWS = 6, TALL = 8;  // 16 registers of AVX2; 32 of half the size of NEON
#endif

template <class T>
constexpr int WIDTH = 2 * LANES<T>;

// --- products -----------------------------------------------------------------------------------

/// Floating point operations of this thread's products; a test compares them with those that an attention declares.
/// The model avoids a call, which would cost the products their registers.
#if defined(__linux__)
__attribute__((tls_model("initial-exec")))
#endif
thread_local index operations;

/// M rows and VECTORS vectors of columns of sums, in registers. VECTORS = 2 is a whole panel, 1 its first half.
template <class T, int M, int VECTORS = 2>
struct Tile {
    Vector<T> sum[M][VECTORS];

    __attribute__((always_inline)) Tile() : sum{} {}

    /// The sums that are stored at `from`, in rows of whole vectors.
    __attribute__((always_inline)) Tile(const T* from, index row) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < VECTORS; ++j) sum[i][j] = vector(from + i * row + j * LANES<T>);
    }

    /// Adds left [M, depth] times right [depth, columns]; left(i, k) is at i * row + k * step. right is packed, or else its rows are
    /// right_row apart and have whole vectors.
    __attribute__((always_inline)) void add_product(
        const T* left, index row, index step, const T* right, index depth, index right_row = WIDTH<T>
    ) {
        operations += 2 * M * VECTORS * LANES<T> * depth;
        Vector<T> local[M][VECTORS];
        std::memcpy(local, sum, sizeof sum);
        for (index k = 0; k < depth; ++k, left += step, right += right_row) {
            Vector<T> panel[VECTORS];
#pragma GCC unroll 2
            for (int j = 0; j < VECTORS; ++j) panel[j] = vector(right + j * LANES<T>);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
                for (int j = 0; j < VECTORS; ++j) local[i][j] += left[i * row] * panel[j];
        }
        std::memcpy(sum, local, sizeof sum);
    }

    __attribute__((always_inline)) void negate() {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < VECTORS; ++j) sum[i][j] = -sum[i][j];
    }

    __attribute__((always_inline)) void scale_rows(const T* by) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < VECTORS; ++j) sum[i][j] *= by[i];
    }

    /// Writes the first `columns` columns, or adds them to what `to` holds; there may be fewer.
    __attribute__((always_inline)) void store(T* to, index row, index columns, bool add = false) {
        if (columns >= VECTORS * LANES<T>) {
            if (add) {
#pragma GCC unroll 16
                for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
                    for (int j = 0; j < VECTORS; ++j) sum[i][j] += vector(to + i * row + j * LANES<T>);
            }
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
                for (int j = 0; j < VECTORS; ++j) vector(to + i * row + j * LANES<T>) = sum[i][j];
            return;
        }
        T rows[M][VECTORS * LANES<T>];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < VECTORS; ++j) vector(rows[i] + j * LANES<T>) = sum[i][j];
        for (int i = 0; i < M; ++i)
            for (index j = 0; j < columns; ++j) to[i * row + j] = rows[i][j] + (add ? to[i * row + j] : T(0));
    }
};

/// M rows of left times at least the first `columns` columns of right, to whole vectors of `to`: no more than a vector is wasted,
/// as at the diagonal of a causal product.
template <class T, int M>
inline void products(const T* left, index row, const T* right, index depth, index columns, T* to, index to_row) {
    for (index column = 0; column < columns; column += WIDTH<T>, right += WIDTH<T> * depth) {
        if (columns - column > LANES<T>) {
            Tile<T, M> tile;
            tile.add_product(left, row, 1, right, depth);
            tile.store(to + column, to_row, WIDTH<T>);
        } else {
            Tile<T, M, 1> tile;
            tile.add_product(left, row, 1, right, depth);
            tile.store(to + column, to_row, LANES<T>);
        }
    }
}

/// Calls body(first row, number of rows as a constant) for all rows: blocks of ROWS, then smaller blocks for the remainder.
template <int M = ROWS, class Body>
inline void by_rows(index rows, Body&& body, index start = 0) {
    for (; start + M <= rows; start += M) body(start, std::integral_constant<int, M>{});
    if constexpr (M > 1) by_rows<(M > 8 ? 8 : M > 4 ? 4 : M > 2 ? 2 : 1)>(rows, body, start);
}

/// Products of a query with `count` keys, times `scale`; LANES keys at a time, so that lanes are summed only once. Writes whole vectors.
template <class T>
void score(const T* query, const T* keys, index row, index count, index size, T scale, T* to) {
    operations += 2 * count * size;
    for (index start = 0; start < count; start += LANES<T>) {
        Vector<T> sums[LANES<T>];
        for (int i = 0; i < LANES<T>; ++i) {
            const T* key = keys + std::min<index>(start + i, count - 1) * row;
            Vector<T> sum{};
            index j = 0;
            for (; j + LANES<T> <= size; j += LANES<T>) sum += vector(query + j) * vector(key + j);
            for (; j < size; ++j) sum[0] += query[j] * key[j];
            sums[i] = sum;
        }
        vector(to + start) = reduce<T>(sums, [](Vector<T> a, Vector<T> b) { return a + b; }) * scale;
    }
}

// --- packing ------------------------------------------------------------------------------------

constexpr int AHEAD = 16;  // rows

/// Prefetches a row that is read soon: rows of a head are too far apart for the processor's own prefetcher.
template <class T>
inline void fetch(const T* row, index size) {
    for (index i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

/// The vector of `column`, a multiple of LANES, of what is packed: the right operand of a tile with one vector.
template <class T>
inline const T* half_panel(const T* packed, index depth, index column) {
    return packed + column / WIDTH<T> * WIDTH<T> * depth + column % WIDTH<T>;
}

/// Packs x [depth, columns], whose rows are `row` elements apart. Rows of zeros follow up to `room` rows in all.
template <class T>
inline void pack(const T* x, index row, index depth, index columns, T* packed, index room = 0) {
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
        for (index k = depth; k < room; ++k, packed += WIDTH<T>)
            vector(packed) = vector(packed + LANES<T>) = Vector<T>{};
    }
}

/// Packs the transpose of x [columns, depth], whose rows are `row` elements apart; blocks of LANES x LANES in registers.
template <class T>
inline void pack_transposed(const T* x, index row, index depth, index columns, T* packed) {
    constexpr int L = LANES<T>;
    for (index start = 0; start < columns; start += WIDTH<T>, packed += depth * WIDTH<T>)
        for (index half = 0; half < WIDTH<T>; half += L) {
            const T* from = x + (start + half) * row;
            const index wide = std::clamp<index>(columns - start - half, 0, L);
            index k = 0;
            if (wide == L) {
                for (int i = 0; i < L; ++i) fetch(from + (i + L) * row, depth);
                for (; k + L <= depth; k += L) {
                    Vector<T> block[L];
#pragma GCC unroll 16
                    for (int i = 0; i < L; ++i) block[i] = vector(from + i * row + k);
                    transpose<T>(block);
#pragma GCC unroll 16
                    for (int i = 0; i < L; ++i) vector(packed + (k + i) * WIDTH<T> + half) = block[i];
                }
            }
            if (wide == 0)
                for (; k < depth; ++k) vector(packed + k * WIDTH<T> + half) = Vector<T>{};
            for (; k < depth; ++k)
                for (index j = 0; j < L; ++j) packed[k * WIDTH<T> + half + j] = j < wide ? from[j * row + k] : T(0);
        }
}

/// Unpacks [depth, columns] into x, whose rows are `row` elements apart.
template <class T>
inline void unpack(const T* packed, index depth, index columns, T* x, index row) {
    for (index start = 0; start < columns; start += WIDTH<T>) {
        const index wide = std::min<index>(WIDTH<T>, columns - start);
        for (index k = 0; k < depth; ++k, packed += WIDTH<T>) {
            T* to = x + k * row + start;
            if (wide == WIDTH<T>) vector(to) = vector(packed), vector(to + LANES<T>) = vector(packed + LANES<T>);
            else std::copy(packed, packed + wide, to);
        }
    }
}

}  // namespace
