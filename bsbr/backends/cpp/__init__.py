"""C++ kernels on a CPU, and BSBR's own.

For any attention: `build` compiles a source, `calls` passes tensors to its functions and registers them with torch, and
`differentiable` makes them differentiable. `tensors.h`, `tiles.h` and `vectors.h` are what a source is written
with; docs/user-guide/kernels.md writes one.

BSBR's functions are in `bsbr.cpp` and the folder `bsbr`: one chunk of one head at a time, in the cache of one core, forward and
backward. Operations on whole tensors (`bsbr.backends.pytorch`) write every intermediate result to memory, which takes longer than
the matrix products. `operators` registers its functions, `functions` makes them differentiable, and `segment` composes them.
A whole sequence is one operator without gradients, and four with them. Retrieval is in torch (`bsbr.backends.retrieval`) only with
`top_k`, and for segments that follow earlier ones.
"""
