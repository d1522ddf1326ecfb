"""Measures one comparison: certifies each contestant, then times all of them round by round, and keeps every sample."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from evals import machine
from evals.certify import TIMEOUT_S, findings
from evals.config import Comparison, Contestant, UsageError, digest
from evals.ledger import Ledger, Record
from evals.measure import available_bytes, now, peak_allocated_bytes, sample_latency
from evals.worker import run_isolated
from evals.workloads import cost, prepare

HARNESS = ("engine.py", "measure.py", "worker.py", "workloads.py")
"""What decides how a number comes about: a comparison that other versions of these files began is not continued."""

CERTIFICATE = ("certify.py", "checks.py")


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
                "contestants": {contestant.name: contestant.node for contestant in comparison.contestants},
                "code": self.code,
                "harness": source(*HARNESS),
                "limits": [sampling.timeout_s, sampling.memory_limit_gib],
                "machine": [self.processor, torch.__version__],
            }
        )
        gib = sampling.memory_limit_gib
        self.memory_limit = int(0.8 * available_bytes() if gib is None else gib * 2**30)

    @property
    def steps(self) -> int:
        """How many measurements there are, made or not: every contestant's rounds, and its memory once."""
        return len(self.comparison.contestants) * (self.comparison.sampling.rounds + 1)

    def run(self, announce: Callable[[str], None]) -> Iterator[Record | None]:
        """Yields one record a step, None where an earlier failure spares it; says first what is about to be measured."""
        done = self._done()
        failed = {name for (name, kind, _), record in done.items() if kind == "latency" and record["outcome"] != "ok"}
        sampling = self.comparison.sampling
        self.ledger.append(self._description())
        for number in range(sampling.rounds):
            order = list(self.comparison.contestants)
            random.Random(f"{sampling.seed} {self.id} {number}").shuffle(order)
            for contestant in order:
                # Memory apart from time: a profiler slows down what it watches.
                for kind in ("latency", "memory") if number == 0 else ("latency",):
                    record = done.get((contestant.name, kind, number))
                    if record is None and contestant.name not in failed:
                        announce(f"{contestant.name} {kind}, round {number + 1}/{sampling.rounds}")
                        record = self._measure(contestant, kind, number)
                        self.ledger.append(record)
                        if kind == "latency" and record["outcome"] != "ok":
                            failed.add(contestant.name)
                    yield record

    def _done(self) -> dict[tuple[str, str, int], Record]:
        ours = (record for record in self.ledger.read()[0] if record.get("comparison") == self.id and "round" in record)
        return {(record["attention"], record["kind"], record["round"]): record for record in ours}

    def _description(self) -> Record:
        comparison = self.comparison
        return {
            "kind": "comparison",
            "comparison": self.id,
            "sweep": comparison.sweep,
            "swept": comparison.swept,
            "relative_to": comparison.relative_to,
            "settings": {**comparison.settings, "processor": self.processor, "torch": torch.__version__},
            "contestants": {contestant.name: contestant.node for contestant in comparison.contestants},
            "code": self.code,
            "provenance": machine.provenance(),
            "time": now(),
        }

    def _measure(self, contestant: Contestant, kind: str, number: int) -> Record:
        record = {"kind": kind, "comparison": self.id, "attention": contestant.name, "round": number, "time": now()}
        if kind == "latency" and number == 0:
            objection = self._objection(contestant)
            if objection:
                return {**record, "outcome": "uncertified", "detail": objection}
            record |= cost(self.comparison, contestant)
        measured = run_isolated(
            {"latency": latency, "memory": memory}[kind],
            self.comparison,
            contestant,
            timeout_s=self.comparison.sampling.timeout_s,
            memory_limit_bytes=self.memory_limit,
        )
        return {**record, "outcome": measured.outcome, "detail": measured.detail, **(measured.value or {})}

    def _objection(self, contestant: Contestant) -> str:
        """What the certificate of this code says against it; empty if nothing."""
        model = self.comparison.model
        key = digest([contestant.node, self.code[contestant.name], model.hidden_dim, model.num_heads, source(*CERTIFICATE)])
        for record in self.certificates.read()[0]:
            if record.get("key") == key:
                return str(record["objection"])
        result = run_isolated(findings, contestant, model, timeout_s=TIMEOUT_S, memory_limit_bytes=self.memory_limit)
        if result.outcome == "ok":
            words = next((f"{finding.check}: {finding.detail}" for finding in result.value if not finding.passed), "")
        else:
            words = f"the certificate ended as {result.outcome}: {result.detail}"
        self.certificates.append({"key": key, "attention": contestant.name, "objection": words, "time": now()})
        return words


def source(*names: str) -> list[str]:
    """The text of files of this package."""
    paths = (Path(__file__).parent / name for name in names)
    return [path.read_text() for path in paths if path.exists()]


# --- what runs in a child process ---------------------------------------------------------------


def latency(comparison: Comparison, contestant: Contestant) -> dict[str, Any]:
    work = prepare(comparison, contestant)
    sampling = comparison.sampling
    sampled = sample_latency(work.call, comparison.device.kind, budget_s=sampling.budget_s, min_samples=sampling.min_samples)
    return {"tokens": work.tokens, "first_call_s": sampled.first_call_s, "samples_s": sampled.samples_s}


def memory(comparison: Comparison, contestant: Contestant) -> dict[str, Any]:
    return {"peak_bytes": peak_allocated_bytes(prepare(comparison, contestant).call, comparison.device.kind)}
