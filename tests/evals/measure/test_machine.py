"""Provenance: known facts are right, unknown facts are None."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from evals.measure import machine
from evals.measure.machine import environment, processor_name, provenance, ranges


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_provenance_is_flat_and_survives_json() -> None:
    facts = provenance("cpu")
    assert json.loads(json.dumps(facts)) == facts
    assert all(value is None or isinstance(value, str | int | float | bool) for value in facts.values())


def test_facts_of_any_machine_are_known() -> None:
    facts = provenance("cpu")
    assert facts["torch"] == torch.__version__
    assert facts["cores"] == os.cpu_count()
    assert facts["cpu"] == processor_name("cpu")
    assert isinstance(facts["memory_bytes"], int)
    assert facts["memory_bytes"] > 2**28
    assert isinstance(facts["load_1m"], float)


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="needs two cores, and a way to choose"
)
def test_the_affinity_of_a_process_is_recorded() -> None:
    allowed = os.sched_getaffinity(0)
    one = min(allowed)
    try:
        os.sched_setaffinity(0, {one})
        facts = provenance("cpu")
    finally:
        os.sched_setaffinity(0, allowed)
    assert facts["affinity"] == str(one)
    assert facts["threads_available"] == 1
    assert facts["cores"] == os.cpu_count()


def test_a_cpu_measurement_names_no_gpu() -> None:
    assert {value for key, value in provenance("cpu").items() if key.startswith(("gpu", "cuda", "cudnn"))} == {None}


@pytest.mark.gpu
def test_a_gpu_is_named() -> None:
    facts = provenance("cuda")
    assert facts["gpu"] == torch.cuda.get_device_name()
    assert facts.keys() == provenance("cpu").keys()


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2,5"), ([0, 2, 4], "0,2,4"), ([1, 2, 8, 9, 10], "1-2,8-10")]
)
def test_ranges_use_the_kernels_notation(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_only_variables_that_change_speed_are_recorded() -> None:
    variables = {"OMP_NUM_THREADS": "2", "PATH": "/bin", "HF_TOKEN": "secret", "KMP_BLOCKTIME": "0", "MY_OMP_THING": "1"}
    assert environment(variables.items()) == "KMP_BLOCKTIME=0 OMP_NUM_THREADS=2"
    assert environment([]) == ""


def test_the_commit_is_that_of_git_and_dirty_only_if_a_tracked_file_differs(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ROOT", repository)
    head = git(repository, "rev-parse", "HEAD")
    (repository / "untracked").write_text("note")
    assert {key: provenance()[key] for key in ("commit", "dirty")} == {"commit": head, "dirty": False}
    (repository / "file").write_text("two")
    assert {key: provenance()[key] for key in ("commit", "dirty")} == {"commit": head, "dirty": True}


def test_a_repository_without_a_commit_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert provenance()["commit"] is None


def test_the_commit_of_an_enclosing_repository_is_ignored(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked = repository / "unpacked"
    unpacked.mkdir()
    monkeypatch.setattr(machine, "ROOT", unpacked)
    facts = provenance()
    assert facts["commit"] is None
    assert facts["dirty"] is None


def test_without_git_commit_and_dirty_are_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = provenance()
    assert facts["commit"] is None
    assert facts["dirty"] is None


def test_the_governor_lists_those_of_all_cores_or_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "SYSTEM", tmp_path)
    assert provenance()["governor"] is None
    assert provenance()["boost"] is None
    for core, governor in enumerate(["performance", "performance", "powersave"]):
        folder = tmp_path / f"cpu{core}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(f"{governor}\n")
    assert provenance()["governor"] == "performance,powersave"
    (tmp_path / "intel_pstate").mkdir()
    (tmp_path / "intel_pstate/no_turbo").write_text("1\n")
    assert provenance()["boost"] is False
