"""FlexAttention (Dong 2024, arXiv:2412.05496): one kernel for any pattern of who sees whom, for `impl: flex`.

On CUDA it is compiled and skips blocks that nobody sees; not yet run there. On a CPU it runs uncompiled, for tests of the
patterns: it then holds all n×n scores, and torch has no backward pass (NotImplementedError), so that it is never certified there.
"""

import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    # Imported where it is used: it loads torch's compiler, which takes seconds.
    from torch.nn.attention.flex_attention import BlockMask

IMPLEMENTATIONS = ("torch", "flex")

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, i, t) -> whether query i sees key t: all of them integer tensors, counted from the first query and key."""


def checked(impl: str) -> str:
    """Raises ValueError unless `impl` is one of them."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    return impl


def attention_where(sees: Sees, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax over the keys that each query sees. q: [batch, heads, m, head_dim]; k, v: [batch, kv_heads, n, head_dim].

    `sees` must be the same function for the same pattern: masks and compiled kernels are kept by it.
    """
    from torch.nn.attention.flex_attention import flex_attention

    mask = _mask(sees, q.shape[2], k.shape[2], str(q.device))
    grouped = q.shape[1] != k.shape[1]
    if q.is_cuda:
        return _compiled()(q, k, v, block_mask=mask, enable_gqa=grouped)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out


@lru_cache(maxsize=16)
def _mask(sees: Sees, queries: int, keys: int, device: str) -> "BlockMask":
    from torch.nn.attention.flex_attention import create_block_mask

    # Compiled, it never holds the mask of all pairs.
    return create_block_mask(sees, None, None, queries, keys, device=device, _compile=device.startswith("cuda"))


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
