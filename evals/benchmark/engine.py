"""The engine: times the candidates of one comparison in rounds, after a preflight of each, and records everything."""

import platform
from collections.abc import Iterator
from dataclasses import asdict

from evals.benchmark.certificates import Certificates
from evals.benchmark.job import Job, ProgressCallback
from evals.benchmark.rounds import measure_round, stop_reason
from evals.config import Candidate, Comparison
from evals.isolation import forkserver
from evals.isolation.locks import end_round, exclusive_lock
from evals.isolation.worker import run_isolated
from evals.measure import machine
from evals.measure.clock import seconds_since
from evals.measure.peaks import measure_peaks
from evals.results.history import History
from evals.results.ledger import Ledger, Record

HARNESS = tuple(
    f"evals.{name}"
    for name in (
        *(
            "benchmark.rounds",
            "benchmark.timing",
            "benchmark.preflight",
            "benchmark.workloads",
            "benchmark.modules",
            "benchmark.cost",
            "benchmark.configuration_check",
            "benchmark.gradient_check",
            "benchmark.tolerance",
            "benchmark.untimed",
        ),
        *("benchmark.traced_reads", "benchmark.context_parallel", "benchmark.preload"),
        *("isolation.worker", "isolation.forkserver", "isolation.locks"),
        *("measure.clock", "measure.memory", "measure.flops", "measure.cuda_clock", "measure.cuda_state", "measure.peaks"),
    )
)
"""Modules on which measured numbers depend: a comparison that other versions of them began is not continued."""

PEAKS_S, PEAKS_COUNT, PEAKS_VALID_S = 0.4, 3, 600.0
"""Duration of one measurement of the machine's peaks, how many a machine and dtype get, and for how long they are valid.

Tables use the highest of all in a ledger, so that one busy moment spoils nothing.
"""


class Engine(Job):
    """Times the candidates of one comparison, in rounds."""

    kind = "comparison"

    def __init__(self, comparison: Comparison, ledger: Ledger, certificates: Certificates) -> None:
        super().__init__(comparison, ledger, certificates)
        self.id = self.measurement_digest(*HARNESS)

    def run(self, report: ProgressCallback) -> Iterator[Record]:
        forkserver.start()
        with exclusive_lock(self.comparison.device.kind):
            history = self._history()
            if any(self.preflight.certify(one).outcome == "ok" for one in self._uncertified(history)):
                # The others are measured again, too: all of a round are measured side by side.
                yield self._add(history, self.record("restart", host=platform.node()))
            if not (stop_reason(self.comparison, history) and self._is_latest()):
                report("measuring the peak rates of this machine", 0.0)
                if history.rounds and self._last_host() not in (None, platform.node()):
                    yield self._add(history, self.record("restart", host=platform.node()))
                self._add(history, self.description() | {"peaks": self._measured_peaks()})
            pending = self._pending(history)
            if pending:
                report("certifying, and measuring memory", 0.0)
            for preflight in self.preflight.run(pending):
                yield self._add(history, self.record("preflight", **preflight))
            yield from self._rounds(history, report)

    def _rounds(self, history: History, report: ProgressCallback) -> Iterator[Record]:
        while not (reason := stop_reason(self.comparison, history)):
            number = history.next_round
            report(f"round {number + 1}", min(history.spent_s / self.comparison.sampling.budget_s, 1.0))
            records = measure_round(number, self.comparison, history, self.id, self.memory_limit_bytes)
            records = [self.record("latency", **values) for values in records]
            self.ledger.append(*records)  # all at once: a round counts as a whole
            for record in records:
                history.add(record)
            end_round()
            yield from records
        if history.stop_reason != reason:
            yield self._add(history, self.record("stop", stop_reason=reason))

    def remaining(self) -> tuple[int, float]:
        history = self._history()
        left_s = 0.0 if stop_reason(self.comparison, history) else max(self.comparison.sampling.budget_s - history.spent_s, 0.0)
        return history.rounds, left_s + self.preflight.estimated_seconds(self._pending(history))

    def is_complete(self) -> bool:
        history = self._history()
        reason = stop_reason(self.comparison, history)
        left = self._pending(history) or self._uncertified(history)
        return bool(reason) and reason == history.stop_reason and not left and self._is_latest()

    def description(self) -> Record:
        """Record of the comparison and the machine; in a ledger it also carries the machine's peaks."""
        return super().description() | {
            "relative_to": self.comparison.relative_to,
            "sampling": asdict(self.comparison.sampling),
            "code": self.code,
        }

    def _add(self, history: History, record: Record) -> Record:
        self.ledger.append(record)
        history.add(record)
        return record

    def _history(self) -> History:
        return History(self.ledger.read()[0], self.id)

    def _pending(self, history: History) -> list[Candidate]:
        """The candidates that have had no preflight yet."""
        return [one for one in self.comparison.candidates if one.name not in history.preflights]

    def _uncertified(self, history: History) -> list[Candidate]:
        """The candidates whose certificate did not end in an earlier command, for reasons that may lie in the machine."""
        names = {name for name, preflight in history.preflights.items() if preflight.get("unfinished")}
        return [one for one in self.comparison.candidates if one.name in names and not self.preflight.has_tried(one)]

    def _is_latest(self) -> bool:
        """Whether this comparison is the last one of its settings in the ledger: then it is the one that tables show."""
        same = [record for record in self.ledger.read()[0] if record.get("settings") == self.settings]
        return bool(same) and same[-1]["comparison"] == self.id

    def _last_host(self) -> str | None:
        """The machine that worked on this comparison last. A comparison never spans machines, not even two that are alike."""
        descriptions = self.records("comparison")
        return str(descriptions[-1]["provenance"]["host"]) if descriptions else None

    def _measured_peaks(self) -> Record | None:
        """Peak rates of this machine, measured now; None if that failed, or if recent comparisons have measured them."""
        recent = [
            record
            for record in self.ledger.read()[0]
            if record.get("peaks")
            and all(record["settings"][key] == self.settings[key] for key in machine.IDENTITY)
            and seconds_since(record["time"]) < PEAKS_VALID_S
        ]
        if len(recent) >= PEAKS_COUNT:
            return None
        device = self.comparison.device
        result = run_isolated(measure_peaks, device.kind, device.torch_dtype, device.threads, PEAKS_S, timeout_s=60.0)
        return asdict(result.value) if result.outcome == "ok" else None
