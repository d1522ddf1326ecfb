"""Rounds of a comparison: fresh processes that take time slices in shuffled order, and the rules that end the sampling."""

import math
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from evals.benchmark.timing import CallFirst, CallFor, Keep, TimedProcess
from evals.benchmark.untimed import difference_from_untimed
from evals.config import Comparison
from evals.isolation.locks import yield_lock
from evals.isolation.scratch import scratch_folder
from evals.isolation.worker import Result, run_isolated
from evals.measure.clock import Stopwatch
from evals.results.history import History, Process
from evals.results.ledger import Record
from evals.stats.intervals import Interval, half_width

PLANNED_ROUNDS = 8
"""The budget is planned for so many rounds: an interval narrows by rounds more than by samples."""


# --- when sampling ends -------------------------------------------------------------------------


def stop_reason(comparison: Comparison, history: History) -> str:
    """Decides whether a comparison needs another round.

    Returns:
        The rule that ends the sampling: failed, rounds, budget, target or stalled. Empty if there is to be another round.
    """
    sampling = comparison.sampling
    active = [one.name for one in comparison.candidates if history.is_active(one.name)]
    if len(history.preflights) == len(comparison.candidates) and not active:
        return "failed"
    if history.rounds >= (sampling.max_rounds or math.inf):
        return "rounds"
    if history.rounds < sampling.min_rounds:
        return ""
    # A round is made if most of it fits, so that as many comparisons end a little early as a little late.
    if history.spent_s * (1 + 0.5 / history.rounds) >= sampling.budget_s:
        return "budget"
    width = _quick_width(comparison, history, active, history.rounds)
    target = sampling.target_rel_interval
    if width <= target and _published_width(comparison, history, active) <= target:
        return "target"
    # Intervals of independent rounds shrink by √2 while the rounds double; drift does not.
    half = history.rounds // 2
    if half >= sampling.min_rounds and width > 0.9 * _quick_width(comparison, history, active, half):
        return "stalled"
    return ""


def _compared(comparison: Comparison, active: Sequence[str]) -> list[Process]:
    """Processes for which speed-ups are estimated: all but the reference, or its A/A control if there is no other."""
    reference = comparison.relative_to
    return [Process(name) for name in active if name != reference] or [Process(reference, is_control=True)]


def _quick_width(comparison: Comparison, history: History, active: Sequence[str], rounds: int) -> float:
    """Relative half-width of the widest interval after so many rounds, estimated in microseconds.

    The intervals are those of speed-ups, or of latencies if the reference has failed.
    """
    reference = Process(comparison.relative_to)
    if reference.name not in active:
        return max(half_width(list(history.medians(Process(name)).values())[:rounds]) for name in active)
    return max(half_width(history.ratios(reference, process)[:rounds]) for process in _compared(comparison, active))


def _published_width(comparison: Comparison, history: History, active: Sequence[str]) -> float:
    """Relative half-width of the widest interval that the table will show, by its bootstrap, which takes longer."""
    reference = Process(comparison.relative_to)
    intervals: Iterable[Interval | None]
    if reference.name not in active:
        intervals = (history.latency(Process(name)) for name in active)
    else:
        intervals = (history.speedup(reference, process) for process in _compared(comparison, active))
    return max(math.inf if one is None else math.sqrt(one.high / one.low) - 1 for one in intervals)


# --- one round ----------------------------------------------------------------------------------


def measure_round(number: int, comparison: Comparison, history: History, key: str, memory_limit_bytes: int) -> list[Record]:
    """Measures every active candidate, and the reference's A/A control, in a fresh process each.

    Args:
        number: number of the round, from 0.
        comparison: its active candidates are measured.
        history: which candidates are active, and how much memory they hold.
        key: id of the comparison, which with the seed and the number fixes all shuffling.
        memory_limit_bytes: of one process; if all together hold more, they run one after another.

    Returns:
        The fields of one latency record a process.
    """
    stopwatch = Stopwatch()
    sampling = comparison.sampling
    generator = random.Random(f"{sampling.seed} {key} {number}")
    processes = [Process(one.name) for one in comparison.candidates if history.is_active(one.name)]
    if history.is_active(comparison.relative_to):
        processes.append(Process(comparison.relative_to, is_control=True))
    generator.shuffle(processes)
    fit_together = sum(history.process_bytes(process.name) for process in processes) < memory_limit_bytes
    groups = [processes] if fit_together else [[process] for process in processes]
    records: dict[Process, Record] = {}
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        kept = {process: Path(folder) / f"{place}" for place, process in enumerate(compared(comparison, processes, number))}
        for group in groups:
            end_s = stopwatch.seconds() + sampling.budget_s / PLANNED_ROUNDS / len(groups)
            records |= _measure_interleaved(group, comparison, end_s, generator, memory_limit_bytes, stopwatch, kept)
        measured_s = stopwatch.seconds()
        finished = {process: path for process, path in kept.items() if records[process]["outcome"] == "ok" and path.exists()}
        at_once = len(finished) if fit_together else 1
        records |= _failures_against_untimed(finished, comparison, memory_limit_bytes, max(1, at_once))
    round_s = stopwatch.seconds()
    return [
        {
            "attention": process.name,
            "is_control": process.is_control,
            "round": number,
            **record,
            "round_s": round_s,
            "checked_s": (round_s - measured_s) / len(records),
        }
        for process, record in records.items()
    ]


