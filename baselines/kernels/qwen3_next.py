"""Adapter to the gated delta rule of transformers' Qwen3-Next: `impl: transformers` of gated_delta_net.

It is what a user of that model runs on a CPU: torch operations and a loop over chunks, in float32. Ours is measured against it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COMPUTES_IN = torch.float32
"""The precision that it casts every input to."""


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, chunk_size: int, initial: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`baselines.gated_delta_net.gated_delta_rule` after the state `initial`, and the final state, None if `initial` is.

    Args:
        q: [batch, heads, time, head_dim].
        k, v: [batch, kv_heads, time, head_dim].
        beta, log_alpha: [batch, kv_heads, time].
        chunk_size: tokens computed together.
        initial: [batch, kv_heads, head_dim, head_dim]; None at the start of a sequence.

    Raises:
        NotImplementedError: if transformers is not installed.
    """
    groups = q.shape[1] // k.shape[1]
    k, v, beta, log_alpha = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v, beta, log_alpha))
    start = None if initial is None else initial.repeat_interleave(groups, dim=1)
    # The function takes time before heads, and divides queries by √head_dim.
    tensors = (x.transpose(1, 2) for x in (q * math.sqrt(q.shape[3]), k, v, log_alpha, beta))
    out, final = _function()(*tensors, chunk_size=chunk_size, initial_state=start, output_final_state=start is not None)
    return out.transpose(1, 2), None if final is None else final[:, ::groups]


@functools.cache
def _function() -> Callable[..., Any]:
    """The function itself, without the decorator that replaces it by a GPU kernel from a hub."""
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next
    except ModuleNotFoundError as error:
        raise NotImplementedError(f"impl=transformers needs the package transformers ({error})") from error
    function: Callable[..., Any] = modeling_qwen3_next.torch_chunk_gated_delta_rule.__wrapped__
    return function
