"""Traces a computation on tensors without data: its FLOPs, and the bytes of given tensors that it reads."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evals.measure.flops import count_flops

LOOKUPS = ("embedding", "_embedding_bag", "_embedding_bag_forward_only", "index", "index_select", "gather")
"""Operations that read only some rows of a tensor, depending on data."""


class Trace(NamedTuple):
    """The cost and the result of a computation."""

    flops: int  # of matrix products, masked halves included
    read_bytes: int  # of the given tensors, each byte counted once
    result: Any


def trace(computation: Callable[[], Any], tensors: Iterable[Tensor]) -> Trace:
    """Runs a computation and counts its FLOPs and which bytes of some tensors it reads.

    Args:
        computation: runs operations of torch; kernels that bypass its dispatcher are not seen.
        tensors: parameters, inputs and states; only reads of these are counted.
    """
    reads = ReadBytes(tensors)
    results = []
    with reads:
        flops = count_flops(lambda: results.append(computation()))
    return Trace(flops, sum(reads.by_storage.values()), results[0])


class ReadBytes(TorchDispatchMode):
    """While active, counts for each storage the most bytes of it that any single operation reads to compute something."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors = list(tensors)  # kept alive, or a later storage could have the key of a freed one
        self.by_storage = {storage_key(tensor): 0 for tensor in self.tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        writes = func._schema.is_mutable or any(isinstance(leaf, Tensor) and leaf.numel() for leaf in tree_leaves(result))
        if writes and reads_elements(func):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and storage_key(leaf) in self.by_storage:
                    key = storage_key(leaf)
                    self.by_storage[key] = max(self.by_storage[key], extent(leaf))
        return result


def reads_elements(func: Any) -> bool:
    """Whether an operation reads all elements of its tensors, unlike views, allocations and look-ups."""
    name = func.overloadpacket.__name__
    return not (func.is_view or name in LOOKUPS or name == "_unsafe_view" or name.endswith("_like") or name.startswith("new_"))


def storage_key(tensor: Tensor) -> int:
    """Identity of a tensor's storage, for as long as the storage lives."""
    return int(tensor.untyped_storage()._cdata)


def extent(tensor: Tensor) -> int:
    """Upper bound of the bytes of distinct elements in a view: rows that repeat or overlap are read once."""
    elements = span = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
        span += (size - 1) * stride
    return min(elements, span) * tensor.itemsize
