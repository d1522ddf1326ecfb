"""Whether the GPU code of this project is known to work: the only place that decides it."""

EXPERIMENTAL = True
"""Until `make gpu` has passed on a machine with CUDA. README, docs/user-guide/gpu.md, `--help` and the column `impl` follow."""

MARK = " (experimental)"


def marked(name: str, device: str) -> str:
    """A name, with the mark of what is experimental on this device (cpu or cuda)."""
    return name + MARK if EXPERIMENTAL and device == "cuda" else name
