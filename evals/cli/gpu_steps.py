"""The steps of `evals.gpu_check`: what is run on a GPU, how long it may take, and how its outcome is read."""

import re
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import yaml

from evals.cli.steps import FAILED, PASSED, UNSUPPORTED, Step, Verdict, by_exit_code
from evals.measure.machine import provenance
from evals.paths import CONF, IS_CHECKOUT, ROOT
from evals.results import schema

BUDGET_S = 585.0
"""Ten minutes, less what the start of this program takes."""

ON_CUDA = ("device=cuda", "device.dtype=bfloat16")
FACTS = (
    *("gpu", "gpu_driver", "gpu_capability", "gpu_memory_bytes", "cuda", "cudnn", "torch", "triton", "python", "platform", "cpu"),
    *("commit", "dirty"),
)
PACKAGES = ("bsbr", "fla-core")
"""Packages whose versions are printed beside those of the facts."""


def gpu_steps(folder: Path) -> list[Step]:
    """The steps, the most important first; results and figures go into `folder`."""
    bsbr = partial(_certificate, "bsbr", 120.0, "attention.bsbr.impl=triton")
    return [
        bsbr(),
        _tests(),
        _sweep(folder, "sweep", "sweep=seq_len", "shape.seq_len=512,2048"),
        _sweep(
            folder,
            "triton_torch",
            *("sweep=backends", "impls=[triton,torch]", "attention=[bsbr]", "relative_to=bsbr_torch", "shape.seq_len=2048"),
        ),
        *(_certificate(name, 30.0) for name in kernels_of_a_gpu()),
    ]


def kernels_of_a_gpu() -> list[str]:
    """The attentions of conf/attention that name a kernel which runs on a GPU only, such as impl: fla."""
    files = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONF.glob("attention/*.yaml")}
    # A file that lists several others has no attention of its own.
    return sorted(name for name, file in files.items() if name in file and file[name].get("impl", "auto") != "auto")


def machine() -> dict[str, object]:
    """The GPU, the machine and the versions, in the order in which they are printed; None for what is not there."""
    facts = provenance("cuda")
    versions: dict[str, object] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {**versions, **{name: facts.get(name) for name in FACTS}}


def _certificate(name: str, limit_s: float, *settings: str) -> Step:
    words = ("certify", *ON_CUDA, f"attention=[{name}]", *settings)
    return Step(f"certificate of {name}", _bsbr(*words), limit_s, read_certificate)


def _tests() -> Step:
    files = sorted(map(str, (path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", f"--rootdir={ROOT}", *files]
    return Step("tests on a GPU", command, 100.0, read_tests, missing="" if IS_CHECKOUT else "the tests are in a checkout only")


def _sweep(folder: Path, name: str, *settings: str) -> Step:
    output = (f"sweep_name={name}", f"results_dir={folder / 'results'}", f"plots_dir={folder / 'plots'}")
    words = ("run", *settings, "device=cuda", "sampling=quick", *output)
    return Step(" ".join(settings), _bsbr(*words), 90.0, partial(read_sweep, folder / "results" / name))


def _bsbr(*words: str) -> list[str]:
    return [sys.executable, "-m", "bsbr", *words]


# --- reading outcomes -----------------------------------------------------------------------------


def read_certificate(code: int, output: str) -> Verdict:
    """The outcome of `certify` for one attention: its line to quote, or what failed."""
    unsupported = re.search(r"the certificate ended as unsupported: (.*)", output)
    if code == 0 and unsupported:
        return Verdict(UNSUPPORTED, unsupported[1])
    failures = re.findall(r"^\w+, (.+: .+)$", output, flags=re.MULTILINE)
    return Verdict(FAILED, "; ".join(failures[:-1]) or failures[-1]) if code and failures else by_exit_code(code, output)


def read_tests(code: int, output: str) -> Verdict:
    """The outcome of pytest: its last line, which counts the tests."""
    return Verdict(UNSUPPORTED, "there are none") if code == 5 else by_exit_code(code, output)


def read_sweep(folder: Path, code: int, output: str) -> Verdict:
    """The outcome of a sweep: how many rows have a number, which have none and why, and speed-ups over the reference."""
    path = folder / "results.csv"
    if not path.exists():
        return Verdict(FAILED, by_exit_code(code, output).detail)
    table = schema.read(path)
    ok = table[table["outcome"] == "ok"]
    good = [f"{len(ok)} of {len(table)} rows have a number"]
    others = ok[(ok["attention"] != ok["relative_to"]) & ok["speedup"].notna()]
    speeds = [f"{row['attention']} {row['speedup']:.2f}x at {row['seq_len']}" for _, row in others.iterrows()]
    bad = [
        f"{row['attention']} at {row['seq_len']}: {row['outcome']}, {row['detail']}" for _, row in table.drop(ok.index).iterrows()
    ]
    kinds = {*table["outcome"]} - {"ok"}
    outcome = PASSED if not kinds else UNSUPPORTED if kinds == {"unsupported"} else FAILED
    return Verdict(outcome, "; ".join([*good, *bad, *speeds]))
