"""A device without float64, imitated on the CPU: what Apple's GPUs refuse is refused.

Tensors say that they are on the device "meta", which every build of PyTorch knows, and are computed on the CPU. A float64 tensor
there raises a TypeError, as it does on "mps", and an operation of tensors on both devices a RuntimeError.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from bsbr import precision

DEVICE = torch.device("meta")
COPIES = ("aten::_to_copy", "aten::copy_")


class OnDevice(Tensor):
    """A tensor that says that it is on the device."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "OnDevice":
        if on_cpu.dtype == torch.float64:
            raise TypeError("Cannot convert a Tensor to float64 dtype as the device doesn't support float64.")
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, on_cpu.shape, strides=on_cpu.stride(), storage_offset=on_cpu.storage_offset(), dtype=on_cpu.dtype, device=DEVICE
        )
        made.on_cpu = on_cpu
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """Computes what makes tensors on the device out of others, or out of none."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


@contextmanager
def device_without_float64() -> Iterator[torch.device]:
    """Context in which there is a device without float64."""
    known = precision.DEVICES_WITHOUT_FLOAT64
    precision.DEVICES_WITHOUT_FLOAT64 = (DEVICE.type,)
    try:
        with _Operations():
            yield DEVICE
    finally:
        precision.DEVICES_WITHOUT_FLOAT64 = known


def compute(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Computes an operation on the CPU, and puts its result where the device would have put it."""
    name = function._schema.name  # type: ignore[attr-defined]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_on_device = any(isinstance(tensor, OnDevice) for tensor in tensors)
    if is_on_device and name not in COPIES and any(tensor.dim() for tensor in tensors if not isinstance(tensor, OnDevice)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices ({name})")
    target = torch.device(kwargs.get("device") or (DEVICE if is_on_device else "cpu"))
    on_cpu_args, on_cpu_kwargs = tree_map(lambda leaf: leaf.on_cpu if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    if "device" in kwargs:
        on_cpu_kwargs["device"] = torch.device("cpu")
    result = function(*on_cpu_args, **on_cpu_kwargs)
    if target == DEVICE:
        result = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return return_and_correct_aliasing(function, args, kwargs, result)
