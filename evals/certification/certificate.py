"""Runs all checks on an attention, here or in a child process."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from evals.certification.checks import CHECKS
from evals.certification.subject import Build, Configuration, Subject, threads
from evals.errors import one_sentence
from evals.isolation.worker import Result, run_isolated

TIMEOUT_S = 300.0
"""A variant with the default block length takes seconds; blocks of thousands of tokens take minutes."""

CHECKS_OF_ROUNDING = ("padding", "streaming", "parity", "batch", "conditions")
"""They compare two orders of the same sums, so kernels that compute more coarsely than their tensors fail them."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    detail: str  # what failed and where; empty if it passed
    configurations: frozenset[Configuration] = frozenset()  # all that it used, up to a failure

    @property
    def passed(self) -> bool:
        return not self.detail

    def __str__(self) -> str:
        return f"{self.check}: {self.detail}"


def certify(
    build: Build, device: str = "cpu", runs_in: torch.dtype = torch.float64, timed_in: torch.dtype | None = None
) -> list[Finding]:
    """Runs every check on the attention that `build` makes.

    Without a `reference` the intended function is unknown. The attention is still checked to be causal, padding-invariant,
    finite, the same when streamed, batched and repeated, precise in float32 and true in its costs, and its gradient is compared
    with its slope. An off-by-one window would pass, or a state that is a scalar product k·v.

    Args:
        build: makes the attention; it is called several times.
        device: cpu or cuda.
        runs_in: the most precise dtype that the attention's kernels take.
        timed_in: the dtype in which it will be timed, if it is known.

    Raises:
        NotImplementedError: if the attention does not run on this device or in this precision.
    """
    subject = Subject(build, device, runs_in, timed_in)
    findings = []
    for check in CHECKS:
        subject.configurations.clear()
        # On a busy machine, threads that share a small product mostly wait for each other.
        with threads(1), torch.set_grad_enabled(check.needs_grad):
            try:
                detail = check.function(subject) or ""
            except NotImplementedError:
                raise
            except Exception as error:  # noqa: BLE001  the attention may be anybody's code: every exception is a finding
                detail = f"raised {type(error).__name__}: {one_sentence(error)}"
        findings.append(Finding(check.name, detail, frozenset(subject.configurations)))
    return _with_advice(findings, subject)


def _with_advice(findings: list[Finding], subject: Subject) -> list[Finding]:
    """Adds to failures of rounding how to declare that the kernels compute in float32, if that is what the outputs show."""
    advice = (
        "attend gives float32 numbers for float64 tensors: if its kernels compute in float32, declare computes_in = torch.float32"
    )
    failed = [finding for finding in findings if finding.detail and finding.check in CHECKS_OF_ROUNDING]
    if not failed or not _shows_float32(subject):
        return findings
    return [replace(one, detail=f"{one.detail}; {advice}") if one in failed else one for one in findings]


def _shows_float32(subject: Subject) -> bool:
    """Whether all that `attend` returns for float64 tensors are numbers that float32 holds exactly."""
    if subject.finest != torch.float64:
        return False
    try:
        with threads(1), torch.no_grad():
            attended = subject.attention.attend(*subject.attention.project(subject.inputs(subject.lengths[-1])))
    except Exception:  # noqa: BLE001  the attention may be anybody's code, and a check has reported this already
        return False
    return bool(attended.isfinite().all()) and torch.equal(attended.float().double(), attended.double())


def certify_isolated(build: Build, device: str, dtype: torch.dtype, memory_limit_bytes: int) -> Result[list[Finding]]:
    """Runs `certify` in a child process: an attention without a certificate may hang, crash or take all memory.

    It runs on the CPU in float64. If the kernels run only on the GPU, all checks run there in `dtype`, and see no error below its
    rounding. Not yet run on a GPU.
    """
    limits: dict[str, Any] = {"timeout_s": TIMEOUT_S, "memory_limit_bytes": memory_limit_bytes}
    result = run_isolated(certify, build, "cpu", torch.float64, dtype, **limits)
    if result.outcome == "unsupported" and device != "cpu":
        result = run_isolated(certify, build, device, dtype, dtype, **limits)
    return result


def badge(findings: list[Finding]) -> str:
    """One line to quote: how many checks passed, on how many configurations; or which failed."""
    failed = [finding.check for finding in findings if not finding.passed]
    if failed:
        return f"not certified: {', '.join(failed)} failed"
    configurations = frozenset().union(*(finding.configurations for finding in findings))
    return f"certified: {len(findings)} checks, {len(configurations)} configurations"
