"""The steps of a check on a GPU: their runner, how their outcomes are read, and that their commands are right."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch

from evals import certify, gpu_check, run
from evals.certification.certificate import Finding, badge
from evals.cli.gpu_steps import gpu_steps, kernels_of_a_gpu, read_certificate, read_sweep, read_tests
from evals.cli.help_text import run_help
from evals.cli.steps import FAILED, PASSED, UNSUPPORTED, Step, Verdict, markdown, run_steps
from evals.errors import USAGE
from evals.measure import gpu_status
from evals.paths import ROOT
from tests.evals.commands import call
from tests.evals.sweeps import table


def step(name: str, program: str, limit_s: float = 60.0) -> Step:
    return Step(name, [sys.executable, "-S", "-c", program], limit_s)


def test_each_step_runs_whatever_became_of_the_one_before() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'import signal; signal.pause()'])"
    steps = [
        step("fails", "print('as it should'); raise SystemExit(3)"),
        step("hangs", child, limit_s=0.2),
        Step("unsupported", ["no such program"], 60.0, missing="needs | two"),
        step("passes", "print('12 passed')"),
    ]
    outcomes = list(run_steps(steps, budget_s=100.0))
    assert [(one.step, *one.verdict) for one in outcomes] == [
        ("fails", FAILED, "as it should"),
        ("hangs", FAILED, "took longer than 0.2 s"),
        ("unsupported", UNSUPPORTED, "needs | two"),
        ("passes", PASSED, "12 passed"),
    ]
    lines = markdown("Check", outcomes, {"gpu": "H200", "cudnn": None}).splitlines()
    assert lines[0] == "### Check: 1 passed, 2 failed, 1 unsupported"
    assert [line.count(" | ") for line in lines if line.startswith("|")] == [3] * 6 + [1] * 3
    assert "| unsupported | unsupported | 0 | needs \\| two |" in lines
    assert lines[-1] == "| gpu | H200 |"


def test_no_step_starts_when_the_time_for_all_is_over() -> None:
    outcomes = list(run_steps([step("hangs", "import signal; signal.pause()"), step("next", "")], 0.2))
    assert [one.verdict for one in outcomes] == [
        Verdict(FAILED, "took longer than 0.2 s"),
        Verdict(FAILED, "was not started: the 0.2 s of the whole check were over"),
    ]


FINDINGS = [Finding("parity", "off by 3"), Finding("causality", "sees the future"), Finding("finite", "")]


@pytest.mark.parametrize(
    ("code", "lines", "verdict"),
    [
        (0, ["x, certified: 14 checks, 54 configurations"], Verdict(PASSED, "x, certified: 14 checks, 54 configurations")),
        (
            1,
            [*(f"x, {one}" for one in FINDINGS[:2]), "", f"x, {badge(FINDINGS)}"],
            Verdict(FAILED, "parity: off by 3; causality: sees the future"),
        ),
        (1, ["x, the certificate ended as crash: killed"], Verdict(FAILED, "the certificate ended as crash: killed")),
        (0, ["x, the certificate ended as unsupported: needs fla", ""], Verdict(UNSUPPORTED, "needs fla")),
        (2, ["error: no CUDA device"], Verdict(FAILED, "error: no CUDA device")),
    ],
)
def test_a_certificate_is_read_as_it_is_printed(code: int, lines: Sequence[str], verdict: Verdict) -> None:
    assert read_certificate(code, "\n".join(lines)) == verdict


def test_a_run_of_tests_and_a_sweep_are_read(tmp_path: Path) -> None:
    assert read_tests(5, "no tests ran") == Verdict(UNSUPPORTED, "there are none")
    assert read_tests(1, "1 failed, 2 passed\n") == Verdict(FAILED, "1 failed, 2 passed")
    assert read_sweep(tmp_path, 2, "error: no") == Verdict(FAILED, "error: no")
    rows = table(("a", "b"), (512,)).assign(speedup=[1.0, 2.5], detail="")

    def read(outcomes: list[str]) -> Verdict:
        pd.DataFrame(rows.assign(outcome=outcomes, detail=["", "why"])).to_csv(tmp_path / "results.csv", index=False)
        return read_sweep(tmp_path, 0, "")

    assert read(["ok", "ok"]) == Verdict(PASSED, "2 of 2 rows have a number; b 2.50x at 512")
    assert read(["ok", "unsupported"]) == Verdict(UNSUPPORTED, "1 of 2 rows have a number; b at 512: unsupported, why")
    assert read(["ok", "crash"]) == Verdict(FAILED, "1 of 2 rows have a number; b at 512: crash, why")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without a GPU says")
def test_without_a_gpu_every_command_of_the_check_lacks_the_gpu_alone(tmp_path: Path) -> None:
    done = call(gpu_check.main)
    assert done.returncode == USAGE
    assert done.stderr.startswith("error: this check needs a CUDA device")
    assert done.stdout == ""
    mains = {"run": run.main, "certify": certify.main}
    commands = [step.command[3:] for step in gpu_steps(tmp_path) if step.command[2] == "bsbr"]
    assert len(commands) == 3 + len(kernels_of_a_gpu())
    for name, *words in (*commands[:3], commands[-1]):
        done = call(mains[name], *words)
        assert (done.returncode, "torch sees no CUDA device" in done.stderr) == (USAGE, True), done.stderr


def test_the_check_runs_every_test_that_needs_a_gpu(tmp_path: Path) -> None:
    (tests,) = (step for step in gpu_steps(tmp_path) if step.command[2] == "pytest")
    needing = {str(path) for path in (ROOT / "tests").rglob("*.py") if "@pytest.mark.gpu" in path.read_text()} - {__file__}
    assert needing
    assert needing <= {*tests.command}


def test_a_gpu_is_called_experimental_as_the_one_place_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [(ROOT / name).read_text(encoding="utf-8").lower() for name in ("README.md", "docs/user-guide/gpu.md")]
    for status in (gpu_status.EXPERIMENTAL, not gpu_status.EXPERIMENTAL):
        monkeypatch.setattr(gpu_status, "EXPERIMENTAL", status)
        assert ("cuda (experimental)" in run_help("`x`: y.")) == status
        assert (gpu_status.marked("triton", "cuda"), gpu_status.marked("cpp", "cpu")) == (
            "triton (experimental)" if status else "triton",
            "cpp",
        )
    monkeypatch.undo()
    assert {"experimental" in page for page in pages} == {gpu_status.EXPERIMENTAL}
