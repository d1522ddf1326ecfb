"""Tests of the tile library through the kernel that the documentation writes with it."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs/user-guide/kernels.md"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module of the page, beside its C++ source."""
    folder = tmp_path_factory.mktemp("kernel")
    for language, name in (("cpp", "plain_linear.cpp"), ("python", "plain_linear.py")):
        (block,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
        (folder / name).write_text(block)
    spec = importlib.util.spec_from_file_location("plain_linear", folder / "plain_linear.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("time", "chunk", "dim"), [(1, 4, 1), (37, 16, 20), (48, 48, 32), (100, 33, 65)])
def test_the_documented_kernel_equals_a_loop_over_tokens(
    kernel: ModuleType, time: int, chunk: int, dim: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(time)
    q, k, v = (torch.randn(2, time, 3, dim, generator=generator, dtype=dtype).transpose(1, 2) for _ in range(3))
    state = torch.zeros(2, 3, dim, dim, dtype=torch.float64)
    expected = []
    for t in range(time):
        state = state + k[:, :, t, :, None].double() * v[:, :, t, None].double()
        expected.append(torch.einsum("bhd,bhde->bhe", q[:, :, t].double(), state))
    out = kernel.plain_linear(q, k, v, chunk).double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    largest = max(1.0, torch.stack(expected).abs().max().item())
    torch.testing.assert_close(out, torch.stack(expected, dim=2), rtol=0, atol=tolerance * largest)


def test_the_documented_kernel_refuses_other_shapes(kernel: ModuleType) -> None:
    with pytest.raises(ValueError, match="must be"):
        kernel.plain_linear(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 2, 4))
