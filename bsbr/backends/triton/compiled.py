"""Compiles every kernel for a GPU that need not be present and reports what ptxas says: registers, spilled bytes, shared memory.

    python -m bsbr.backends.triton.compiled [80 | 90]

Forward and backward run as on a GPU, but each launch only compiles its kernel. triton ships ptxas.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from bsbr.backends.triton import function, tiles, tuning
from bsbr.inputs import BSBRInputs, BSBROptions

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program can have, by compute capability."""


class Resources(NamedTuple):
    """What ptxas reports of a kernel: registers of a thread, spilled bytes of a thread, and shared bytes of a program."""

    registers: int
    spilled: int
    shared: int


def report(
    capability: int, *, dtype: torch.dtype, head_dim: int, d_r: int | None, chunk_size: int = 128, top_k: int | None = None
) -> dict[str, Resources]:
    """Resources of each kernel of forward and backward, by the kernel's name."""
    resources: dict[str, Resources] = {}

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
        registers, spilled = _registers_and_spills(compiled.asm["ptx"], capability)
        resources[name] = Resources(registers, spilled, compiled.metadata.shared)

    time = 70 * chunk_size  # more chunks than a tile of the mixing has rows
    new: dict[str, Any] = {"dtype": dtype, "requires_grad": True}
    q, k, v = torch.zeros(1, 4, time, head_dim, **new), *(torch.zeros(1, 2, time, head_dim, **new) for _ in "kv")
    meta = torch.zeros(1, 4, 70, head_dim, **new), torch.zeros(1, 2, 69, head_dim, **new)
    features = [None, None] if d_r is None else [torch.zeros(1, heads, time, d_r, **new) for heads in (4, 2)]
    inputs = BSBRInputs(q, k, v, *meta, *features)._replace(gain=torch.ones(4, requires_grad=True))
    triton.runtime.driver.set_active(Driver())
    with (
        mock.patch.object(tiles, "launch", launch),
        mock.patch.object(tuning, "_is_hopper", mock.Mock(return_value=capability == 90)),
    ):
        out = function.attend(inputs, BSBROptions(chunk_size, chunk_overlap=32, top_k=top_k, normalise=True))
        out.backward(torch.zeros_like(out))
    return resources


def _registers_and_spills(ptx: str, capability: int) -> tuple[int, int]:
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    target = "sm_90a" if capability == 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"-arch={target}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", output))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", output))


def main() -> None:
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    print("sm  dtype     head_dim d_r  kernel          registers  spilled B  shared B")
    for dtype, head_dim, d_r, top_k in (
        (torch.bfloat16, 64, None, None), (torch.bfloat16, 64, 16, 2), (torch.bfloat16, 128, None, None),
        (torch.bfloat16, 256, None, None), (torch.float32, 64, None, None), (torch.float32, 128, 32, None),
    ):  # fmt: skip
        for name, (registers, spilled, shared) in report(capability, dtype=dtype, head_dim=head_dim, d_r=d_r, top_k=top_k).items():
            kind = str(dtype).removeprefix("torch.")
            print(
                f"{capability}  {kind:9} {head_dim:8} {d_r or head_dim:3}  {name:14} {registers:10} {spilled:10} {shared:9}",
                flush=True,
            )


if __name__ == "__main__":
    main()
