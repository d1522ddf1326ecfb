"""BSBR on a CPU in C++: one chunk of one head at a time, in the cache of one core, forward and backward.

Operations on whole tensors (`bsbr.backends.pytorch`) write every intermediate result to memory, which takes longer than the
matrix products. `bsbr.cpp` fuses the scores, softmax, values and read-out of a chunk, and their gradients. Retrieval between
chunks is in `bsbr.backends.retrieval`.

`build` compiles the library, `calls` passes tensors to it, `operators` registers its functions with torch, `functions` makes
them differentiable, and `segment` composes them.
"""
