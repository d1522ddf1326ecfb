"""Adapter to torch's FlexAttention, a kernel for any attention mask: `impl: flex` of sliding_window and sparse.

Dong et al. 2024, arXiv:2412.05496. On CUDA it is compiled and skips masked blocks; not yet run there. On a CPU it runs uncompiled,
only to test the masks: it holds all n×n scores and has no backward pass (NotImplementedError), so it is never certified there.
"""

import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    # Imported late at run time, because it loads torch's compiler, which takes seconds.
    from torch.nn.attention.flex_attention import BlockMask

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query index, key index) -> whether the query attends to the key; all are integer tensors, indices from 0."""


def masked_attention(mask_function: MaskFunction, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of each query over the keys that `mask_function` selects.

    Args:
        mask_function: the mask. Pass the same function object for the same mask: block masks and compiled kernels are cached by it.
        q: [batch, heads, m, head_dim].
        k, v: [batch, kv_heads, n, head_dim].

    Returns:
        [batch, heads, m, head_dim].
    """
    from torch.nn.attention.flex_attention import flex_attention

    mask = _block_mask(mask_function, q.shape[2], k.shape[2], str(q.device))
    grouped = q.shape[1] != k.shape[1]
    if q.is_cuda:
        return _compiled()(q, k, v, block_mask=mask, enable_gqa=grouped)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out


@lru_cache(maxsize=16)
def _block_mask(mask_function: MaskFunction, num_queries: int, num_keys: int, device: str) -> "BlockMask":
    from torch.nn.attention.flex_attention import create_block_mask

    # Compiled, create_block_mask holds no mask of all n×n pairs.
    compiled = device.startswith("cuda")
    return create_block_mask(mask_function, None, None, num_queries, num_keys, device=device, _compile=compiled)


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
