"""BSBR on a CPU in C++: one chunk of one head at a time, in the cache of one core, forward and backward.

Operations on whole tensors (`bsbr.backends.pytorch`) send every intermediate result through memory, which takes longer than
the products between them. `bsbr.cpp` fuses what a chunk needs: its scores, softmax, values and read-out, or all their
gradients. Retrieval between chunks is `bsbr.backends.retrieval`.

`build` compiles the library, `calls` passes tensors to it, `operators` registers its functions with torch, `functions` makes
them differentiable, and `segment` composes them.
"""
