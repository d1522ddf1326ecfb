"""When sampling ends, by synthetic histories: the ledger alone decides it."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from evals.benchmark.rounds import stop_reason, within_budget
from evals.benchmark.timing import FirstCall, summarize_calls
from evals.cli.jobs import read_job
from evals.measure.clock import Stopwatch, TimeSlice
from evals.paths import CONF
from evals.results.history import History
from evals.results.ledger import Record


def rule(past: History, *options: str) -> str:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        comparison = read_job(compose("config", ["attention=[standard,linear]", "sampling.budget_s=100", *options]))
    return stop_reason(comparison, past)


def history(ratios: Sequence[float], *, round_s: float = 1.0, failed: Sequence[str] = ()) -> History:
    """Rounds in which linear is so many times slower than standard."""
    records: list[Record] = []
    for name in ("standard", "linear"):
        outcome = "crash" if name in failed else "ok"
        records.append({"kind": "preflight", "comparison": "c", "attention": name, "outcome": outcome, "detail": ""})
    for number, ratio in enumerate(ratios):
        for name, twin, seconds in (("standard", False, 1.0), ("standard", True, 1.0), ("linear", False, ratio)):
            shared = {"kind": "latency", "comparison": "c", "attention": name, "is_control": twin, "round": number, "outcome": "ok"}
            records.append({**shared, "detail": "", "time_slices": [[seconds]] * 3, "round_s": round_s})
    return History(records, "c")


NOISY = np.exp(np.random.default_rng(0).normal(0, 0.1, 200)).tolist()


def test_fewer_rounds_than_the_least_are_never_enough() -> None:
    assert rule(history([])) == ""
    assert rule(history([1.0] * 4, round_s=1000.0)) == ""


def test_an_interval_within_the_target_ends_it() -> None:
    assert rule(history([2.0, 2.001, 1.999, 2.0, 2.001])) == "target"
    assert rule(history([2.0, 2.001, 1.999, 2.0, 2.001]), "sampling.target_rel_interval=1e-6") == ""


def test_the_budget_ends_it() -> None:
    assert rule(history(NOISY[:6])) == ""
    assert rule(history(NOISY[:6], round_s=17.0)) == "budget"


def test_an_interval_that_shrinks_no_more_ends_it() -> None:
    drifting = [1.0, 1.1, 1.0, 1.1, 1.0, 1.3, 1.4, 1.3, 1.4, 1.3]
    assert rule(history(drifting)) == "stalled"
    steady = [1.0, 1.1] * 5
    assert rule(history(steady)) == ""


def test_the_most_rounds_end_it() -> None:
    assert rule(history(NOISY[:7]), "sampling.max_rounds=7") == "rounds"


def test_nothing_is_left_where_all_failed() -> None:
    assert rule(history([], failed=("standard", "linear"))) == "failed"


def test_without_a_reference_it_is_latencies_that_must_be_known() -> None:
    assert rule(history([2.0] * 5, failed=("standard",))) == "target"


@pytest.mark.parametrize(
    ("most", "seconds", "turns"), [(5, math.inf, 5), (5, 0.0, 1), (5, -1.0, 1), (1, math.inf, 1), (0, math.inf, 0)]
)
def test_there_are_as_many_turns_as_fit_but_one_in_any_case(most: int, seconds: float, turns: int) -> None:
    assert list(within_budget(most, seconds, Stopwatch())) == list(range(turns))


def test_turns_of_another_command_take_no_time_from_a_round() -> None:
    watch, made = Stopwatch(), 0
    for _ in within_budget(50, 1e5, watch):
        made += 1
        watch.exclude(-1e4)  # as if this turn had taken so long
    assert made == 9  # the tenth would end at 1e5 and a moment
    watch, made = Stopwatch(), 0
    for _ in within_budget(50, 1e5, watch):
        made += 1
        watch.exclude(-1e4)
        watch.exclude(1e4)
    assert made == 50


def test_called_s_is_the_time_of_all_calls_and_not_of_samples_alone() -> None:
    first = FirstCall(tokens=8, steps=2, seconds=10.0)
    record = summarize_calls(first, [TimeSlice([1.0, 2.0], called_s=4.0), TimeSlice([3.0], called_s=3.0)])
    assert record == {"tokens": 8, "steps": 2, "first_call_s": 5.0, "called_s": 17.0, "time_slices": [[1.0, 2.0], [3.0]]}
