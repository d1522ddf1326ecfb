"""The rounds of a comparison: fresh processes that take turns, and the rules by which there is another round."""

import math
import random
import statistics
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from evals.benchmark.workloads import prepare
from evals.config import Candidate, Comparison
from evals.isolation.locks import yield_lock
from evals.isolation.worker import Result, Worker
from evals.measure.clock import Stopwatch, TimeSlice, make_clock, settle_allocator
from evals.results.history import History, Process
from evals.results.ledger import Record
from evals.stats.intervals import Interval, half_width

PLANNED_ROUNDS = 8
"""Among which the budget is shared: it is by rounds, more than by samples, that an interval narrows."""


def stop_reason(comparison: Comparison, history: History) -> str:
    """The rule by which there is no further round; empty if there is to be one."""
    sampling = comparison.sampling
    racing = [one.name for one in comparison.candidates if history.is_active(one.name)]
    if len(history.preflights) == len(comparison.candidates) and not racing:
        return "failed"
    if history.rounds >= (sampling.max_rounds or math.inf):
        return "rounds"
    if history.rounds < sampling.min_rounds:
        return ""
    # A round is made if most of it fits, so that as many comparisons end a little early as a little late.
    if history.spent_s * (1 + 0.5 / history.rounds) >= sampling.budget_s:
        return "budget"
    width = _widest(comparison, history, racing, history.rounds)
    if width <= sampling.target_rel_interval and _published(comparison, history, racing) <= sampling.target_rel_interval:
        return "target"
    # Intervals of independent rounds shrink by √2 while the rounds double; drift does not.
    half = history.rounds // 2
    if half >= sampling.min_rounds and width > 0.9 * _widest(comparison, history, racing, half):
        return "stalled"
    return ""


def _rivals(comparison: Comparison, racing: Sequence[str]) -> list[Process]:
    """Whose speed-ups there are: those of all but the reference, or where there is nothing else, of its twin."""
    reference = comparison.relative_to
    return [Process(name) for name in racing if name != reference] or [Process(reference, is_control=True)]


def _widest(comparison: Comparison, history: History, racing: Sequence[str], rounds: int) -> float:
    """Of the intervals of all speed-ups after so many rounds, or of latencies where there is no reference, the widest."""
    reference = Process(comparison.relative_to)
    if reference.name not in racing:
        return max(half_width(list(history.medians(Process(name)).values())[:rounds]) for name in racing)
    return max(half_width(history.ratios(reference, runner)[:rounds]) for runner in _rivals(comparison, racing))


def _published(comparison: Comparison, history: History, racing: Sequence[str]) -> float:
    """The same, now, of the intervals that the table will show: they take longer to find than those of `_widest`."""
    reference = Process(comparison.relative_to)
    found: Iterable[Interval | None]
    if reference.name not in racing:
        found = (history.latency(Process(name)) for name in racing)
    else:
        found = (history.speedup(reference, runner) for runner in _rivals(comparison, racing))
    return max(math.inf if one is None else math.sqrt(one.high / one.low) - 1 for one in found)


def measure_round(number: int, comparison: Comparison, history: History, key: str, memory_limit_bytes: int) -> list[Record]:
    """A round: one fresh process for every runner, which then take short turns, shuffled anew each time."""
    watch = Stopwatch()
    sampling = comparison.sampling
    chance = random.Random(f"{sampling.seed} {key} {number}")
    runners = [Process(one.name) for one in comparison.candidates if history.is_active(one.name)]
    if history.is_active(comparison.relative_to):
        runners.append(Process(comparison.relative_to, is_control=True))
    chance.shuffle(runners)
    together = sum(history.held_bytes(runner.name) for runner in runners) < memory_limit_bytes
    results: dict[Process, Result] = {}
    groups = [runners] if together else [[runner] for runner in runners]
    for group in groups:
        share_s = sampling.budget_s / PLANNED_ROUNDS / len(groups)
        results |= _take_turns(group, comparison, share_s, chance, memory_limit_bytes, watch)
    seconds = watch.seconds()
    return [
        {
            "attention": runner.name,
            "is_control": runner.is_control,
            "round": number,
            "outcome": result.outcome,
            "detail": result.detail,
            **(result.value or {}),
            "round_s": seconds,
        }
        for runner, result in results.items()
    ]


