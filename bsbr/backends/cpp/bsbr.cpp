// BSBR on a CPU, one chunk of one head at a time: all that a chunk needs stays in the cache of one core, every product runs in
// registers, and only results go to memory. build.py compiles this file; operators.py documents its functions.

#include "bsbr/attention.h"
#include "bsbr/features.h"
#include "bsbr/retrieval.h"
#include "bsbr/states.h"

namespace {

/// Sizes of a sequence, or of a segment of it that begins with chunk `first`: the fields of `ChunkSizes`, where chunks are counted from
/// the first of the sequence, the number of chunks that have a state, and how many chunks are stored, mixed and read out together.
struct SequenceSizes {
    std::int64_t batch, heads, kv_heads, time, before, chunk_size, overlap, first, chunks, stored, group, head_dim, features, normalise,
        threads;

    ChunkSizes tokens(index time, index before, index chunks, index seen, bool unit_norm, index heads) const {
        return {batch, heads, kv_heads, time, before, chunk_size, overlap, chunks, seen, head_dim, features, unit_norm, normalise, false, threads};
    }
    WeightSizes weights(index rows, index chunks, index seen) const {
        return {batch, heads, kv_heads, rows, chunks, seen, head_dim, threads};
    }
    RetrievalSizes mixing(index rows, index chunks, index seen) const {
        return {batch, heads, kv_heads, rows, chunks, seen, features * head_dim, false, threads};
    }
    template <class T>
    index scratch_size() const {
        return std::max({
            tokens(time, 0, chunks, 0, false, heads).scratch_size<T>(), weights(chunks, stored, 0).scratch_size<T>(),
            mixing(chunks, stored, 0).scratch_size<T>(),
        });
    }
};

/// The tensor from a row on.
template <class T>
Tensor from_row(Tensor x, index row) {
    if (x.data) x.data = static_cast<T*>(x.data) + row * x.row;
    return x;
}

/// The whole of BSBR, without gradients. Writes the states of its chunks, the output, and the retrieved states of the last group, without
/// gain and normalisation. Before a segment, states and meta_key hold those of the earlier chunks; k and v begin `before` tokens before
/// q. weights: scratch [batch, heads, group, whole vectors of chunks].
template <class T>
index forward(
    const SequenceSizes& s, Tensor q, Tensor k, Tensor v, Tensor meta_query, Tensor meta_key, Tensor q_features, Tensor k_features,
    Tensor beta, Tensor gain, Tensor states, Tensor weights, Tensor mixed, Tensor out, T* memory
) {
    const Tensor& keys = k_features.data ? k_features : k;
    index total = 0;
    prefer_huge_pages<T>(out.data, s.batch * s.heads * s.time * s.head_dim);
    prefer_huge_pages<T>(states.data, s.batch * s.kv_heads * s.stored * s.features * s.head_dim);
    prefer_huge_pages<T>(mixed.data, s.batch * s.heads * s.group * s.features * s.head_dim);
    for (index start = s.first; start < s.chunks; start += s.group) {
        const index stop = std::min<index>(s.chunks, start + s.group), stored = std::min<index>(stop, s.stored);
        const index token = (start - s.first) * s.chunk_size, length = std::min<index>((stop - s.first) * s.chunk_size, s.time) - token;
        const index row = s.before + token, first_key = std::max<index>(0, row - s.overlap);  // of k and v
        const ChunkSizes storing = s.tokens(length, 0, stored - start, start, !k_features.data, s.kv_heads);
        total += chunk_states(
            storing, from_row<T>(keys, k_features.data ? token : row), from_row<T>(v, row), from_row<T>(beta, token),
            from_row<T>(states, start), memory
        );
        const index visible = stop - 1;  // chunks that the last row sees
        if (visible) {
            total += retrieval_weights(
                s.weights(stop - start, visible, start), from_row<T>(meta_query, start - s.first), meta_key, weights, memory
            );
            total += mix_states(s.mixing(stop - start, visible, start), weights, states, mixed, memory);
        }
        total += attend(
            s.tokens(length, row - first_key, stop - start, start, false, s.heads), from_row<T>(q, token), from_row<T>(k, first_key),
            from_row<T>(v, first_key), from_row<T>(q_features, token), mixed, gain, from_row<T>(out, token), memory
        );
    }
    return total;
}

}  // namespace

#define FUNCTIONS(TYPE, T)                                                                                                             \
    FUNCTION(forward, SequenceSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12])          \
    FUNCTION(chunk_states, ChunkSizes, TYPE, T, x[0], x[1], x[2], x[3])                                                                \
    FUNCTION(chunk_states_backward, ChunkSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6])                                     \
    FUNCTION(select_top_k, RetrievalSizes, TYPE, T, x[0], x[1])                                                                        \
    FUNCTION(mix_states, RetrievalSizes, TYPE, T, x[0], x[1], x[2])                                                                    \
    FUNCTION(mix_states_backward, RetrievalSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4])                                               \
    FUNCTION(retrieval_weights_backward, WeightSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5])                                     \
    FUNCTION(quadratic_features, FeatureSizes, TYPE, T, x[0], x[1])                                                                    \
    FUNCTION(quadratic_features_backward, FeatureSizes, TYPE, T, x[0], x[1], x[2])                                                     \
    FUNCTION(attend, ChunkSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6])                                                    \
    FUNCTION(attend_backward, ChunkSizes, TYPE, T, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12])
extern "C" {
FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
}
