"""Selection of a backend: the one that the option `impl` names, or the fastest that can take the inputs."""

from collections.abc import Callable, Mapping

import torch


def check_impl(impl: str, *names: str) -> str:
    """Returns `impl`; raises ValueError unless it is "auto", "torch" or one of `names`."""
    known = ("auto", "torch", *names)
    if impl not in known:
        raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}")
    return impl


def select(impl: str, backends: Mapping[str, Callable[[], str | None]]) -> str:
    """Name of the backend that runs.

    Args:
        impl: a backend, or "auto" for the first of `backends` that supports the inputs, or else "torch".
        backends: the backends that do not support every input, the fastest first, each with a function that returns why it cannot
            take the inputs, as a sentence, or None if it can. "torch" takes every input.

    Raises:
        NotImplementedError: if `impl` names a backend that does not support the inputs.
    """
    if impl == "auto":
        return next((name for name, unsupported in backends.items() if unsupported() is None), "torch")
    reason = backends[impl]() if impl in backends else None
    if reason:
        raise NotImplementedError(f"impl='{impl}' was asked for: {reason}; impl='torch' takes every input")
    return impl


def is_transformed() -> bool:
    """Whether torch.func, torch.vmap or forward-mode differentiation is at work, which only the torch backend has rules for."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
