"""Implementations of BSBR on tensors: torch operations, C++ for CPUs, Triton kernels for GPUs; `dispatch` selects one."""
