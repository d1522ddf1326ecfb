"""One timed process of a round: the requests that it gets, its replies, and what the ledger keeps of it."""

import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from evals.benchmark.workloads import prepare
from evals.config import Candidate, Comparison
from evals.isolation.worker import Result, Worker
from evals.measure.clock import TimeSlice, make_clock, settle_allocator
from evals.results.ledger import Record


@dataclass(frozen=True)
class Built:
    """First reply: the module, its inputs and its state are there, and nothing was called yet."""


@dataclass(frozen=True)
class CallFirst:
    """Request for the first call, which does what is done only once."""


@dataclass(frozen=True)
class FirstCall:
    """Reply to `CallFirst`.

    Attributes:
        tokens: tokens that one step goes through.
        steps: steps that one call makes; times are divided by it.
        seconds: duration of the call.
    """

    tokens: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class CallFor:
    """Request for a time slice: to call again and again for about so many seconds. The reply is a `TimeSlice`, a sample a step."""

    seconds: float


Request = CallFirst | CallFor
Reply = Built | FirstCall | TimeSlice


def serve_calls(comparison: Comparison, candidate: Candidate) -> Generator[Reply, Request, None]:
    """Builds a candidate's workload and serves requests. Runs in a process of its own, over which it takes control."""
    settle_allocator()
    work = prepare(comparison, candidate)
    clock = make_clock(work.call, comparison.device.kind, comparison.device.mode)
    reply: Reply = Built()
    while True:
        match (yield reply):
            case CallFirst():
                reply = FirstCall(work.tokens, work.steps, clock.first_call())
            case CallFor(seconds):
                time_slice = clock.time_slice(seconds)
                reply = replace(time_slice, samples_s=[sample / work.steps for sample in time_slice.samples_s])


class TimedProcess:
    """The parent's view of a process that runs `serve_calls`.

    Attributes:
        worker: the process. Whoever makes this object enters the worker's context, which ends the process.
    """

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
    """Fields of a latency record.

    Args:
        first: the first call of a process.
        slices: its time slices, with samples in seconds a step.

    Returns:
        Every sample; `called_s`, the time that went into all calls, warm-up included; and on a device its host times and state.
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
