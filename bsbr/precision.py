"""Precision: float64 where a device does not have it, and computations that autocast must leave alone."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

DEVICES_WITHOUT_FLOAT64 = ("mps",)
"""Types of devices on which float64 does not exist: Apple's GPUs."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def device_for_float64(device: torch.device) -> torch.device:
    """The device itself, or the CPU if float64 does not exist there."""
    return torch.device("cpu") if device.type in DEVICES_WITHOUT_FLOAT64 else device


def to_float64(x: Tensor) -> Tensor:
    """Casts to float64, on the CPU if it does not exist on the device of x. Cast the result down before it is moved back."""
    return x.to(device_for_float64(x.device)).double()


def is_autocast() -> bool:
    """Whether autocast is enabled for any type of device."""
    return torch._C._is_any_autocast_enabled()


def without_autocast(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Makes a function of tensors compute in the dtypes that it chooses, also under `torch.autocast`.

    A function that casts half types up, because its sums need float32, needs this: autocast would cast the operands of each of
    its matrix products down again. Over 4096 tokens of float16, the sums of linear attention were then wrong by a half.
    """

    @functools.wraps(function)
    def run(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        if not is_autocast():
            return function(*arguments, **options)
        with torch.autocast(next(x.device.type for x in arguments if isinstance(x, Tensor)), enabled=False):
            return function(*arguments, **options)

    return run
