"""One timed process of a round: its requests, its replies, and the ledger record that they become."""

import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evals.benchmark.untimed import keep_call
from evals.benchmark.workloads import prepare
from evals.config import Candidate, Comparison
from evals.isolation.worker import Result, Worker
from evals.measure.clock import TimeSlice, make_clock, settle_allocator
from evals.results.ledger import Record


@dataclass(frozen=True)
class CallFirst:
    """Request for the first call, which includes all one-time work."""


@dataclass(frozen=True)
class FirstCall:
    """Reply to `CallFirst`; tokens are those of one step, seconds those of the whole call."""

    tokens: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class CallFor:
    """Request for repeated calls in about so many seconds. The reply is a `TimeSlice`, with samples in seconds a step."""

    seconds: float


@dataclass(frozen=True)
class Keep:
    """Request to write what the last call read and returned to a file, for `untimed.difference_from_untimed`."""

    path: Path


@dataclass(frozen=True)
class Kept:
    """Reply to `Keep`."""


Request = CallFirst | CallFor | Keep
Reply = FirstCall | TimeSlice | Kept | None
"""None is the first reply: module, inputs and state are built, and nothing was called yet."""


def serve_calls(comparison: Comparison, candidate: Candidate) -> Generator[Reply, Request, None]:
    """Builds a candidate's workload and serves requests. Must run in a fresh process, since it sets allocator and threads."""
    settle_allocator()
    prepared = prepare(comparison, candidate)
    work = prepared.work
    clock = make_clock(work.call, comparison.device.kind, comparison.device.mode, prepared.renew)
    reply: Reply = None
    while True:
        match (yield reply):
            case CallFirst():
                reply = FirstCall(work.tokens, work.steps, clock.first_call())
            case CallFor(seconds):
                time_slice = clock.time_slice(seconds)
                reply = replace(time_slice, samples_s=[sample / work.steps for sample in time_slice.samples_s])
            case Keep(path):
                keep_call(path, prepared, clock.returned)
                reply = Kept()


class TimedProcess:
    """The parent's view of a process that runs `serve_calls`. The caller enters the context of `worker`, which ends it."""

    def __init__(self, comparison: Comparison, candidate: Candidate, memory_limit_bytes: int) -> None:
        self.worker = Worker[Request, Reply](serve_calls, comparison, candidate, memory_limit_bytes=memory_limit_bytes)
        self._timeout_s = comparison.sampling.timeout_s
        self._replies: list[Reply] = []
        self._failure: Result[Reply] | None = None

    @property
    def ok(self) -> bool:
        """Whether every request so far had its reply in time."""
        return self._failure is None

    def wait_until_built(self) -> None:
        self._keep(self.worker.result(self._timeout_s))

    def ask(self, request: Request) -> None:
        """Sends a request and keeps the reply, or the failure; does nothing after a failure."""
        if self.ok:
            self._keep(self.worker.ask(request, self._timeout_s))

    def _keep(self, result: Result[Reply]) -> None:
        if result.outcome == "ok":
            self._replies.append(result.value)
        else:
            self._failure = result
            self.worker.kill()  # one that took too long would go on beside those that are timed

    def record(self) -> Record:
        """Outcome of the process, and if it is ok, its samples and all else that it measured."""
        if self._failure is not None:
            return {"outcome": self._failure.outcome, "detail": self._failure.detail}
        (first,) = (reply for reply in self._replies if isinstance(reply, FirstCall))
        slices = [reply for reply in self._replies if isinstance(reply, TimeSlice)]
        return {"outcome": "ok", "detail": "", **summarize_calls(first, slices)}


def summarize_calls(first: FirstCall, slices: Sequence[TimeSlice]) -> Record:
    """Fields of a process's latency record.

    These are all samples; `called_s`, the duration of all calls, warm-up included; and on cuda the host times and device state.
    """
    record: Record = {
        "tokens": first.tokens,
        "steps": first.steps,
        "first_call_s": first.seconds / first.steps,
        "called_s": first.seconds + sum(one.called_s for one in slices),
        "time_slices": [one.samples_s for one in slices],
    }
    host_s = [one.host_s for one in slices if one.host_s is not None]
    if host_s:
        reasons = dict.fromkeys(one.throttled for one in slices if one.throttled)
        record |= {"host_s": statistics.median(host_s), "exposed_samples": sum(one.exposed for one in slices)}
        record |= {"throttled": "; ".join(reasons), "device": slices[-1].device}
    return record
