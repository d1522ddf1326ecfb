"""Kernels of the baselines: adapters to kernels of other projects, and building blocks that several baselines share."""


def check_impl(impl: str, *known: str) -> str:
    """Returns `impl`. Raises ValueError unless it is one of the known implementations."""
    if impl not in known:
        raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}")
    return impl
