"""The only file that holds a clock or a memory counter."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def peak_allocated_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that `work` holds at once above what was held before it, by the CPU allocator's own account.

    Every allocation and release is an event of the profiler; their running sum is exact, which no polling is.
    Scratch that a library takes past torch's allocator is not in it.
    """
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def count_flops(work: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products that `work` runs, masked halves included."""
    with FlopCounterMode(display=False, custom_mapping=UNREGISTERED) as counter:
        work()
    return counter.get_total_flops()


def _flash_for_cpu(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, heads, queries, head_dim = q
    return int(2 * batch * heads * queries * k[2] * (head_dim + v[3]))


def _solve_triangular(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    *batch, rows, columns = b
    return int(torch.Size(batch).numel() * rows * rows * columns)


def _embedding_bag(weight: Any, indices: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * torch.Size(indices).numel() * weight[1])


UNREGISTERED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_for_cpu,
    torch.ops.aten.linalg_solve_triangular: _solve_triangular,
    torch.ops.aten._embedding_bag: _embedding_bag,
    torch.ops.aten._embedding_bag_forward_only: _embedding_bag,
}
"""What torch counts as 0, multiply-add = 2."""
