"""How much two values of one module may differ by rounding, and how values that calls have returned are compared."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from evals.benchmark.modules import Module, attentions_of
from evals.certification.subject import ROUNDING, coarser
from evals.config import DTYPES, Comparison


def numbers_in(returned: Any) -> list[Tensor]:
    """All tensors of real numbers in what a call has returned, but for empty ones."""
    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]


def copies(returned: Any) -> list[Tensor]:
    """Copies of `numbers_in`. Taken at once after a call, they hold what it had computed when it returned."""
    return [leaf.detach().clone() for leaf in numbers_in(returned)]


def value_difference(returned: Any, truth: Any, allowed: float) -> str:
    """How two values that calls have returned differ; empty if by no more than `allowed` of the largest number."""
    numbers, true_numbers = numbers_in(returned), numbers_in(truth)
    if [one.shape for one in numbers] != [one.shape for one in true_numbers]:
        return f"it has {len(numbers)} tensors of other shapes than the {len(true_numbers)} expected"
    for index, (one, other) in enumerate(zip(numbers, true_numbers, strict=True)):
        error, size = float((one - other).abs().max()), float(other.abs().max())
        if not error <= 3 * allowed * size:
            return f"its tensor {index} differs by {error:.1e} of {size:.1e}"
    return ""


def allowed_rounding(module: Module, comparison: Comparison) -> float:
    """Largest difference between two orders of the same sums, relative to the largest output: each attention adds its share."""
    dtype = DTYPES[precision(module, comparison) or comparison.device.dtype]
    return ROUNDING[dtype] * len(attentions_of(module))


def precision(module: Module, comparison: Comparison) -> str:
    """The precision in which a module's attentions say that they compute, if it is coarser than that of the comparison."""
    dtype = comparison.device.torch_dtype
    coarsest = dtype
    for attention in attentions_of(module):
        coarsest = coarser(coarsest, attention.computes_in)
    return "" if coarsest == dtype else str(coarsest).removeprefix("torch.")
