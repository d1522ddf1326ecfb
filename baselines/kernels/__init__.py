"""Kernels that baselines run on: adapters of other projects' kernels, and building blocks that several baselines share."""


def check_impl(impl: str, *known: str) -> str:
    """Returns `impl`. Raises ValueError unless it is one of the known implementations."""
    if impl not in known:
        raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}")
    return impl
