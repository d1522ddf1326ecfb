"""Floating point operations of some work, counted by torch."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from evals.measure import Work


def count_flops(work: Work) -> int:
    """FLOPs of the matrix products that one call of `work` runs: multiply-add = 2, masked halves included."""
    with FlopCounterMode(display=False, custom_mapping=UNREGISTERED) as counter:
        work()
    return int(counter.get_total_flops())


def _flash_for_cpu(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, heads, queries, head_dim = q
    return int(2 * batch * heads * queries * k[2] * (head_dim + v[3]))


def _flash_for_cpu_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, heads, queries, head_dim = q
    return int(2 * batch * heads * queries * k[2] * (3 * head_dim + 2 * v[3]))


def _solve_triangular(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    *batch, rows, columns = b
    return int(torch.Size(batch).numel() * rows * rows * columns)


def _embedding_bag(weight: Any, indices: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * torch.Size(indices).numel() * weight[1])


UNREGISTERED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_for_cpu_backward,
    torch.ops.aten.linalg_solve_triangular: _solve_triangular,
    torch.ops.aten._embedding_bag: _embedding_bag,
    torch.ops.aten._embedding_bag_forward_only: _embedding_bag,
}
"""Operators that torch counts as 0 by itself, with their FLOPs from the shapes of their arguments."""
