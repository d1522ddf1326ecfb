"""The search for the longest sequence that fits a memory limit, for each candidate of a comparison, by bisection.

Everything has to fit: weights, inputs, what the workload prepares, such as a state or an optimizer, and its call.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from evals.benchmark.certificates import Certificates
from evals.benchmark.engine import HARNESS
from evals.benchmark.job import Job, ProgressCallback
from evals.benchmark.workloads import prepare
from evals.config import Candidate, Comparison
from evals.isolation.locks import exclusive_lock
from evals.isolation.worker import run_isolated
from evals.measure.memory import available_bytes, peak_allocated_bytes
from evals.results.ledger import Ledger, Record

STEPS = 8
"""Lengths per doubling: the longest is known to a factor of 2^(1/8), 9 %."""

MAX_TOKENS = 2**24
"""A search ends beyond so many tokens, as if any length fitted."""


def longest_fitting(fits: Callable[[int], bool], start: int, *, max_tokens: int = MAX_TOKENS) -> int | None:
    """Finds the longest length that fits: doubles or halves from `start`, then bisects.

    Args:
        fits: whether a length fits. Lengths beyond one that does not fit are taken not to fit.
        start: the first length, in tokens.
        max_tokens: the first length beyond it that fits is the result.

    Returns:
        The longest of the lengths start · 2^(i/STEPS), i an integer, rounded; None if not even one token fits.
    """

    def length(index: int) -> int:
        return max(1, round(start * 2 ** (index / STEPS)))

    low = 0
    if fits(start):
        while length(low) <= max_tokens and fits(length(low + STEPS)):
            low += STEPS
        if length(low) > max_tokens:
            return length(low)
    else:
        while True:
            if length(low) == 1:
                return None
            low -= STEPS
            if fits(length(low)):
                break
    high = low + STEPS
    while high - low > 1:
        middle = (low + high) // 2
        if fits(length(middle)):
            low = middle
        else:
            high = middle
    return length(low)


class ContextSearch(Job):
    """Searches, for each candidate of a comparison with `search: max_context`, the longest sequence that fits."""

    kind = "search"

    def __init__(self, comparison: Comparison, ledger: Ledger, certificates: Certificates) -> None:
        super().__init__(comparison, ledger, certificates)
        self.settings.pop("seq_len", None)  # the search varies it
        self.id = self.measurement_digest(*HARNESS, "evals.benchmark.max_context")
        # Peaks above the limit are still measured, up to this.
        self.process_limit_bytes = min(int(0.8 * available_bytes()), 2 * self.memory_limit_bytes + 2**30)

    def run(self, report: ProgressCallback) -> Iterator[Record]:
        with exclusive_lock(self.comparison.device.kind):
            yield self.append(self.description())
            for index, candidate in enumerate(self.comparison.candidates):
                share = index / len(self.comparison.candidates)
                yield from self._search(candidate, lambda step: report(f"{candidate.name}: {step}", share))  # noqa: B023  called at once

    def remaining(self) -> tuple[int, None]:
        return len(self.records("probe")), None

    def is_complete(self) -> bool:
        return bool(self.records("search")) and all(self._is_found(candidate) for candidate in self.comparison.candidates)

    def _known_probes(self, candidate: Candidate) -> dict[int, Record]:
        """The probes of a candidate in the ledger, by length; length 0 says that it was not certified."""
        return {record["seq_len"]: record for record in self.records("probe") if record["attention"] == candidate.name}

    def _is_found(self, candidate: Candidate) -> bool:
        known = self._known_probes(candidate)
        with contextlib.suppress(KeyError):  # a length that the search needs and no probe has tried
            if 0 not in known:
                longest_fitting(lambda seq_len: bool(known[seq_len]["outcome"] == "ok"), self.comparison.shape.seq_len)
            return True
        return False

    def description(self) -> Record:
        limits = {"limit_bytes": self.memory_limit_bytes, "timeout_s": self.comparison.sampling.timeout_s}
        return super().description() | limits

    def _search(self, candidate: Candidate, report: Callable[[str], None]) -> list[Record]:
        """Probes one candidate at the lengths that the ledger lacks; returns the new records."""
        known = self._known_probes(candidate)
        added: list[Record] = []

        def add(record: Record) -> None:
            known[record["seq_len"]] = record
            added.append(self.append(record))

        def fits(seq_len: int) -> bool:
            if seq_len not in known:
                report(f"{seq_len} tokens")
                add(self._probe(candidate, seq_len))
            return bool(known[seq_len]["outcome"] == "ok")

        if not known:
            report("certificate")
            certified = self.preflight.certify(candidate)
            if certified.outcome != "ok":
                add(self._probe_record(candidate, 0, certified.outcome, certified.detail))
        if 0 not in known:
            longest_fitting(fits, self.comparison.shape.seq_len)
        return added

    def _probe(self, candidate: Candidate, seq_len: int) -> Record:
        """Makes one call at one length, in a fresh process."""
        shape = replace(self.comparison.shape, seq_len=seq_len)
        result = run_isolated(
            peak_bytes_of_first_call,
            replace(self.comparison, shape=shape),
            candidate,
            timeout_s=self.comparison.sampling.timeout_s,
            memory_limit_bytes=self.process_limit_bytes,
        )
        if result.outcome != "ok":
            return self._probe_record(candidate, seq_len, result.outcome, result.detail)
        if result.value > self.memory_limit_bytes:
            detail = f"needs {result.value / 2**20:.1f} MiB, allowed are {self.memory_limit_bytes / 2**20:.1f}"
            return self._probe_record(candidate, seq_len, "limit", detail, result.value)
        return self._probe_record(candidate, seq_len, "ok", "", result.value)

    def _probe_record(self, candidate: Candidate, seq_len: int, outcome: str, detail: str, peak_bytes: int | None = None) -> Record:
        values = {"attention": candidate.name, "seq_len": seq_len, "outcome": outcome, "detail": detail, "peak_bytes": peak_bytes}
        return self.record("probe", **values)


def peak_bytes_of_first_call(comparison: Comparison, candidate: Candidate) -> int:
    """Peak of allocated bytes from the weights to the end of the first call. Must run in a fresh process."""

    def prepare_and_call() -> None:
        prepare(comparison, candidate).work.call()

    return peak_allocated_bytes(prepare_and_call, comparison.device.kind)
