// Descriptions of tensors as calls.py passes them, scratch memory, the loop over tasks, and exports.

#pragma once

#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tiles.h"

extern "C" {

/// A tensor [batch, heads, rows, dim] with contiguous rows. States [batch, heads, chunks, d, e] have one contiguous row a chunk.
/// data is null for a tensor that is left out.
struct Tensor {
    void* data;
    std::int64_t batch, head, row;  // strides in elements
};

}

namespace {

/// The address of a row.
template <class T>
T* at(const Tensor& x, index item, index head, index row) {
    return static_cast<T*>(x.data) + item * x.batch + head * x.head + row * x.row;
}

/// Asks the system for huge pages for the part of `count` elements that fills whole ones, if these are not yet in memory: without
/// them, the first writes to 16 MB stop 4,096 times for a page.
template <class T>
void prefer_huge_pages(void* data, index count) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t HUGE_PAGE = 1 << 21;
    const auto start = reinterpret_cast<std::uintptr_t>(data), end = start + count * sizeof(T);
    const std::uintptr_t first = (start + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, last = end / HUGE_PAGE * HUGE_PAGE;
    if (data && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

/// Scratch memory of one thread. `take` returns consecutive pieces, each beginning at a cache line.
template <class T>
struct Scratch {
    T* next;
    T* take(index size) {
        T* piece = next;
        next += panels(size, 16) * 16;
        return piece;
    }
};

/// Columns rounded up to whole panels.
template <class T>
index padded(index columns) {
    return panels(columns, WIDTH<T>) * WIDTH<T>;
}

/// While it lives, its thread takes numbers below the smallest normal one for 0, in operands and in results. Arithmetic with them is
/// tens of times slower, and states that decay are full of them.
class FlushDenormals {
#if defined(__x86_64__)
    const unsigned before = __builtin_ia32_stmxcsr();

  public:
    FlushDenormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
    std::uint64_t before;

  public:
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | std::uint64_t(1) << 24));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#else
  public:
    ~FlushDenormals() {}
#endif
};

/// Calls body(task, scratch of its thread) for all tasks, on up to s.threads threads. A structure of sizes has `threads`, and
/// scratch_size<T>(), the elements of scratch memory that one thread needs: a whole number of cache lines.
/// Returns the floating point operations of the tasks' products.
template <class T, class S, class Body>
index in_parallel(index tasks, const S& s, T* memory, Body&& body) {
    const int threads = static_cast<int>(std::clamp<index>(s.threads, 1, std::max<index>(tasks, 1)));
    const index size = s.template scratch_size<T>();
    index total = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1) reduction(+ : total)
    for (index task = 0; task < tasks; ++task) {
        const FlushDenormals flush;
        operations = 0;
        body(task, Scratch<T>{memory + omp_get_thread_num() * size});
        total += operations;
    }
    return total;
}

}  // namespace

// --- exports --------------------------------------------------------------------------------------

/// Exports NAME for the element type T as two C functions, NAME_TYPE and NAME_scratch_TYPE. SIZES: its structure of sizes.
/// The rest: its tensors x[0], x[1], … in the order of the caller.
#define FUNCTION(NAME, SIZES, TYPE, T, ...)                                                                                          \
    std::int64_t NAME##_scratch_##TYPE(const void* s) { return static_cast<const SIZES*>(s)->template scratch_size<T>(); }           \
    std::int64_t NAME##_##TYPE(const void* s, const Tensor* x, T* memory) {                                                          \
        return NAME(*static_cast<const SIZES*>(s), __VA_ARGS__, memory);                                                             \
    }
