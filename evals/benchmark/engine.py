"""Measures one comparison: tries each candidate, then times all of them in rounds, and keeps every record."""

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import count
from typing import Any

import torch

from evals.benchmark import code_hash
from evals.benchmark.preflight import Preflight
from evals.benchmark.rounds import measure_round, stop_reason
from evals.config import Comparison
from evals.errors import UsageError
from evals.isolation import forkserver
from evals.isolation.locks import exclusive_lock
from evals.isolation.worker import run_isolated
from evals.measure import machine
from evals.measure.clock import now, seconds_since
from evals.measure.memory import available_bytes
from evals.measure.peaks import measure_peaks
from evals.results.history import History
from evals.results.ids import digest
from evals.results.ledger import Ledger, Record

HARNESS = tuple(
    f"evals.{name}"
    for name in (
        *("benchmark.rounds", "benchmark.preflight", "benchmark.workloads", "benchmark.cost", "benchmark.context_parallel"),
        *("isolation.worker", "isolation.forkserver", "benchmark.preload", "isolation.locks"),
        *("measure.clock", "measure.memory", "measure.flops", "measure.cuda_clock", "measure.cuda_state", "measure.peaks"),
    )
)
"""What decides how a number comes about: a comparison that other versions of these files began is not continued."""

CEILINGS_S, CEILINGS, CEILINGS_VALID_S = 0.4, 3, 600.0
"""Ceilings are measured for so long, before so many comparisons of a machine and dtype, and again after so long.

Of all in a ledger the highest count, so that a busy moment spoils nothing.
"""

Watch = Callable[[str, float], None]
"""Told what is about to be done, and which part of the comparison is behind it."""


def check_axis(comparison: Comparison, ledger: Ledger) -> None:
    """Raises UsageError if the ledger is of a sweep over something else, or of another kind: a table has one x axis."""
    kind, words = ("comparison", "timing") if comparison.task is None else ("study", "training")
    for record in ledger.read()[0]:
        if record.get("kind") not in ("comparison", "study"):
            continue
        if record["kind"] != kind:
            raise UsageError(f"{ledger.path.parent} holds no {words}: give this a folder of its own, as in sweep_name=mine")
        if record["swept"] != comparison.swept:
            raise UsageError(
                f"{ledger.path.parent} holds a sweep over {record['swept'] or 'nothing'}, and this is one over "
                f"{comparison.swept or 'nothing'}: give it a folder of its own, as in sweep_name=mine"
            )


