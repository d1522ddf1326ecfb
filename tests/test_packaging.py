"""What is installed, what it drags in, that it works outside a checkout, and who may hold a clock."""

import ast
import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from contextlib import chdir
from pathlib import Path

import hatchling.build
import pandas as pd
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
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("source")
    with chdir(ROOT), tarfile.open(folder / hatchling.build.build_sdist(str(folder))) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the source distribution makes."""
    folder = tmp_path_factory.mktemp("wheel")
    with chdir(source):
        return folder / hatchling.build.build_wheel(str(folder))


def test_wheel_holds_three_packages_and_conf_and_schemas_as_data_of_evals(wheel: Path) -> None:
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if not re.match(r"bsbr-[^/]+\.dist-info/", name)}
    folders = {"bsbr": "bsbr", "baselines": "baselines", "evals": "evals", "conf": "evals/conf", "schemas": "evals/schemas"}
    expected = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in folders.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert packaged == expected
    suffixes = {Path(name).suffix for name in packaged}
    assert {".py", ".cpp", ".h", ".yaml", ".json", ".html", ".css", ".js", ".bash", ".typed"} <= suffixes


def test_source_distribution_holds_what_a_wheel_is_made_of_and_no_results(source: Path) -> None:
    files = {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", ".gitignore"}
    assert {path.name for path in source.iterdir()} == {"bsbr", "baselines", "evals", "conf", "schemas", *files}


def test_editable_install_is_a_path_to_the_checkout(tmp_path: Path) -> None:
    with chdir(ROOT):
        archive = zipfile.ZipFile(tmp_path / hatchling.build.build_editable(str(tmp_path)))
    (path,) = (name for name in archive.namelist() if ".dist-info/" not in name)
    assert archive.read(path).decode().strip() == str(ROOT)


def test_plain_install_requires_torch_only(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    requirements = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    unconditional = [line for line in requirements if "extra ==" not in line]
    assert len(unconditional) == 1
    assert re.match(r"torch\b(?!-)", unconditional[0])


def test_importing_the_wheel_loads_no_third_party_package_that_torch_does_not(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = """
import sys, torch
before = {*sys.modules}
from bsbr import *
print(BSBRModel.__module__, sys.modules["bsbr"].__file__)
print(*sorted({name.partition(".")[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert printed.splitlines() == [f"bsbr.model {tmp_path}/bsbr/__init__.py", "bsbr"]


def test_core_imports_torch_and_the_standard_library_only() -> None:
    # torch loads numpy where it is installed, so that looking at loaded modules would not show it.
    # Triton comes with the CUDA builds of torch, for bsbr.backends.triton.
    allowed = {*sys.stdlib_module_names, "bsbr", "torch", "triton"}
    convert = set((ROOT / "bsbr" / "convert").rglob("*.py"))  # for which there is an extra
    used = {name.partition(".")[0] for path in {*(ROOT / "bsbr").rglob("*.py")} - convert for name in names_used(path)}
    assert used - allowed == set()
    assert {name.partition(".")[0] for path in convert for name in names_used(path)} - allowed == {"transformers"}


# --- outside a checkout ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a shell in a fresh environment, into which the wheel is installed; its other packages are the tests'."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", *options, wheel], check=True)
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib"))
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**others, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}


def test_a_user_without_a_checkout_certifies_measures_and_draws_an_attention(environment: dict[str, str], tmp_path: Path) -> None:
    """Runs the commands of the documentation in an empty folder that has only the README's own attention."""
    blocks = re.findall(r"^```(.*?)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    (code,) = (text for kind, text in blocks if kind == "python" and "class CosineAttention" in text)
    (settings,) = (text for kind, text in blocks if kind == "yaml" and text.startswith("cosine:"))
    (tmp_path / "mine/conf/attention").mkdir(parents=True)
    (tmp_path / "mine/cosine.py").write_text(code)
    (tmp_path / "mine/conf/attention/cosine.yaml").write_text(settings)
    page = (ROOT / "docs/getting-started/installation.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r'^```sh title="in any folder"\n(.*?)^```$', page, flags=re.MULTILINE | re.DOTALL)
    # No certificate of another attention, small sizes, and figures from their own command only.
    small = "model.hidden_dim=32 model.num_heads=2 sampling.budget_s=0.1 sampling.min_rounds=2 figures=false"
    commands = commands.replace("[standard,cosine]", "[cosine]").replace("sampling=quick", f"sampling=quick {small}")
    done = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    rows = pd.read_csv(tmp_path / "results/seq_len/results.csv")
    assert rows[["attention", "seq_len", "outcome"]].to_numpy().tolist() == [["cosine", 128, "ok"], ["cosine", 512, "ok"]]
    assert "cosine" in (tmp_path / "results/certificates.jsonl").read_text()
    assert 'id="cosine"' in (tmp_path / "plots/seq_len/latency.svg").read_text()
    assert "cosine" in (tmp_path / "results/seq_len/report.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "results", "plots"}


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
