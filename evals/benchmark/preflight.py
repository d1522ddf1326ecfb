"""What is found out about a candidate before it is timed: whether it is certified, what it declares and what it holds."""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import torch

from evals.benchmark.code_hash import modules_digest
from evals.benchmark.cost import candidate_costs
from evals.benchmark.workloads import prepare
from evals.certification.certificate import certify_isolated
from evals.config import Candidate, Comparison
from evals.isolation.affinity import core_count
from evals.isolation.worker import Result, Worker
from evals.measure.clock import Stopwatch, now
from evals.measure.memory import available_bytes, cuda_peak_memory, peak_allocated_bytes, process_peak_bytes
from evals.results.ids import digest
from evals.results.ledger import Ledger, Record

CERTIFICATE = tuple(
    f"evals.certification.{name}"
    for name in ("certificate", "checks", "cost_checks", "output_checks", "parity_check", "streaming_check", "subject")
)

CERTIFICATE_S = 5.0
"""About what a certificate takes, for planning ahead."""

_inconclusive: list[Record] = []
"""Certificates that were not finished: another day they may be, so that only this command remembers them."""


class Preflight:
    """`code`: of each candidate, a digest. `certificates` remembers which code was certified and how that came out."""

    def __init__(self, comparison: Comparison, code: dict[str, str], certificates: Ledger, memory_limit_bytes: int) -> None:
        self.comparison = comparison
        self.code = code
        self.certificates = certificates
        self.memory_limit_bytes = memory_limit_bytes

    def run(self, candidates: Sequence[Candidate]) -> Iterator[Record]:
        """A record each, in the order in which they are done: each on a core of its own, since nothing is timed meanwhile."""
        # Certificates of long blocks take longest and come first, behind the quickest one: the user sees a row soon.
        with torch.device("meta"):
            lengths = {one.name: one.build(self.comparison.model).block_length for one in candidates}
        pool = ThreadPoolExecutor(core_count())
        try:
            longest_first = sorted(candidates, key=lambda one: -lengths[one.name])
            order = longest_first[-1:] + longest_first[:-1]
            for future in as_completed([pool.submit(self._made, one) for one in order]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _made(self, candidate: Candidate) -> Record:
        record = {"attention": candidate.name, "outcome": "ok", "detail": ""}
        certified = self.certified(candidate)
        if certified.outcome != "ok":
            return record | {"outcome": certified.outcome, "detail": certified.detail}
        limit_s = self.comparison.sampling.timeout_s
        with Worker(measure_costs, self.comparison, candidate, memory_limit_bytes=self.memory_limit_bytes) as worker:
            declared = worker.result(limit_s)  # which runs the attention's own code, too
            if declared.outcome != "ok":
                return record | {"outcome": declared.outcome, "detail": declared.detail}
            held = worker.ask(None, limit_s)
        if held.outcome != "ok":
            record["detail"] = f"peak memory is unknown ({held.outcome}): {held.detail}"
        return {**record, **declared.value, **(held.value or {})}

    def certified(self, candidate: Candidate) -> Result:
        """ok; uncertified, with what the certificate of this code says against it; unsupported where none can be made here."""
        key = self._key(candidate)
        for record in [*self.certificates.read()[0], *_inconclusive]:
            if record.get("key") == key:
                return Result("uncertified" if record["failure"] else "ok", detail=str(record["failure"]))
        device = self.comparison.device
        limit = int(0.8 * available_bytes() / core_count())  # as many may run at once
        result = certify_isolated(partial(candidate.build, self.comparison.model), device.kind, device.torch_dtype, limit)
        if result.outcome == "unsupported":
            return Result("unsupported", detail=result.detail)
        if result.outcome == "ok":
            words = next((f"{finding.check}: {finding.detail}" for finding in result.value if not finding.passed), "")
        else:
            words = f"the certificate ended as {result.outcome}: {result.detail}"
        record = {"key": key, "attention": candidate.name, "failure": words, "time": now()}
        if result.outcome == "ok":
            self.certificates.append(record)
        else:
            _inconclusive.append(record)
        return Result("uncertified" if words else "ok", detail=words)

    def seconds(self, candidates: Sequence[Candidate]) -> float:
        """About how long their certificates would take that there are not yet."""
        known = {record.get("key") for record in self.certificates.read()[0]}
        return CERTIFICATE_S * sum(self._key(one) not in known for one in candidates) / core_count()

    def _key(self, candidate: Candidate) -> str:
        model, device = self.comparison.model, self.comparison.device
        what = [candidate.node, self.code[candidate.name], model.hidden_dim, model.num_heads, modules_digest(*CERTIFICATE)]
        # Kernels that run only there are certified in its precision.
        return digest(what if device.kind == "cpu" else [*what, device.kind, device.dtype])


# --- in a child process -------------------------------------------------------------------------


def measure_costs(comparison: Comparison, candidate: Candidate) -> Generator[dict[str, Any], None, None]:
    """What it declares, found without data; then what it holds. It has not worked in this process before that."""
    yield candidate_costs(comparison, candidate)
    yield measure_memory(comparison, candidate)


def measure_memory(comparison: Comparison, candidate: Candidate) -> dict[str, Any]:
    work, _, _, counted = prepare(comparison, candidate)
    watch = Stopwatch()
    if comparison.device.kind == "cuda":
        peak = cuda_peak_memory(work)
        held: dict[str, Any] = {"peak_bytes": peak.allocated_bytes, "process_peak_bytes": peak.reserved_bytes}
    else:  # in this order: the first asks for a process that has not worked yet
        held = {"process_peak_bytes": process_peak_bytes(work), "peak_bytes": peak_allocated_bytes(work)}
    return {**held, "called_s": watch.seconds(), **counted(), "impl": implementation(comparison, candidate)}


@torch.no_grad()
def implementation(comparison: Comparison, candidate: Candidate) -> str:
    """Which of its implementations the attention runs on this device, in this precision, for this length."""
    device = comparison.device
    attention = candidate.build(comparison.model).to(device.kind, device.torch_dtype).eval()
    # Two blocks are as good as many.
    time = min(comparison.shape.seq_len, 2 * attention.block_length)
    tokens = torch.zeros(1, time, comparison.model.hidden_dim, device=device.kind, dtype=device.torch_dtype)
    return attention.implementation(*attention.project(tokens))
