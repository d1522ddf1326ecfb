"""The rules that end sampling, on synthetic histories, and the number of time slices in a round."""

import math
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from torch import Tensor

from baselines.standard import StandardAttention
from evals.benchmark.rounds import compared, stop_reason, within_budget
from evals.benchmark.timing import CallFirst, FirstCall, TimedProcess, summarize_calls
from evals.cli.jobs import read_job
from evals.measure.clock import Stopwatch, TimeSlice
from evals.paths import CONF
from evals.results.history import History, Process
from evals.results.ledger import Record


def reason(past: History, *options: str) -> str:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        comparison = read_job(compose("config", ["attention=[standard,linear]", "sampling.budget_s=100", *options]))
    return stop_reason(comparison, past)


def history(ratios: Sequence[float], *, round_s: float = 1.0, failed: Sequence[str] = ()) -> History:
    """One round per ratio, in which linear takes so many times as long as standard."""
    records: list[Record] = []
    for name in ("standard", "linear"):
        outcome = "crash" if name in failed else "ok"
        records.append({"kind": "preflight", "comparison": "c", "attention": name, "outcome": outcome, "detail": ""})
    for number, ratio in enumerate(ratios):
        for name, is_control, seconds in (("standard", False, 1.0), ("standard", True, 1.0), ("linear", False, ratio)):
            shared = {"kind": "latency", "comparison": "c", "attention": name, "is_control": is_control, "round": number}
            records.append({**shared, "outcome": "ok", "detail": "", "time_slices": [[seconds]] * 3, "round_s": round_s})
    return History(records, "c")


NOISY = np.exp(np.random.default_rng(0).normal(0, 0.1, 200)).tolist()


def test_there_are_at_least_min_rounds() -> None:
    assert reason(history([])) == ""
    assert reason(history([1.0] * 4, round_s=1000.0)) == ""


def test_an_interval_within_the_target_ends_sampling() -> None:
    assert reason(history([2.0, 2.001, 1.999, 2.0, 2.001])) == "target"
    assert reason(history([2.0, 2.001, 1.999, 2.0, 2.001]), "sampling.target_rel_interval=1e-6") == ""


def test_a_spent_budget_ends_sampling() -> None:
    assert reason(history(NOISY[:6])) == ""
    assert reason(history(NOISY[:6], round_s=17.0)) == "budget"


def test_an_interval_that_no_longer_shrinks_ends_sampling() -> None:
    drifting = [1.0, 1.1, 1.0, 1.1, 1.0, 1.3, 1.4, 1.3, 1.4, 1.3]
    assert reason(history(drifting)) == "stalled"
    steady = [1.0, 1.1] * 5
    assert reason(history(steady)) == ""


def test_max_rounds_end_sampling() -> None:
    assert reason(history(NOISY[:7]), "sampling.max_rounds=7") == "rounds"


def test_sampling_ends_when_all_candidates_have_failed() -> None:
    assert reason(history([], failed=("standard", "linear"))) == "failed"


def test_without_a_reference_the_target_holds_for_latencies() -> None:
    assert reason(history([2.0] * 5, failed=("standard",))) == "target"


@pytest.mark.parametrize(
    ("most", "seconds", "iterations"), [(5, math.inf, 5), (5, 0.0, 1), (5, -1.0, 1), (1, math.inf, 1), (0, math.inf, 0)]
)
def test_there_are_as_many_iterations_as_fit_and_at_least_one(most: int, seconds: float, iterations: int) -> None:
    assert list(within_budget(most, seconds, Stopwatch())) == list(range(iterations))


def test_time_slices_of_another_command_take_no_time_from_a_round() -> None:
    stopwatch, iterations = Stopwatch(), 0
    for _ in within_budget(50, 1e5, stopwatch):
        iterations += 1
        stopwatch.exclude(-1e4)  # as if this iteration had taken so long
    assert iterations == 9  # the tenth would end a moment after 1e5
    stopwatch, iterations = Stopwatch(), 0
    for _ in within_budget(50, 1e5, stopwatch):
        iterations += 1
        stopwatch.exclude(-1e4)
        stopwatch.exclude(1e4)
    assert iterations == 50


@pytest.mark.parametrize(("options", "rounds"), [((), 5), (("sampling.max_rounds=2",), 2), (("sampling.min_rounds=1",), 1)])
def test_a_call_of_each_process_is_compared_again_and_again(options: Sequence[str], rounds: int) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        comparison = read_job(compose("config", ["attention=[standard,linear,sparse]", *options]))
    everyone = [Process("standard"), Process("linear"), Process("sparse"), Process("standard", is_control=True)]
    for first in (0, 3, 100):
        chosen = [process for number in range(first, first + rounds) for process in compared(comparison, everyone, number)]
        assert sorted(chosen) == sorted(everyone)
    assert compared(comparison, everyone[1:2], 1) == everyone[1:2]  # the turn of linear, whoever has failed


def test_called_s_is_the_time_of_all_calls_and_not_of_samples_alone() -> None:
    first = FirstCall(tokens=8, steps=2, seconds=10.0)
    record = summarize_calls(first, [TimeSlice([1.0, 2.0], called_s=4.0), TimeSlice([3.0], called_s=3.0)])
    assert record == {"tokens": 8, "steps": 2, "first_call_s": 5.0, "called_s": 17.0, "time_slices": [[1.0, 2.0], [3.0]]}


class Hanging(StandardAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        threading.Event().wait()
        return hidden_states


def test_a_process_that_takes_too_long_does_not_run_on_beside_the_others() -> None:
    node = f"+attention.hanging={{_target_: {__name__}.Hanging}}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        comparison = read_job(compose("config", ["attention=[standard]", node, "shape.seq_len=8", "device.threads=1"]))
    timed = TimedProcess(comparison, comparison.candidates[1], 2**30)
    with timed.worker:
        timed.wait_until_built()
        assert timed.ok
        timed._timeout_s = 0.2
        timed.ask(CallFirst())
        assert timed.record() == {"outcome": "timeout", "detail": "took longer than 0.2 s"}
        timed.worker._process.join(60)
        assert not timed.worker._process.is_alive()
        timed.ask(CallFirst())  # it has failed for good
    assert timed.record()["outcome"] == "timeout"
