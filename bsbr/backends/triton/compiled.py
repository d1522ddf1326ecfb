"""python -m bsbr.backends.triton.compiled [80 | 90]: every kernel compiled for a GPU that need not be here, with what ptxas says of it.

The functions run as they do on a GPU but that each launch compiles and does not execute. Registers, spilled bytes and shared
memory come from ptxas, which triton brings along.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from bsbr.backends.triton import function, tiles, tuning

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


def report(
    capability: int, *, dtype: torch.dtype, head_dim: int, d_r: int | None, chunk_size: int = 128, kept: int | None = None
) -> Any:
    """{kernel: (registers a thread, spilled bytes, shared bytes)} of forward and backward."""
    found: dict[str, tuple[int, int, int]] = {}

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        compiled = kernel.run(*arguments, grid=(programs,), warmup=True, **options)
        name = kernel.fn.__name__.lstrip("_")
        found[name] = (*_resources(compiled.asm["ptx"], capability), compiled.metadata.shared)

    time = 70 * chunk_size  # more chunks than a tile of the mixing has rows
    new: dict[str, Any] = {"dtype": dtype, "requires_grad": True}
    q, k, v = torch.zeros(1, 4, time, head_dim, **new), *(torch.zeros(1, 2, time, head_dim, **new) for _ in "kv")
    r, h = torch.zeros(1, 4, 70, head_dim, **new), torch.zeros(1, 2, 69, head_dim, **new)
    features = [None, None] if d_r is None else [torch.zeros(1, heads, time, d_r, **new) for heads in (4, 2)]
    triton.runtime.driver.set_active(Driver())
    with (
        mock.patch.object(tiles, "launch", launch),
        mock.patch.object(tuning, "_is_hopper", mock.Mock(return_value=capability == 90)),
    ):
        out = function.bsbr(
            *(q, k, v, r, h), chunk_size=chunk_size, q_features=features[0], k_features=features[1],
            beta=None, gain=torch.ones(4, requires_grad=True), chunk_overlap=32, kept=kept, normalise=True,
        )  # fmt: skip
        out.backward(torch.zeros_like(out))
    return found


def _resources(ptx: str, capability: int) -> tuple[int, int]:
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    target = "sm_90a" if capability == 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"-arch={target}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))


def main() -> None:
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    print("sm  dtype     head_dim d_r  kernel          registers  spilled B  shared B")
    for dtype, head_dim, d_r, kept in (
        (torch.bfloat16, 64, None, None), (torch.bfloat16, 64, 16, 2), (torch.bfloat16, 128, None, None),
        (torch.bfloat16, 256, None, None), (torch.float32, 64, None, None), (torch.float32, 128, 32, None),
    ):  # fmt: skip
        for name, numbers in report(capability, dtype=dtype, head_dim=head_dim, d_r=d_r, kept=kept).items():
            kind, (registers, spilled, shared) = str(dtype).removeprefix("torch."), numbers
            print(
                f"{capability}  {kind:9} {head_dim:8} {d_r or head_dim:3}  {name:14} {registers:10} {spilled:10} {shared:9}",
                flush=True,
            )


if __name__ == "__main__":
    main()
