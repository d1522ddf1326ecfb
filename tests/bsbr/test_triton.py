"""Tests of the Triton kernels. Most run in a new process, because triton decides at import whether to interpret kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bsbr.backends import triton
from bsbr.inputs import BSBRInputs, BSBROptions
from evals.paths import ROOT

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run_kernel_tests(interpret: str) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-x", str(HERE / "triton_kernel_cases.py")]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_interpreted_kernels_match_the_reference() -> None:
    run_kernel_tests("1")


@pytest.mark.gpu
def test_kernels_match_the_reference_on_a_gpu() -> None:
    run_kernel_tests("0")


def test_kernels_compile_for_hopper_without_spilling() -> None:
    program = (
        "import torch; from bsbr.backends.triton.compiled import report, SHARED_LIMIT\n"
        "for name, (_, spilled, shared) in report(90, dtype=torch.bfloat16, head_dim=64, d_r=None).items():\n"
        "    assert spilled == 0, (name, spilled)\n"
        "    assert shared <= SHARED_LIMIT[90], (name, shared)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"})


def test_importing_the_kernels_does_not_import_triton() -> None:
    program = (
        "import sys, torch; before = 'triton' in sys.modules; "
        "import bsbr.backends.triton; assert before or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_unsupported_inputs_raise_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q = torch.zeros(1, 1, 4, 8)
    inputs, options = BSBRInputs(q, q, q, q[:, :, :1], q[:, :, :0]), BSBROptions(chunk_size=4)
    with_dropout = BSBROptions(chunk_size=4, dropout_p=0.5)
    assert "run on a CUDA GPU, got cpu" in str(triton.unsupported(inputs, options))
    assert "no dropout, got dropout_p = 0.5" in str(triton.unsupported(inputs, with_dropout))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.unsupported(inputs, options) is None
    assert "torch.float64" in str(triton.unsupported(BSBRInputs(*(x.double() for x in inputs.tensors())), options))
    wide = BSBRInputs(*(x.new_zeros(*x.shape[:3], 257) for x in inputs.tensors()))
    assert "at most 256, got 257" in str(triton.unsupported(wide, options))
    assert "together or not at all" in str(triton.unsupported(inputs._replace(q_features=q), options))
    with pytest.raises(NotImplementedError, match="no dropout"):
        triton.attend(inputs, with_dropout)
