"""The longest sequence that fits a memory limit, for each candidate: found by bisection, each length tried once.

What has to fit is everything: weights, inputs, whatever the workload prepares (a state, an optimizer), and its call.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from evals.benchmark.certificates import Certificates
from evals.benchmark.engine import HARNESS
from evals.benchmark.job import Job, ProgressCallback
from evals.benchmark.workloads import prepare
from evals.config import Candidate, Comparison
from evals.isolation.locks import exclusive_lock
from evals.isolation.worker import run_isolated
from evals.measure.memory import available_bytes, peak_allocated_bytes
from evals.results.formatting import align_columns, wrap
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


class ContextSearch(Job):
    """Searches, for each candidate of a comparison with `search: max_context`, the longest sequence that fits."""

    kind = "search"

    def __init__(self, comparison: Comparison, ledger: Ledger, certificates: Certificates) -> None:
        super().__init__(comparison, ledger, certificates)
        self.settings.pop("seq_len", None)  # it is what is searched
        sampling = comparison.sampling
        limits = [sampling.timeout_s, sampling.memory_limit_gib, sampling.time_slice_s, sampling.seed]
        self.id = self.measurement_digest(*HARNESS, "evals.benchmark.max_context", limits=limits)
        available = int(0.8 * available_bytes())
        gib = sampling.memory_limit_gib
        self.limit_bytes = available if gib is None else int(gib * 2**30)
        self.stopped_at_bytes = min(available, 2 * self.limit_bytes + 2**30)  # what exceeds the limit is still measured

    def run(self, report: ProgressCallback) -> Iterator[Record]:
        with exclusive_lock(self.comparison.device.kind):
            yield self.append(self.description())
            for index, candidate in enumerate(self.comparison.candidates):
                yield from self._search(candidate, partial(self._report, report, candidate, index))

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
        return super().description() | {
            "limit_bytes": self.limit_bytes,
            "timeout_s": self.comparison.sampling.timeout_s,
        }

    def _report(self, report: ProgressCallback, candidate: Candidate, index: int, words: str) -> None:
        report(f"{candidate.name}: {words}", index / len(self.comparison.candidates))

    def _search(self, candidate: Candidate, report: Callable[[str], None]) -> list[Record]:
        """Probes one candidate where the ledger does not know the result; returns the new records."""
        known = self._known_probes(candidate)
        made: list[Record] = []

        def add(record: Record) -> None:
            known[record["seq_len"]] = record
            made.append(self.append(record))

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
        return made

    def _probe(self, candidate: Candidate, seq_len: int) -> Record:
        """Makes one call at one length, in a process of its own."""
        shape = replace(self.comparison.shape, seq_len=seq_len)
        result = run_isolated(
            peak,
            replace(self.comparison, shape=shape),
            candidate,
            timeout_s=self.comparison.sampling.timeout_s,
            memory_limit_bytes=self.stopped_at_bytes,
        )
        if result.outcome != "ok":
            return self._probe_record(candidate, seq_len, result.outcome, result.detail)
        if result.value > self.limit_bytes:
            detail = f"needs {result.value / 2**20:.1f} MiB, allowed are {self.limit_bytes / 2**20:.1f}"
            return self._probe_record(candidate, seq_len, "limit", detail, result.value)
        return self._probe_record(candidate, seq_len, "ok", "", result.value)

    def _probe_record(self, candidate: Candidate, seq_len: int, outcome: str, detail: str, peak_bytes: int | None = None) -> Record:
        values = {"attention": candidate.name, "seq_len": seq_len, "outcome": outcome, "detail": detail, "peak_bytes": peak_bytes}
        return self.record("probe", **values)


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
    lines = align_columns(["longest context", *ordered["attention"]], [["tokens", *tokens], ["peak MiB", *held]])
    next_lengths = [
        wrap(f"{row['attention']} at the next length: {row['detail']}") for _, row in ordered.iterrows() if row["detail"]
    ]
    return "\n\n".join([lines, *(["\n".join(next_lengths)] if next_lengths else [])])
