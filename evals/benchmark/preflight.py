"""The preflight of a candidate, before it is timed: its certificate, the cost that it declares, and the memory that it takes."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

import torch

from evals.benchmark.certificates import Certificates
from evals.benchmark.code_hash import modules_digest
from evals.benchmark.configuration_check import ConfigurationCheck
from evals.benchmark.cost import candidate_costs
from evals.benchmark.tolerance import precision
from evals.benchmark.workloads import prepare
from evals.certification.certificate import certify_isolated
from evals.config import Candidate, Comparison
from evals.isolation.affinity import core_count
from evals.isolation.worker import Result, Worker
from evals.measure.clock import Stopwatch
from evals.measure.gpu_status import marked
from evals.measure.memory import available_bytes, cuda_peak_memory, peak_allocated_bytes, process_peak_bytes
from evals.results.ids import digest
from evals.results.ledger import Record

CERTIFICATE = tuple(
    f"evals.certification.{name}"
    for name in (
        *("certificate", "checks", "conditions_check", "cost_checks", "output_checks", "parity_check"),
        *("reference_rows", "streaming_check", "subject"),
    )
)

CHECKED_CALLS = 8
"""Time limit for measuring the memory of a call and checking it, in time limits of one call."""

CERTIFICATE_S = 5.0
"""Typical duration of a certificate, for estimates."""


class Preflight:
    """Certifies the candidates of a comparison and measures their costs, in fresh processes."""

    def __init__(
        self, comparison: Comparison, code: Mapping[str, str], certificates: Certificates, memory_limit_bytes: int
    ) -> None:
        """Prepares the preflight; starts nothing. code: for each candidate, the digest of its attention's source code."""
        self.comparison = comparison
        self.code = code
        self.certificates = certificates
        self.memory_limit_bytes = memory_limit_bytes
        # Here and not in the threads of `run`: ast.parse of Python 3.11 fails if two threads parse at once.
        self.checks_digest = modules_digest(*CERTIFICATE)

    def run(self, candidates: Sequence[Candidate]) -> Iterator[Record]:
        """Makes the preflight of some candidates, as many at once as there are cores, since nothing is timed meanwhile.

        Yields:
            The fields of one preflight record per candidate, in the order in which they are done.
        """
        # Certificates of long blocks take longest and come first, behind the quickest one: the user sees a row soon.
        with torch.device("meta"):
            block_lengths = {one.name: one.build(self.comparison.model).block_length for one in candidates}
        at_once = max(1, min(core_count(), len(candidates)))
        pool = ThreadPoolExecutor(at_once)
        try:
            longest_first = sorted(candidates, key=lambda one: -block_lengths[one.name])
            order = longest_first[-1:] + longest_first[:-1]
            for future in as_completed([pool.submit(self._run_one, one, core_count() // at_once) for one in order]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _run_one(self, candidate: Candidate, thread_count: int) -> Record:
        record = {"attention": candidate.name, "outcome": "ok", "detail": ""}
        certificate = self.certify(candidate)
        if certificate.outcome != "ok":
            failed = {"outcome": certificate.outcome, "detail": certificate.detail}
            return {**record, **failed, "unfinished": self.has_tried(candidate)}
        timeout_s = self.comparison.sampling.timeout_s
        arguments = (self.comparison, candidate, thread_count)
        with Worker[None, Record](measure_costs, *arguments, memory_limit_bytes=self.memory_limit_bytes) as worker:
            declared = worker.result(timeout_s)  # this runs code of the attention, too
            if declared.outcome != "ok":
                return record | {"outcome": declared.outcome, "detail": declared.detail}
            measured = worker.ask(None, timeout_s)  # the first call
            if measured.outcome == "ok":
                measured = worker.ask(None, CHECKED_CALLS * timeout_s)
        if measured.outcome != "ok":
            return {**record, **declared.value, "outcome": measured.outcome, "detail": measured.detail}
        return {**record, **declared.value, **measured.value}

    def certify(self, candidate: Candidate) -> Result[None]:
        """Looks up the certificate of a candidate's code, or makes it.

        Returns:
            ok; uncertified, with what the certificate says against the code; or unsupported, if none can be made on this machine.
        """
        key = self._key(candidate)
        failure = self.certificates.failures().get(key)
        if failure is None:
            device = self.comparison.device
            memory_limit_bytes = int(0.8 * available_bytes() / core_count())  # so many may run at once
            build = partial(candidate.certified.build, self.comparison.model)
            result = certify_isolated(build, device.kind, device.torch_dtype, memory_limit_bytes)
            if result.outcome == "unsupported":
                return Result("unsupported", detail=result.detail)
            if result.outcome == "ok":
                failure = next((f"{finding.check}: {finding.detail}" for finding in result.value if not finding.passed), "")
            else:
                failure = f"the certificate ended as {result.outcome}: {result.detail}"
            self.certificates.add(key, candidate.name, failure, finished=result.outcome == "ok")
        return Result("uncertified" if failure else "ok", detail=failure)

    def has_tried(self, candidate: Candidate) -> bool:
        """Whether this command has tried to certify a candidate, and the certificate did not end."""
        return self.certificates.is_unfinished(self._key(candidate))

    def estimated_seconds(self, candidates: Sequence[Candidate]) -> float:
        """Estimated duration of the certificates that these candidates still lack."""
        known = self.certificates.failures()
        return CERTIFICATE_S * sum(self._key(one) not in known for one in candidates) / core_count()

    def _key(self, candidate: Candidate) -> str:
        model, device = self.comparison.model, self.comparison.device
        facts = [candidate.certified.node, self.code[candidate.name], model.hidden_dim, model.num_heads, self.checks_digest]
        # Kernels that run only on a GPU are certified there, in the comparison's precision; float16 has a check of its own.
        return digest(facts if device.kind == "cpu" and device.dtype != "float16" else [*facts, device.kind, device.dtype])


# --- in a child process -------------------------------------------------------------------------


def measure_costs(comparison: Comparison, candidate: Candidate, thread_count: int) -> Generator[Record, None, None]:
    """Yields the candidate's costs, computed without data; then what `measure_and_check` does, in a process that has not worked."""
    costs = candidate_costs(comparison, candidate)
    yield costs
    yield from measure_and_check(comparison, candidate, costs["flops"], thread_count)


def measure_and_check(comparison: Comparison, candidate: Candidate, flops: int, thread_count: int) -> Generator[Record, None, None]:
    """Measures the memory of two calls and checks what they return, in the configuration that will be timed.

    Must run in a process that has not worked before: `process_peak_bytes` needs that.

    Args:
        comparison, candidate: what is measured.
        flops: what a step declares.
        thread_count: of the checks, but for the calls that are checked.

    Yields:
        The first peak, after the first call. Then all peaks of memory, the seconds spent on both calls and on the check, the
        call's counts and its implementation, and what it was certified as; or the outcome uncertified and what is wrong.
    """
    prepared = prepare(comparison, candidate)
    work = prepared.work
    check = ConfigurationCheck(prepared, comparison, candidate)
    stopwatch = Stopwatch()
    peaks: Record
    if comparison.device.kind == "cuda":
        peak = cuda_peak_memory(check.first_call)
        peaks = {"peak_bytes": peak.allocated_bytes, "process_peak_bytes": peak.reserved_bytes}
        check.keep_first()
        yield peaks
        check.change_late_inputs()
        check.second_call()
    else:
        peaks = {"process_peak_bytes": process_peak_bytes(check.first_call)}
        check.keep_first()
        yield peaks
        check.change_late_inputs()
        peaks["peak_bytes"] = peak_allocated_bytes(check.second_call)
    called_s = stopwatch.seconds()
    failure = check.finding(flops, thread_count)
    yield {
        **peaks,
        "called_s": called_s,
        "checked_s": stopwatch.seconds() - called_s,
        **work.counted(),
        "impl": marked(implementation(comparison, candidate), comparison.device.kind),
        **({"outcome": "uncertified", "detail": failure} if failure else {}),
        "certified_as": "" if failure else check.certified_as(),
        "precision": precision(prepared.module, comparison),
    }


@torch.no_grad()
def implementation(comparison: Comparison, candidate: Candidate) -> str:
    """Name of the implementation that the attention runs on this device, in this precision, at this length."""
    device = comparison.device
    attention = candidate.build(comparison.model).to(device.kind, device.torch_dtype).eval()
    time = min(comparison.shape.seq_len, 2 * attention.block_length)  # two blocks run the same kernels as many
    tokens = torch.zeros(1, time, comparison.model.hidden_dim, device=device.kind, dtype=device.torch_dtype)
    return attention.implementation(*attention.project(tokens))
