"""Measures one comparison: certifies each contestant, looks once at its memory, then times all of them in rounds."""

import math
import random
import statistics
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from evals import cuda, machine
from evals.ceilings import measure_ceilings
from evals.certify import certificate
from evals.config import Comparison, Contestant, Device, UsageError, digest
from evals.cost import cost
from evals.history import History, Runner
from evals.ledger import Ledger, Record
from evals.measure import Stopwatch, Turn, available_bytes, clock, now, peak_allocated_bytes, process_peak_bytes, settle_allocator
from evals.statistics import half_width
from evals.worker import Result, Worker, alone, run_isolated
from evals.workloads import prepare

HARNESS = ("engine.py", "measure.py", "cuda.py", "ceilings.py", "worker.py", "workloads.py", "ranks.py", "cost.py")
"""What decides how a number comes about: a comparison that other versions of these files began is not continued."""

CERTIFICATE = ("certify.py", "checks.py")

PLANNED_ROUNDS = 8
"""As many as the budget is planned for: it is by rounds, more than by samples, that an interval narrows."""

Watch = Callable[[str, float], None]
"""Told what is about to be done, and which part of the comparison is behind it."""


class Engine:
    """Works off one comparison. What `ledger` holds of it already is not measured again, so that a killed run goes on.

    `certificates` remembers, across sweeps, which code was certified and how it came out.
    Raises UsageError if the ledger is of a sweep over something else: a table has one x axis.
    """

    def __init__(self, comparison: Comparison, ledger: Ledger, certificates: Ledger) -> None:
        self.comparison = comparison
        self.ledger = ledger
        self.certificates = certificates
        for record in ledger.read()[0]:
            if record.get("kind") == "comparison" and record["swept"] != comparison.swept:
                raise UsageError(
                    f"{ledger.path.parent} holds a sweep over {record['swept'] or 'nothing'}, and this is one over "
                    f"{comparison.swept or 'nothing'}: give it a folder of its own, as in sweep_name=mine"
                )
        self.processor = machine.processor(comparison.device.kind)
        with torch.device("meta"):
            self.code = {one.name: one.code(one.build(comparison.model)) for one in comparison.contestants}
        sampling = comparison.sampling
        self.id = digest(
            {
                "settings": comparison.settings,
                "workload": comparison.workload,
                "contestants": [asdict(contestant) for contestant in comparison.contestants],
                "relative_to": comparison.relative_to,
                "code": self.code,
                "harness": source(*HARNESS),
                "limits": [sampling.timeout_s, sampling.memory_limit_gib, sampling.turn_s, sampling.seed],
                "machine": [self.processor, torch.__version__],
            }
        )
        gib = sampling.memory_limit_gib
        self.memory_limit = int(0.8 * available_bytes() if gib is None else gib * 2**30)

    def run(self, watch: Watch) -> Iterator[Record]:
        """Yields every record as soon as it is in the ledger."""
        with alone():
            history = History(self.ledger.read()[0], self.id)
            if not (self._finished(history) and self._is_last()):
                watch("how fast is this machine", 0.0)
                self._append(history, [self._description()])
            yield from self._look(history, watch)
            yield from self._rounds(history, watch)

    def outlook(self) -> tuple[int, float]:
        """How many rounds there are already, and about how many seconds are left to do."""
        history = History(self.ledger.read()[0], self.id)
        sampling, contestants = self.comparison.sampling, self.comparison.contestants
        left = 0.0 if self._finished(history) else max(sampling.budget_s - history.spent_s, 0.0)
        known = {record.get("key") for record in self.certificates.read()[0]}
        uncertified = sum(self._certificate_key(one) not in known for one in contestants if one.name not in history.trials)
        return history.rounds, left + CERTIFICATE_S * uncertified / torch.get_num_threads()

    def _is_last(self) -> bool:
        """Whether no other comparison of the same settings came after this one: then it is the one that counts."""
        settings = self._settings()
        same = [record for record in self.ledger.read()[0] if record.get("settings") == settings]
        return bool(same) and same[-1]["comparison"] == self.id

    def _settings(self) -> dict[str, str | int]:
        return {**self.comparison.settings, "processor": self.processor, "torch": torch.__version__}

    def _append(self, history: History, records: Sequence[Record]) -> None:
        self.ledger.append(*records)
        for record in records:
            history.add(record)

    def _record(self, kind: str, **values: Any) -> Record:
        return {"kind": kind, "comparison": self.id, **values, "time": now()}

    def _description(self) -> Record:
        comparison = self.comparison
        return self._record(
            "comparison",
            sweep=comparison.sweep,
            swept=comparison.swept,
            relative_to=comparison.relative_to,
            settings=self._settings(),
            contestants={contestant.name: contestant.node for contestant in comparison.contestants},
            sampling=asdict(comparison.sampling),
            code=self.code,
            ceilings=_ceilings(comparison.device),
            provenance=machine.provenance(comparison.device.kind),
        )

    # --- before the rounds: is it right, what does it hold, about how long does it take ------------

    def _look(self, history: History, watch: Watch) -> Iterator[Record]:
        missing = [one for one in self.comparison.contestants if one.name not in history.trials]
        cores = torch.get_num_threads()
        for batch in (missing[at : at + cores] for at in range(0, len(missing), cores)):
            watch("certifies " + ", ".join(one.name for one in batch), 0.0)
            # Each on a core of its own: nothing is timed meanwhile.
            with ThreadPoolExecutor(len(batch)) as pool:
                untimed = list(pool.map(self._untimed, batch))
            for contestant, record in zip(batch, untimed, strict=True):
                watch(f"{contestant.name}: first calls", 0.0)
                if record["outcome"] == "ok":
                    record |= self._first_look(contestant)
                self._append(history, [record])
                yield record

    def _untimed(self, contestant: Contestant) -> Record:
        """Whether it is certified, what it declares and what it holds."""
        record = self._record("trial", attention=contestant.name, outcome="ok", detail="")
        certified = self.certified(contestant)
        if certified.outcome != "ok":
            return record | {"outcome": certified.outcome, "detail": certified.detail}
        declared = self._isolated(cost, contestant)  # which runs the attention's own code, too
        if declared.outcome != "ok":
            return record | {"outcome": declared.outcome, "detail": declared.detail}
        held = self._isolated(memory, contestant)
        if held.outcome != "ok":
            record["detail"] = f"peak memory is unknown ({held.outcome}): {held.detail}"
        return {**record, **declared.value, **(held.value or {})}

    def _first_look(self, contestant: Contestant) -> Record:
        """About how long a call takes, or what became of it."""
        sampling = self.comparison.sampling
        with Worker(latency, self.comparison, contestant, memory_limit_bytes=self.memory_limit) as worker:
            built = worker.result(sampling.timeout_s)
            started = worker.ask(None, sampling.timeout_s) if built.outcome == "ok" else built
            turn = worker.ask(sampling.turn_s, sampling.timeout_s) if started.outcome == "ok" else started
        if turn.outcome != "ok":
            return {"outcome": turn.outcome, "detail": turn.detail}
        look_s = statistics.median(turn.value.samples_s)
        return {"look_s": look_s, "call_s": look_s * started.value["steps"]}

    def _isolated(self, function: Callable[..., Any], contestant: Contestant) -> Result:
        limit = self.comparison.sampling.timeout_s
        return run_isolated(function, self.comparison, contestant, timeout_s=limit, memory_limit_bytes=self.memory_limit)

    def _certificate_key(self, contestant: Contestant) -> str:
        model, device = self.comparison.model, self.comparison.device
        what = [contestant.node, self.code[contestant.name], model.hidden_dim, model.num_heads, source(*CERTIFICATE)]
        # Kernels that run only there are certified in its precision.
        return digest(what if device.kind == "cpu" else [*what, device.kind, device.dtype])

    def certified(self, contestant: Contestant) -> Result:
        """ok; uncertified, with what the certificate of this code says against it; unsupported where none can be made here."""
        key = self._certificate_key(contestant)
        for record in [*self.certificates.read()[0], *_inconclusive]:
            if record.get("key") == key:
                return Result("uncertified" if record["objection"] else "ok", detail=str(record["objection"]))
        limit = int(0.8 * available_bytes() / torch.get_num_threads())  # as many may run at once
        result = certificate(contestant, self.comparison, limit)
        if result.outcome == "unsupported":
            return Result("unsupported", detail=result.detail)
        if result.outcome == "ok":
            words = next((f"{finding.check}: {finding.detail}" for finding in result.value if not finding.passed), "")
        else:
            words = f"the certificate ended as {result.outcome}: {result.detail}"
        record = {"key": key, "attention": contestant.name, "objection": words, "time": now()}
        if result.outcome == "ok":
            self.certificates.append(record)
        else:
            _inconclusive.append(record)
        return Result("uncertified" if words else "ok", detail=words)

    # --- rounds -----------------------------------------------------------------------------------

    def _rounds(self, history: History, watch: Watch) -> Iterator[Record]:
        sampling = self.comparison.sampling
        for number in count(history.next_round):
            rule = self._finished(history)
            if rule:
                if history.stopped != rule:
                    record = self._record("stopped", rule=rule)
                    self._append(history, [record])
                    yield record
                return
            watch(f"round {number + 1}", min(history.spent_s / sampling.budget_s, 1.0))
            records = self._round(number, history)
            self._append(history, records)
            yield from records

    def _finished(self, history: History) -> str:
        """The rule by which there is no further round; empty if there is to be one."""
        sampling = self.comparison.sampling
        racing = [one.name for one in self.comparison.contestants if history.racing(one.name)]
        if len(history.trials) == len(self.comparison.contestants) and not racing:
            return "failed"
        if history.rounds >= (sampling.max_rounds or math.inf):
            return "rounds"
        if history.rounds < sampling.min_rounds:
            return ""
        if history.spent_s >= sampling.budget_s:
            return "budget"
        width = self._widest(history, racing, history.rounds)
        if width <= sampling.target_rel_interval:
            return "target"
        # Intervals of independent rounds shrink by √2 while the rounds double; drift does not.
        half = history.rounds // 2
        if half >= sampling.min_rounds and width > 0.9 * self._widest(history, racing, half):
            return "stalled"
        return ""

    def _widest(self, history: History, racing: Sequence[str], rounds: int) -> float:
        """Of the intervals of all speed-ups after so many rounds, or of latencies where there is no reference, the widest."""
        reference = self.comparison.relative_to
        if reference not in racing:
            return max(half_width(list(history.medians(Runner(name)).values())[:rounds]) for name in racing)
        others = [Runner(name) for name in racing if name != reference] or [Runner(reference, twin=True)]
        return max(half_width(history.ratios(Runner(reference), runner)[:rounds]) for runner in others)

    def _round(self, number: int, history: History) -> list[Record]:
        """One fresh process for every runner, which then take short turns, shuffled anew each time."""
        watch = Stopwatch()
        comparison, sampling = self.comparison, self.comparison.sampling
        chance = random.Random(f"{sampling.seed} {self.id} {number}")
        runners = [Runner(one.name) for one in comparison.contestants if history.racing(one.name)]
        if history.racing(comparison.relative_to):
            runners.append(Runner(comparison.relative_to, twin=True))
        chance.shuffle(runners)
        together = sum(history.held_bytes(runner.name) for runner in runners) < self.memory_limit
        turns = self._turns(history, runners)
        measured: dict[Runner, Result] = {}
        for group in [runners] if together else [[runner] for runner in runners]:
            measured |= self._take_turns(group, turns, chance)
        seconds = watch.seconds()
        return [
            self._record(
                "latency",
                attention=runner.name,
                twin=runner.twin,
                round=number,
                outcome=result.outcome,
                detail=result.detail,
                **(result.value or {}),
                round_s=seconds,
            )
            for runner, result in measured.items()
        ]

    def _turns(self, history: History, runners: Sequence[Runner]) -> int:
        """As many as let the planned number of rounds fit the budget, and never more than the option says."""
        sampling = self.comparison.sampling
        calls = [history.trials[runner.name]["call_s"] for runner in runners]
        start = sum(START_S + call for call in calls)
        turn = sum(max(sampling.turn_s, call) for call in calls)
        return max(1, min(sampling.turns, int((sampling.budget_s / PLANNED_ROUNDS - start) / turn)))

    def _take_turns(self, runners: Sequence[Runner], turns: int, chance: random.Random) -> dict[Runner, Result]:
        sampling = self.comparison.sampling
        contestants = {one.name: one for one in self.comparison.contestants}
        with ExitStack() as stack:
            workers = {}
            for runner in runners:
                worker = Worker(latency, self.comparison, contestants[runner.name], memory_limit_bytes=self.memory_limit)
                workers[runner] = stack.enter_context(worker)
            # All build at the same time; then each has its first call alone.
            results = {runner: worker.result(sampling.timeout_s) for runner, worker in workers.items()}
            for runner, result in results.items():
                if result.outcome == "ok":
                    results[runner] = workers[runner].ask(None, sampling.timeout_s)
            taken: dict[Runner, list[Turn]] = {runner: [] for runner in runners}
            for _ in range(turns):
                order = [runner for runner in runners if results[runner].outcome == "ok"]
                chance.shuffle(order)
                for runner in order:
                    result = workers[runner].ask(sampling.turn_s, sampling.timeout_s)
                    if result.outcome == "ok":
                        taken[runner].append(result.value)
                    else:
                        results[runner] = result
        for runner, result in results.items():
            if result.outcome == "ok":
                result.value.update(of_turns(taken[runner]))
        return results


