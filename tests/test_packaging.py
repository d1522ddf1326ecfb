"""What is installed, what it drags in, and who may hold a clock."""

import ast
import email
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from evals.paths import ROOT

pytestmark = pytest.mark.xdist_group("packaging")
CLOCKS = (
    *("time", "timeit", "cProfile", "psutil", "tracemalloc", "resource.getrusage"),
    *("torch.profiler", "torch.autograd.profiler", "torch.utils.benchmark", "torch.Event", "torch.cuda.Event"),
    *("torch.cuda.memory_allocated", "torch.cuda.max_memory_allocated", "torch.cuda.memory_stats"),
    *("torch.cuda.memory_reserved", "torch.cuda.max_memory_reserved"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)]
    subprocess.run(command, check=True, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_bsbr_only_and_all_of_it(wheel: Path) -> None:
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if not re.match(r"bsbr-[^/]+\.dist-info/", name)}
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bsbr").rglob("*.py")} | {
        "bsbr/py.typed",
        *(f"bsbr/backends/cpp/{name}" for name in ("bsbr.cpp", "decode.cpp", "tensors.h", "tiles.h", "vectors.h")),
        *(f"bsbr/backends/cpp/bsbr/{name}.h" for name in ("attention", "features", "retrieval", "sizes", "states")),
    }
    assert packaged == source


def test_plain_install_requires_torch_only(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    requirements = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    unconditional = [line for line in requirements if "extra ==" not in line]
    assert len(unconditional) == 1
    assert re.match(r"torch\b(?!-)", unconditional[0])


def test_importing_the_wheel_loads_no_third_party_package_that_torch_does_not(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    with_bsbr = top_level_modules_after("import bsbr; assert bsbr.__file__.startswith(sys.argv[1])", tmp_path)
    added = with_bsbr - top_level_modules_after("import torch", tmp_path)
    assert added - sys.stdlib_module_names == {"bsbr"}


def test_core_imports_torch_and_the_standard_library_only() -> None:
    # torch loads numpy where it is installed, so that looking at loaded modules would not show it.
    # Triton comes with the CUDA builds of torch, for bsbr.backends.triton.
    allowed = {*sys.stdlib_module_names, "bsbr", "torch", "triton"}
    convert = set((ROOT / "bsbr" / "convert").rglob("*.py"))  # for which there is an extra
    used = {name.partition(".")[0] for path in {*(ROOT / "bsbr").rglob("*.py")} - convert for name in names_used(path)}
    assert used - allowed == set()
    assert {name.partition(".")[0] for path in convert for name in names_used(path)} - allowed == {"transformers"}


MEASURING = (
    "evals/measure/",
    "evals/benchmark/slowed.py",  # slows an attention down on purpose
    "evals/cli/self_test.py",  # holds our clock against torch's
)


def test_clocks_and_memory_counters_are_read_where_measuring_is_done_only() -> None:
    readers = {
        f"{path.relative_to(ROOT)}: {name}"
        for package in ("bsbr", "baselines", "evals")
        for path in (ROOT / package).rglob("*.py")
        for name in names_used(path)
        if any(f"{name}.".startswith(f"{clock}.") for clock in CLOCKS)
        and not path.relative_to(ROOT).as_posix().startswith(MEASURING)
    }
    assert readers == set()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import time\ntime.perf_counter()", "time.perf_counter"),
        ("from time import perf_counter as now", "time.perf_counter"),
        ("import torch as t\nt.cuda.max_memory_allocated()", "torch.cuda.max_memory_allocated"),
        ("from torch import cuda\ncuda.Event()", "torch.cuda.Event"),
        ("def f():\n    import torch.profiler", "torch.profiler"),
    ],
)
def test_names_used_sees_through_the_ways_to_import(tmp_path: Path, source: str, name: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert name in names_used(path)


def names_used(path: Path) -> set[str]:
    """The full dotted names of all that `path` imports, and of all that it reaches through what it imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = set()
    known_as = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imported.add(alias.name)
                package = alias.name.partition(".")[0]
                known_as[alias.asname or package] = alias.name if alias.asname else package
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                imported.add(f"{node.module}.{alias.name}")
                known_as[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    reached = (ast.unparse(node).partition(".") for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return imported | {f"{known_as[first]}.{rest}" for first, _, rest in reached if first in known_as}


def top_level_modules_after(statement: str, folder: Path) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `statement`, `folder` being first on its path."""
    program = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", program, str(folder)]
    printed = subprocess.run(command, check=True, cwd=folder, env=environment, capture_output=True, text=True).stdout
    return {name.partition(".")[0] for name in json.loads(printed)}