def _take_turns(
    runners: Sequence[Process],
    comparison: Comparison,
    share_s: float,
    chance: random.Random,
    memory_limit_bytes: int,
    watch: Stopwatch,
) -> dict[Process, Result]:
    """Of processes that are gone behind it. `watch` runs, but for turns of another command."""
    end_s = watch.seconds() + share_s
    sampling = comparison.sampling
    candidates = {one.name: one for one in comparison.candidates}
    with ExitStack() as stack:
        workers = {}
        for runner in runners:
            worker = Worker(latency, comparison, candidates[runner.name], memory_limit_bytes=memory_limit_bytes)
            workers[runner] = stack.enter_context(worker)
        # All build at the same time; then each has its first call alone.
        results = {runner: worker.result(sampling.timeout_s) for runner, worker in workers.items()}
        for runner, result in results.items():
            if result.outcome == "ok":
                results[runner] = workers[runner].ask(None, sampling.timeout_s)
        taken: dict[Process, list[TimeSlice]] = {runner: [] for runner in runners}
        for _ in within_budget(sampling.time_slices, end_s, watch):
            order = [runner for runner in runners if results[runner].outcome == "ok"]
            chance.shuffle(order)
            for runner in order:
                result = workers[runner].ask(sampling.time_slice_s, sampling.timeout_s)
                if result.outcome == "ok":
                    taken[runner].append(result.value)
                else:
                    results[runner] = result
                watch.exclude(yield_lock())
        for worker in workers.values():
            worker.kill()  # all at once, which takes less time than one after the other
    for runner, result in results.items():
        if result.outcome == "ok":
            result.value.update(summarize_slices(taken[runner], result.value["called_s"]))
    return results


def within_budget(most: int, end_s: float, watch: Stopwatch) -> Iterator[int]:
    """0, 1, … up to `most`, as long as the caller's loop ends before `end_s` if it goes on as it went so far. 0 in any case."""
    start = watch.seconds()
    for turn in range(most):
        if turn and start + (watch.seconds() - start) * (turn + 1) / turn > end_s:
            return
        yield turn


def summarize_slices(turns: Sequence[TimeSlice], called_s: float) -> Record:
    """What the ledger keeps of a process's turns: every sample, and what a device told besides.

    called_s: what went into calls before the turns; with the turns it is all the time that went into calls.
    """
    record: Record = {
        "time_slices": [turn.samples_s for turn in turns],
        "called_s": called_s + sum(turn.called_s for turn in turns),
    }
    host_s = [turn.host_s for turn in turns if turn.host_s is not None]
    if host_s:
        throttled = {turn.throttled: None for turn in turns if turn.throttled}  # once each, in order
        record |= {"host_s": statistics.median(host_s), "exposed_samples": sum(turn.exposed for turn in turns)}
        record |= {"throttled": "; ".join(throttled), "device": turns[-1].device}
    return record


def latency(comparison: Comparison, candidate: Candidate) -> Generator[Any, float, None]:
    """In a child: builds, and waits; calls once, and waits; then a turn for every message, which says for how many seconds."""
    settle_allocator()
    work = prepare(comparison, candidate)
    time = make_clock(work.call, comparison.device.kind, comparison.device.mode)
    yield None
    first_s = time.first_call()
    seconds = yield {"tokens": work.tokens, "steps": work.steps, "first_call_s": first_s / work.steps, "called_s": first_s}
    while True:
        turn = time.time_slice(seconds)
        seconds = yield replace(turn, samples_s=[sample / work.steps for sample in turn.samples_s])
