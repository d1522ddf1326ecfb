"""Runs all checks on an attention, here or in a child process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from evals.certification.checks import CHECKS
from evals.certification.subject import Build, Subject
from evals.errors import one_sentence
from evals.isolation.worker import Result, run_isolated

TIMEOUT_S = 300.0
"""A variant with the default block length takes seconds; blocks of thousands of tokens take minutes."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    detail: str  # what failed and where; empty if it passed

    @property
    def passed(self) -> bool:
        return not self.detail

    def __str__(self) -> str:
        return f"{self.check}: {self.detail}"


def certify(build: Build, device: str = "cpu", finest: torch.dtype = torch.float64) -> list[Finding]:
    """Runs every check on the attention that `build` makes.

    Without a `reference` the intended function is unknown. The attention is still checked to be causal, padding-invariant,
    finite, the same when streamed, batched and repeated, precise in float32 and true in its costs, and its gradient is compared
    with its slope. An off-by-one window would pass, or a state that is a scalar product k·v.

    Args:
        build: makes the attention; it is called several times.
        device: cpu or cuda.
        finest: the most precise dtype of the attention's kernels.

    Raises:
        NotImplementedError: if the attention does not run on this device or in this precision.
    """
    subject = Subject(build, device, finest)
    findings = []
    for check in CHECKS:
        with _one_thread(), torch.set_grad_enabled(check.needs_grad):
            try:
                detail = check.function(subject) or ""
            except NotImplementedError:
                raise
            except Exception as error:  # noqa: BLE001  the attention may be anybody's code: every exception is a finding
                detail = f"raised {type(error).__name__}: {one_sentence(error)}"
        findings.append(Finding(check.name, detail))
    return findings


def certify_isolated(build: Build, device: str, dtype: torch.dtype, memory_limit_bytes: int) -> Result[list[Finding]]:
    """Runs `certify` in a child process: an attention without a certificate may hang, crash or take all memory.

    It runs on the CPU in float64. If the kernels run only on the GPU, all checks run there in `dtype`, and see no error below its
    rounding. Not yet run on a GPU.
    """
    limits: dict[str, Any] = {"timeout_s": TIMEOUT_S, "memory_limit_bytes": memory_limit_bytes}
    result = run_isolated(certify, build, **limits)
    if result.outcome == "unsupported" and device != "cpu":
        result = run_isolated(certify, build, device, dtype, **limits)
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread: on a busy machine, threads that share a small product mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
