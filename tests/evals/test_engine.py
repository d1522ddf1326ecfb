"""When sampling ends, by synthetic histories; and that the ledger alone decides it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from evals import cli
from evals.config import read_comparison
from evals.engine import Engine
from evals.history import History, Runner
from evals.ledger import Ledger, Record


def engine(folder: Path, *options: str) -> Engine:
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        comparison = read_comparison(compose("config", ["attention=[standard,linear]", "sampling.budget_s=100", *options]))
    return Engine(comparison, Ledger(folder / "samples.jsonl"), Ledger(folder / "certificates.jsonl"))


def history(ratios: Sequence[float], *, round_s: float = 1.0, failed: Sequence[str] = ()) -> History:
    """Rounds in which linear is so many times slower than standard."""
    records: list[Record] = []
    for name in ("standard", "linear"):
        outcome = "crash" if name in failed else "ok"
        records.append({"kind": "trial", "comparison": "c", "attention": name, "outcome": outcome, "detail": "", "call_s": 0.001})
    for number, ratio in enumerate(ratios):
        for name, twin, seconds in (("standard", False, 1.0), ("standard", True, 1.0), ("linear", False, ratio)):
            shared = {"kind": "latency", "comparison": "c", "attention": name, "twin": twin, "round": number, "outcome": "ok"}
            records.append({**shared, "detail": "", "turns": [[seconds]] * 3, "round_s": round_s})
    return History(records, "c")


NOISY = np.exp(np.random.default_rng(0).normal(0, 0.1, 200)).tolist()


def test_fewer_rounds_than_the_least_are_never_enough(tmp_path: Path) -> None:
    assert engine(tmp_path)._finished(history([])) == ""
    assert engine(tmp_path)._finished(history([1.0] * 4, round_s=1000.0)) == ""


def test_an_interval_within_the_target_ends_it(tmp_path: Path) -> None:
    assert engine(tmp_path)._finished(history([2.0, 2.001, 1.999, 2.0, 2.001])) == "target"
    assert engine(tmp_path, "sampling.target_rel_interval=1e-6")._finished(history([2.0, 2.001, 1.999, 2.0, 2.001])) == ""


def test_the_budget_ends_it(tmp_path: Path) -> None:
    assert engine(tmp_path)._finished(history(NOISY[:6])) == ""
    assert engine(tmp_path)._finished(history(NOISY[:6], round_s=17.0)) == "budget"


def test_an_interval_that_shrinks_no_more_ends_it(tmp_path: Path) -> None:
    drifting = [1.0, 1.1, 1.0, 1.1, 1.0, 1.3, 1.4, 1.3, 1.4, 1.3]
    assert engine(tmp_path)._finished(history(drifting)) == "stalled"
    steady = [1.0, 1.1] * 5
    assert engine(tmp_path)._finished(history(steady)) == ""


def test_the_most_rounds_end_it(tmp_path: Path) -> None:
    assert engine(tmp_path, "sampling.max_rounds=7")._finished(history(NOISY[:7])) == "rounds"


def test_nothing_is_left_where_all_failed(tmp_path: Path) -> None:
    assert engine(tmp_path)._finished(history([], failed=("standard", "linear"))) == "failed"


def test_without_a_reference_it_is_latencies_that_must_be_known(tmp_path: Path) -> None:
    assert engine(tmp_path)._finished(history([2.0] * 5, failed=("standard",))) == "target"


@pytest.mark.parametrize(("call_s", "turns"), [(1e-4, 12), (0.05, 12), (1.0, 3), (5.0, 1)])
def test_slow_calls_get_fewer_turns_so_that_the_rounds_fit_the_budget(tmp_path: Path, call_s: float, turns: int) -> None:
    past = history([])
    for trial in past.trials.values():
        trial["call_s"] = call_s
    # 8 rounds in 100 s are 12.5 s each, for three runners that each are called once before.
    assert engine(tmp_path)._turns(past, [Runner("standard"), Runner("linear"), Runner("standard", twin=True)]) == turns


def test_changed_settings_are_another_comparison_and_a_longer_budget_is_not(tmp_path: Path) -> None:
    first = engine(tmp_path).id
    assert engine(tmp_path, "sampling.budget_s=7").id == first
    assert engine(tmp_path, "sampling.max_rounds=3").id == first
    for changed in (
        "shape.seq_len=7",
        "sampling.turn_s=0.5",
        "sampling.seed=3",
        "workload=decode",
        "attention.linear.chunk_size=32",
    ):
        assert engine(tmp_path, changed).id != first


# --- certificates ---------------------------------------------------------------------------------


def test_what_runs_nowhere_here_is_unsupported_and_not_uncertified(tmp_path: Path) -> None:
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        comparison = read_comparison(compose("config", ["attention=[standard,linear_fla]"]))
    measured = Engine(comparison, Ledger(tmp_path / "samples.jsonl"), Ledger(tmp_path / "certificates.jsonl"))
    result = measured.certified(comparison.contestants[1])
    assert result.outcome == "unsupported"
    assert "impl=fla runs Triton kernels, which need CUDA" in result.detail
    assert not measured.certificates.read()[0]  # another machine may run it
