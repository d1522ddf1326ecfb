"""The longest sequence that fits a memory limit, for each candidate: found by bisection, each length tried once.

What has to fit is everything: weights, inputs, whatever the workload prepares (a state, an optimizer), and its call.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from evals.benchmark.code_hash import modules_digest
from evals.benchmark.engine import Engine, Watch
from evals.benchmark.workloads import prepare
from evals.config import Candidate, Comparison
from evals.isolation.locks import exclusive_lock
from evals.isolation.worker import run_isolated
from evals.measure import machine
from evals.measure.clock import now
from evals.measure.memory import available_bytes, peak_allocated_bytes
from evals.results.formatting import aligned, filled
from evals.results.ids import digest
from evals.results.ledger import Ledger, Record

if TYPE_CHECKING:
    import pandas as pd

STEPS = 8
"""Lengths tried within a doubling: the longest is known to 2^(1/8), 9 %."""

MOST = 2**24
"""Tokens at which what still fits counts as without an end."""


def longest_fitting(fits: Callable[[int], bool], start: int, *, steps: int = STEPS, most: int = MOST) -> int | None:
    """The longest of the lengths start · 2^(i/steps), i any integer, rounded, that fits; None if not even 1 does.

    What is longer than a length that does not fit is taken not to fit. Doubles from `start`, or halves where that does
    not fit, then bisects; stops beyond `most`.
    """

    def length(index: int) -> int:
        return max(1, round(start * 2 ** (index / steps)))

    low = 0
    if fits(start):
        while length(low) <= most and fits(length(low + steps)):
            low += steps
        if length(low) > most:
            return length(low)
    else:
        while True:
            if length(low) == 1:
                return None
            low -= steps
            if fits(length(low)):
                break
    high = low + steps
    while high - low > 1:
        middle = (low + high) // 2
        if fits(length(middle)):
            low = middle
        else:
            high = middle
    return length(low)


class ContextSearch:
    """Works off a comparison with `search: max_context`, from its seq_len on. What `ledger` holds is not tried again."""

    kind = "search"

    def __init__(self, comparison: Comparison, ledger: Ledger, certificates: Ledger) -> None:
        self.comparison = comparison
        self.ledger = ledger
        sampling = comparison.sampling
        # What a variant needs to be certified has nothing to do with this limit.
        unlimited = replace(comparison, sampling=replace(sampling, memory_limit_gib=None))
        self.engine = Engine(unlimited, ledger, certificates)
        gib = sampling.memory_limit_gib
        self.id = digest([self.engine.id, gib, modules_digest("evals.benchmark.max_context")])
        most = int(0.8 * available_bytes())
        self.allowed_bytes = most if gib is None else int(gib * 2**30)
        self.stopped_at_bytes = min(most, 2 * self.allowed_bytes + 2**30)  # what exceeds the limit is still measured

    def outlook(self) -> tuple[int, float | None]:
        """How many lengths were tried already; and of how long the others take no one knows."""
        return sum(record.get("search") == self.id and record["kind"] == "probe" for record in self.ledger.read()[0]), None

    def run(self, watch: Watch) -> Iterator[Record]:
        """Yields every record as soon as it is in the ledger."""
        with exclusive_lock(self.comparison.device.kind):
            yield self._kept(self.description())
            for index, candidate in enumerate(self.comparison.candidates):
                yield from self._search(candidate, partial(self._tell, watch, candidate, index))

    def _tell(self, watch: Watch, candidate: Candidate, index: int, words: str) -> None:
        watch(f"{candidate.name}: {words}", index / len(self.comparison.candidates))

    def _search(self, candidate: Candidate, tell: Callable[[str], None]) -> list[Record]:
        """Everything about one candidate that the ledger does not hold yet."""
        known = {record["seq_len"]: record for record in self.ledger.read()[0] if self._is_of(record, candidate)}
        made: list[Record] = []

        def fits(seq_len: int) -> bool:
            if seq_len not in known:
                tell(f"{seq_len} tokens")
                known[seq_len] = self._kept(self._try(candidate, seq_len))
                made.append(known[seq_len])
            return bool(known[seq_len]["outcome"] == "ok")

        if not known:
            tell("certificate")
            certified = self.engine.preflight.certified(candidate)
            if certified.outcome != "ok":
                known[0] = self._kept(self._probe(candidate, 0, certified.outcome, certified.detail))
                made.append(known[0])
        if 0 not in known:
            longest_fitting(fits, self.comparison.shape.seq_len)
        return made

    def _is_of(self, record: Record, candidate: Candidate) -> bool:
        return (record.get("kind"), record.get("search"), record.get("attention")) == ("probe", self.id, candidate.name)

    def _kept(self, record: Record) -> Record:
        self.ledger.append(record)
        return record

    def description(self) -> Record:
        comparison = self.comparison
        settings = {key: value for key, value in comparison.settings.items() if key != "seq_len"}
        return {
            "kind": "search",
            "search": self.id,
            "sweep": comparison.sweep,
            "settings": {**settings, "processor": self.engine.processor, "torch": torch.__version__},
            "candidates": {candidate.name: candidate.node for candidate in comparison.candidates},
            "limit_bytes": self.allowed_bytes,
            "timeout_s": comparison.sampling.timeout_s,
            "provenance": machine.provenance(comparison.device.kind),
            "time": now(),
        }

    def _try(self, candidate: Candidate, seq_len: int) -> Record:
        shape = replace(self.comparison.shape, seq_len=seq_len)
        result = run_isolated(
            peak,
            replace(self.comparison, shape=shape),
            candidate,
            timeout_s=self.comparison.sampling.timeout_s,
            memory_limit_bytes=self.stopped_at_bytes,
        )
        if result.outcome != "ok":
            return self._probe(candidate, seq_len, result.outcome, result.detail)
        if result.value > self.allowed_bytes:
            words = f"needs {result.value / 2**20:.1f} MiB, allowed are {self.allowed_bytes / 2**20:.1f}"
            return self._probe(candidate, seq_len, "limit", words, result.value)
        return self._probe(candidate, seq_len, "ok", "", result.value)

    def _probe(self, candidate: Candidate, seq_len: int, outcome: str, detail: str, peak_bytes: int | None = None) -> Record:
        return {
            "kind": "probe",
            "search": self.id,
            "attention": candidate.name,
            "seq_len": seq_len,
            "outcome": outcome,
            "detail": detail,
            "peak_bytes": peak_bytes,
            "time": now(),
        }


def peak(comparison: Comparison, candidate: Candidate) -> int:
    """Bytes that are allocated at once, at most, from the weights to the end of the first call."""
    return peak_allocated_bytes(lambda: prepare(comparison, candidate).call(), comparison.device.kind)


# --- at read time -------------------------------------------------------------------------------


def results(records: Sequence[Record]) -> "pd.DataFrame":
    """One row a candidate of every search in a ledger: the longest length that fits, the next one tried that does not, and why.

    outcome: ok; the first length's own where none fits; uncertified; unsupported. Of a search that is not through, what it has.
    """
    import pandas as pd  # not before: it takes half a second, for which the first measurement would have to wait

    from evals.results.schema import columns

    described = {record["search"]: record for record in records if record.get("kind") == "search"}
    probes = [record for record in records if record.get("kind") == "probe"]
    lost = {record["search"]: record for record in records if record.get("kind") == "lost" and "search" in record}
    described |= {key: record["described"] for key, record in lost.items() if key not in described}
    rows: list[dict[str, Any]] = []
    for key, description in described.items():
        for name in description["candidates"]:
            own = [record for record in probes if (record["search"], record["attention"]) == (key, name)]
            if not own and key in lost:
                own = [{"seq_len": 0, "outcome": "lost", "detail": lost[key]["detail"]}]
            if own:
                row = {"sweep": description["sweep"], "attention": name, "limit_bytes": description["limit_bytes"]}
                rows.append(row | description["settings"] | _found(own))
    known = columns("max_context")
    extra = {column: None for row in rows for column in row if column not in known}
    return pd.DataFrame(rows, columns=[*known, *extra])


def _found(probes: Sequence[Record]) -> dict[str, Any]:
    fitting = max((one for one in probes if one["outcome"] == "ok"), key=lambda one: int(one["seq_len"]), default=None)
    failing = min((one for one in probes if one["outcome"] != "ok"), key=lambda one: int(one["seq_len"]), default=None)
    row: dict[str, Any] = {"outcome": "ok" if fitting else failing["outcome"] if failing else "ok", "detail": ""}
    if fitting:
        row |= {"max_context": fitting["seq_len"], "peak_bytes": fitting["peak_bytes"]}
    if failing:
        row["detail"] = failing["detail"]
        if failing["seq_len"]:  # not what kept it from being tried at all
            row |= {"next_seq_len": failing["seq_len"], "next_outcome": failing["outcome"]}
    return row


def shown(table: "pd.DataFrame") -> str:
    """The table as text: attentions down, longest context first."""
    ordered = table.sort_values("max_context", ascending=False)
    tokens = [f"{one:.0f}" if one > 0 else "none" for one in ordered["max_context"]]
    held = [f"{one / 2**20:.1f}" if one > 0 else "" for one in ordered["peak_bytes"]]
    lines = aligned(["longest context", *ordered["attention"]], [["tokens", *tokens], ["peak MiB", *held]])
    next_lengths = [
        filled(f"{row['attention']} at the next length: {row['detail']}") for _, row in ordered.iterrows() if row["detail"]
    ]
    return "\n\n".join([lines, *(["\n".join(next_lengths)] if next_lengths else [])])