CERTIFICATE_S, START_S = 6.0, 0.04
"""About what a certificate takes, and the start of a process, for planning ahead."""

_inconclusive: list[Record] = []
"""Certificates that were not finished: another day they may be, so that only this command remembers them."""

CEILINGS_S = 0.4
"""For the ceilings of each comparison. Of all in a ledger the highest count, so that a busy moment spoils nothing."""


def of_turns(turns: Sequence[Turn]) -> Record:
    """What the ledger keeps of a process's turns: every sample, and what a device told besides."""
    record: Record = {"turns": [turn.samples_s for turn in turns]}
    host_s = [turn.host_s for turn in turns if turn.host_s is not None]
    if host_s:
        throttled = {turn.throttled: None for turn in turns if turn.throttled}  # once each, in order
        record |= {"host_s": statistics.median(host_s), "exposed": sum(turn.exposed for turn in turns)}
        record |= {"throttled": "; ".join(throttled), "device": turns[-1].device}
    return record


def _ceilings(device: Device) -> Record | None:
    """What this machine can do at most, now; None where that did not work."""
    result = run_isolated(measure_ceilings, device, CEILINGS_S, timeout_s=60.0)
    return result.value.as_record() if result.outcome == "ok" else None


def source(*names: str) -> list[str]:
    """The text of files of this package."""
    paths = (Path(__file__).parent / name for name in names)
    return [path.read_text() for path in paths if path.exists()]


# --- what runs in a child process ---------------------------------------------------------------


def latency(comparison: Comparison, contestant: Contestant) -> Generator[Any, float, None]:
    """Builds, and waits; calls once, and waits; then a turn for every message, which says for how many seconds."""
    settle_allocator()
    work = prepare(comparison, contestant)
    time = clock(work.call, comparison.device.kind, comparison.device.mode)
    yield None
    seconds = yield {"tokens": work.tokens, "steps": work.steps, "first_call_s": time.first_call() / work.steps}
    while True:
        turn = time.turn(seconds)
        seconds = yield replace(turn, samples_s=[sample / work.steps for sample in turn.samples_s])


def memory(comparison: Comparison, contestant: Contestant) -> dict[str, Any]:
    work, _, _, counted = prepare(comparison, contestant)
    if comparison.device.kind == "cuda":
        peak = cuda.peak_memory(work)
        return {"peak_bytes": peak.allocated_bytes, "process_peak_bytes": peak.reserved_bytes, **counted()}
    # In this order: the first asks for a process that has not worked yet.
    return {"process_peak_bytes": process_peak_bytes(work), "peak_bytes": peak_allocated_bytes(work), **counted()}