class Engine:
    """Works off one comparison. What `ledger` holds of it already is not measured again, so that a killed run goes on.

    `certificates` remembers, across sweeps, which code was certified and how it came out.
    Raises UsageError if the ledger is of a sweep over something else: a table has one x axis.
    """

    kind = "comparison"

    def __init__(self, comparison: Comparison, ledger: Ledger, certificates: Ledger) -> None:
        self.comparison = comparison
        self.ledger = ledger
        check_axis(comparison, ledger)
        self.processor = machine.processor_name(comparison.device.kind)
        with torch.device("meta"):
            self.code = {one.name: code_hash.attention_digest(one.build(comparison.model)) for one in comparison.candidates}
        sampling = comparison.sampling
        self.id = digest(
            {
                "settings": comparison.settings,
                "workload": comparison.workload,
                "candidates": [asdict(candidate) for candidate in comparison.candidates],
                "relative_to": comparison.relative_to,
                "code": self.code,
                "harness": code_hash.modules_digest(*HARNESS),
                "limits": [sampling.timeout_s, sampling.memory_limit_gib, sampling.time_slice_s, sampling.seed],
                "machine": [self.processor, torch.__version__],
            }
        )
        gib = sampling.memory_limit_gib
        self.memory_limit_bytes = int(0.8 * available_bytes() if gib is None else gib * 2**30)
        self.preflight = Preflight(comparison, self.code, certificates, self.memory_limit_bytes)

    def run(self, watch: Watch) -> Iterator[Record]:
        """Yields every record as soon as it is in the ledger. Of a main thread."""
        forkserver.start()
        with exclusive_lock(self.comparison.device.kind):
            history = History(self.ledger.read()[0], self.id)
            if not (stop_reason(self.comparison, history) and self._is_last()):
                watch("how fast is this machine", 0.0)
                if history.rounds and self._host() not in (None, platform.node()):
                    yield from self._append(history, [self._record("restart", host=platform.node())])
                self._append(history, [self.description() | {"peaks": self._ceilings()}])
            missing = [one for one in self.comparison.candidates if one.name not in history.preflights]
            if missing:
                watch("certifies, and looks at memory", 0.0)
            for tried in self.preflight.make(missing):
                yield from self._append(history, [self._record("preflight", **tried)])
            yield from self._rounds(history, watch)

    def _rounds(self, history: History, watch: Watch) -> Iterator[Record]:
        for number in count(history.next_round):
            rule = stop_reason(self.comparison, history)
            if rule:
                if history.stop_reason != rule:
                    yield from self._append(history, [self._record("stop", stop_reason=rule)])
                return
            watch(f"round {number + 1}", min(history.spent_s / self.comparison.sampling.budget_s, 1.0))
            made = measure_round(number, self.comparison, history, self.id, self.memory_limit_bytes)
            yield from self._append(history, [self._record("latency", **values) for values in made])

    def outlook(self) -> tuple[int, float]:
        """How many rounds there are already, and about how many seconds are left to do."""
        history = History(self.ledger.read()[0], self.id)
        left = 0.0 if stop_reason(self.comparison, history) else max(self.comparison.sampling.budget_s - history.spent_s, 0.0)
        missing = [one for one in self.comparison.candidates if one.name not in history.preflights]
        return history.rounds, left + self.preflight.seconds(missing)

    def _is_last(self) -> bool:
        """Whether no other comparison of the same settings came after this one: then it is the one that counts."""
        settings = self._settings()
        same = [record for record in self.ledger.read()[0] if record.get("settings") == settings]
        return bool(same) and same[-1]["comparison"] == self.id

    def _settings(self) -> dict[str, str | int | float]:
        return {**self.comparison.settings, "processor": self.processor, "torch": torch.__version__}

    def _append(self, history: History, records: Sequence[Record]) -> Sequence[Record]:
        self.ledger.append(*records)
        for record in records:
            history.add(record)
        return records

    def _record(self, kind: str, **values: Any) -> Record:
        return {"kind": kind, "comparison": self.id, **values, "time": now()}

    def _host(self) -> str | None:
        """Where this comparison was worked on last: it never spans machines, not even two that are alike."""
        own = [r for r in self.ledger.read()[0] if (r.get("kind"), r.get("comparison")) == ("comparison", self.id)]
        return str(own[-1]["provenance"]["host"]) if own else None

    def description(self) -> Record:
        """The record that says what is compared, and where; in a ledger, with the machine's ceilings besides."""
        comparison = self.comparison
        return self._record(
            "comparison",
            sweep=comparison.sweep,
            swept=comparison.swept,
            relative_to=comparison.relative_to,
            settings=self._settings(),
            candidates={candidate.name: candidate.node for candidate in comparison.candidates},
            sampling=asdict(comparison.sampling),
            code=self.code,
            provenance=machine.provenance(comparison.device.kind),
        )

    def _ceilings(self) -> Record | None:
        """What this machine can do at most, now; None where that did not work, or is known from the comparisons before."""
        settings = self._settings()
        fresh = [
            record
            for record in self.ledger.read()[0]
            if record.get("peaks")
            and all(record["settings"][key] == settings[key] for key in machine.IDENTITY)
            and seconds_since(record["time"]) < CEILINGS_VALID_S
        ]
        if len(fresh) >= CEILINGS:
            return None
        device = self.comparison.device
        result = run_isolated(measure_peaks, device.kind, device.torch_dtype, device.threads, CEILINGS_S, timeout_s=60.0)
        return result.value.as_record() if result.outcome == "ok" else None
