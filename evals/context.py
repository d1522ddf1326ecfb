"""The longest sequence that fits a memory limit, for each contestant: found by bisection, each length tried once.

What has to fit is everything: weights, inputs, whatever the workload prepares (a state, an optimizer), and its call.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from evals import machine
from evals.cells import aligned, filled
from evals.config import Comparison, Contestant, digest
from evals.engine import Engine, Watch
from evals.ledger import Ledger, Record
from evals.measure import available_bytes, now, peak_allocated_bytes
from evals.trials import source
from evals.worker import alone, run_isolated
from evals.workloads import prepare

if TYPE_CHECKING:
    import pandas as pd

STEPS = 8
"""Lengths tried within a doubling: the longest is known to 2^(1/8), 9 %."""

MOST = 2**24
"""Tokens at which what still fits counts as without an end."""


def search(fits: Callable[[int], bool], start: int, *, steps: int = STEPS, most: int = MOST) -> int | None:
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


class Search:
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
        self.id = digest([self.engine.id, gib, source("context.py")])
        most = int(0.8 * available_bytes())
        self.allowed_bytes = most if gib is None else int(gib * 2**30)
        self.stopped_at_bytes = min(most, 2 * self.allowed_bytes + 2**30)  # what exceeds the limit is still measured

    def outlook(self) -> tuple[int, float | None]:
        """How many lengths were tried already; and of how long the others take no one knows."""
        return sum(record.get("search") == self.id and record["kind"] == "probe" for record in self.ledger.read()[0]), None

    def run(self, watch: Watch) -> Iterator[Record]:
        """Yields every record as soon as it is in the ledger."""
        with alone(self.comparison.device.kind):
            yield self._kept(self.description())
            for index, contestant in enumerate(self.comparison.contestants):
                yield from self._search(contestant, partial(self._tell, watch, contestant, index))

    def _tell(self, watch: Watch, contestant: Contestant, index: int, words: str) -> None:
        watch(f"{contestant.name}: {words}", index / len(self.comparison.contestants))

    def _search(self, contestant: Contestant, tell: Callable[[str], None]) -> list[Record]:
        """Everything about one contestant that the ledger does not hold yet."""
        known = {record["seq_len"]: record for record in self.ledger.read()[0] if self._is_of(record, contestant)}
        made: list[Record] = []

        def fits(seq_len: int) -> bool:
            if seq_len not in known:
                tell(f"{seq_len} tokens")
                known[seq_len] = self._kept(self._try(contestant, seq_len))
                made.append(known[seq_len])
            return bool(known[seq_len]["outcome"] == "ok")

        if not known:
            tell("certificate")
            certified = self.engine.trials.certified(contestant)
            if certified.outcome != "ok":
                known[0] = self._kept(self._probe(contestant, 0, certified.outcome, certified.detail))
                made.append(known[0])
        if 0 not in known:
            search(fits, self.comparison.shape.seq_len)
        return made

    def _is_of(self, record: Record, contestant: Contestant) -> bool:
        return (record.get("kind"), record.get("search"), record.get("attention")) == ("probe", self.id, contestant.name)

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
            "contestants": {contestant.name: contestant.node for contestant in comparison.contestants},
            "limit_bytes": self.allowed_bytes,
            "timeout_s": comparison.sampling.timeout_s,
            "provenance": machine.provenance(comparison.device.kind),
            "time": now(),
        }

    def _try(self, contestant: Contestant, seq_len: int) -> Record:
        shape = replace(self.comparison.shape, seq_len=seq_len)
        result = run_isolated(
            peak,
            replace(self.comparison, shape=shape),
            contestant,
            timeout_s=self.comparison.sampling.timeout_s,
            memory_limit_bytes=self.stopped_at_bytes,
        )
        if result.outcome != "ok":
            return self._probe(contestant, seq_len, result.outcome, result.detail)
        if result.value > self.allowed_bytes:
            words = f"needs {result.value / 2**20:.1f} MiB, allowed are {self.allowed_bytes / 2**20:.1f}"
            return self._probe(contestant, seq_len, "limit", words, result.value)
        return self._probe(contestant, seq_len, "ok", "", result.value)

    def _probe(self, contestant: Contestant, seq_len: int, outcome: str, detail: str, peak_bytes: int | None = None) -> Record:
        return {
            "kind": "probe",
            "search": self.id,
            "attention": contestant.name,
            "seq_len": seq_len,
            "outcome": outcome,
            "detail": detail,
            "peak_bytes": peak_bytes,
            "time": now(),
        }


def peak(comparison: Comparison, contestant: Contestant) -> int:
    """Bytes that are allocated at once, at most, from the weights to the end of the first call."""
    return peak_allocated_bytes(lambda: prepare(comparison, contestant).call(), comparison.device.kind)


# --- at read time -------------------------------------------------------------------------------

COLUMNS = (
    *("sweep", "attention", "outcome", "max_context", "peak_bytes", "limit_bytes", "next_seq_len", "next_outcome", "detail"),
    *("workload", "scope", "device", "dtype", "threads", "batch_size", "hidden_dim", "num_heads"),
)


def results(records: Sequence[Record]) -> "pd.DataFrame":
    """One row a contestant of every search in a ledger: the longest length that fits, the next one tried that does not, and why.

    outcome: ok; the first length's own where none fits; uncertified; unsupported. Of a search that is not through, what it has.
    """
    import pandas as pd  # not before: it takes half a second, for which the first measurement would have to wait

    described = {record["search"]: record for record in records if record.get("kind") == "search"}
    probes = [record for record in records if record.get("kind") == "probe"]
    lost = {record["search"]: record for record in records if record.get("kind") == "lost" and "search" in record}
    described |= {key: record["described"] for key, record in lost.items() if key not in described}
    rows: list[dict[str, Any]] = []
    for key, description in described.items():
        for name in description["contestants"]:
            own = [record for record in probes if (record["search"], record["attention"]) == (key, name)]
            if not own and key in lost:
                own = [{"seq_len": 0, "outcome": "lost", "detail": lost[key]["detail"]}]
            if own:
                row = {"sweep": description["sweep"], "attention": name, "limit_bytes": description["limit_bytes"]}
                rows.append(row | description["settings"] | _found(own))
    extra = {column: None for row in rows for column in row if column not in COLUMNS}
    return pd.DataFrame(rows, columns=[*COLUMNS, *extra])


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
