"""The id of a comparison, repeated measurements of the machine's peaks, and results of the preflight."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from evals.benchmark.certificates import Certificates
from evals.benchmark.engine import PEAKS_COUNT, Engine
from evals.benchmark.preflight import implementation
from evals.cli.jobs import read_job
from evals.measure.clock import now
from evals.paths import CONF
from evals.results.ledger import Ledger


def engine(folder: Path, *options: str) -> Engine:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        comparison = read_job(compose("config", ["attention=[standard,linear]", "sampling.budget_s=100", *options]))
    return Engine(comparison, Ledger(folder / "samples.jsonl"), Certificates(folder / "certificates.jsonl"))


def test_the_id_depends_on_settings_and_not_on_the_budget(tmp_path: Path) -> None:
    first = engine(tmp_path).id
    assert engine(tmp_path, "sampling.budget_s=7").id == first
    assert engine(tmp_path, "sampling.max_rounds=3").id == first
    for changed in (
        "shape.seq_len=7",
        "sampling.time_slice_s=0.5",
        "sampling.seed=3",
        "workload=decode",
        "attention.linear.chunk_size=32",
    ):
        assert engine(tmp_path, changed).id != first


def engine_after(folder: Path, *, count: int, time: str, **settings: Any) -> Engine:
    """An engine whose ledger holds the peaks of `count` earlier comparisons."""
    current = engine(folder)
    record = {"kind": "comparison", "comparison": "earlier", "swept": None, "peaks": {"flops_per_s": 1.0}, "time": time}
    current.ledger.append(*[record | {"settings": current.settings | settings}] * count)
    return current


def test_recent_peaks_of_this_machine_are_not_measured_again(tmp_path: Path) -> None:
    assert engine_after(tmp_path, count=PEAKS_COUNT, time=now())._measured_peaks() is None


@pytest.mark.parametrize(
    ("count", "time", "settings"),
    [(PEAKS_COUNT - 1, None, {}), (PEAKS_COUNT, "2020-01-01T00:00:00+00:00", {}), (PEAKS_COUNT, None, {"threads": 77})],
)
def test_few_or_old_peaks_or_those_of_other_settings_are_measured_again(
    tmp_path: Path, count: int, time: str | None, settings: dict[str, Any]
) -> None:
    peaks = engine_after(tmp_path, count=count, time=time or now(), **settings)._measured_peaks()
    assert peaks is not None
    assert peaks["flops_per_s"] > 1e6


# --- certificates ---------------------------------------------------------------------------------


def test_an_attention_that_cannot_run_on_this_machine_is_unsupported_and_not_uncertified(tmp_path: Path) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        comparison = read_job(compose("config", ["attention=[standard,linear_fla]"]))
    measured = Engine(comparison, Ledger(tmp_path / "samples.jsonl"), Certificates(tmp_path / "certificates.jsonl"))
    result = measured.preflight.certify(comparison.candidates[1])
    assert result.outcome == "unsupported"
    assert "impl=fla runs Triton kernels, which need CUDA" in result.detail
    assert not (tmp_path / "certificates.jsonl").exists()  # another machine may run it


def test_a_certificate_that_did_not_end_is_tried_again_by_the_next_command(tmp_path: Path) -> None:
    measured = engine(tmp_path, "sampling.max_rounds=1", "sampling.min_rounds=1")
    failure = {"outcome": "uncertified", "detail": "the certificate ended as crash", "unfinished": True}
    shared = {"outcome": "ok", "detail": "", "is_control": False, "round": 0, "time_slices": [[1.0]], "round_s": 1.0}
    measured.ledger.append(
        measured.description(),
        measured.record("preflight", attention="standard", outcome="ok", detail=""),
        measured.record("preflight", attention="linear", **failure),
        measured.record("latency", attention="standard", **shared),
        measured.record("stop", stop_reason="rounds"),
    )
    again = engine(tmp_path, "sampling.max_rounds=1", "sampling.min_rounds=1")
    assert not again.is_complete()
    linear = again.comparison.candidates[1]
    again.preflight.certificates.add(again.preflight._key(linear), "linear", "the certificate ended as oom", finished=False)
    assert again.is_complete()  # within one command nothing is tried twice


@pytest.mark.parametrize(
    ("options", "impl"), [([], "cpp"), (["device.dtype=bfloat16"], "torch"), (["attention.bsbr.impl=torch"], "torch")]
)
def test_the_implementation_depends_on_precision_and_options(options: list[str], impl: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        comparison = read_job(compose("config", ["attention=[bsbr]", *options]))
    assert implementation(comparison, comparison.candidates[0]) == impl