def compared(comparison: Comparison, processes: Sequence[Process], number: int) -> list[Process]:
    """Those processes of a round of which a timed call is compared with an untimed one: each once in `min_rounds` rounds."""
    everyone = [*(Process(one.name) for one in comparison.candidates), Process(comparison.relative_to, is_control=True)]
    rounds = min(comparison.sampling.min_rounds, comparison.sampling.max_rounds or math.inf)
    return [process for process in processes if (everyone.index(process) - number) % rounds == 0]


def _measure_interleaved(
    processes: Sequence[Process],
    comparison: Comparison,
    end_s: float,
    generator: random.Random,
    memory_limit_bytes: int,
    stopwatch: Stopwatch,
    kept: Mapping[Process, Path],
) -> dict[Process, Record]:
    """Runs one time slice per process in shuffled order, again and again until `end_s`, and ends all processes.

    kept: the processes of which a call is kept, and the files for it. It is the last call of a time slice that no seed tells.
    """
    sampling = comparison.sampling
    candidates = {one.name: one for one in comparison.candidates}
    timed: dict[Process, TimedProcess] = {}
    with ExitStack() as stack:
        for process in processes:
            timed[process] = TimedProcess(comparison, candidates[process.name], memory_limit_bytes)
            stack.enter_context(timed[process].worker)
        for one in timed.values():
            one.wait_until_built()  # all build at the same time
        for one in timed.values():
            one.ask(CallFirst())  # while the others are stopped
        moments = {process: random.SystemRandom().randrange(sampling.time_slices) for process in kept if process in timed}
        for iteration in within_budget(sampling.time_slices, end_s, stopwatch):
            order = [process for process, one in timed.items() if one.ok]
            generator.shuffle(order)
            for process in order:
                timed[process].ask(CallFor(sampling.time_slice_s))
                if moments.get(process) == iteration:
                    timed[process].ask(Keep(kept[process]))
                stopwatch.exclude(yield_lock())
        for process in moments:
            if not kept[process].exists():  # time has ended before its moment
                timed[process].ask(Keep(kept[process]))
        for one in timed.values():
            one.worker.kill()  # all at once, which takes less time than one after another
    return {process: one.record() for process, one in timed.items()}


def _failures_against_untimed(
    kept: Mapping[Process, Path], comparison: Comparison, memory_limit_bytes: int, at_once: int
) -> dict[Process, Record]:
    """Failed records of those processes whose kept call is not what an untimed process returns."""
    candidates = {one.name: one for one in comparison.candidates}
    threads = max(1, comparison.device.threads // at_once)
    timeout_s = 2 * comparison.sampling.timeout_s  # it builds the module, then calls it

    def compare(process: Process) -> Result[str]:
        arguments = (comparison, candidates[process.name], kept[process], threads)
        return run_isolated(difference_from_untimed, *arguments, timeout_s=timeout_s, memory_limit_bytes=memory_limit_bytes)

    failures: dict[Process, Record] = {}
    with ThreadPoolExecutor(at_once) as pool:
        for process, result in zip(kept, pool.map(compare, kept), strict=True):
            if result.outcome != "ok":
                failures[process] = {
                    "outcome": result.outcome,
                    "detail": f"an untimed call on an input that was timed: {result.detail}",
                }
            elif result.value:
                detail = f"a timed call did not return what an untimed one does: {result.value}"
                failures[process] = {"outcome": "uncertified", "detail": detail}
    return failures


def within_budget(limit: int, end_s: float, stopwatch: Stopwatch) -> Iterator[int]:
    """Counts the iterations of the caller's loop for as long as it is expected to end in time.

    Args:
        limit: most iterations.
        end_s: time of the stopwatch at which the loop is to end.
        stopwatch: runs, except while another command holds the lock.

    Yields:
        0, 1, …; stops before an iteration that would end after `end_s` if it took the average time of those before. The first
        iteration always takes place, unless the limit is 0.
    """
    start_s = stopwatch.seconds()
    for iteration in range(limit):
        if iteration and start_s + (stopwatch.seconds() - start_s) * (iteration + 1) / iteration > end_s:
            return
        yield iteration
