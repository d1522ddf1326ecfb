"""TODO: what lives here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from evals.certification.checks import CHECKS, NEEDS_GRAD
from evals.certification.subject import Build, Subject
from evals.errors import one_sentence
from evals.isolation.worker import Result, run_isolated

TIMEOUT_S = 300.0
"""A variant with the blocks that ship takes seconds; blocks of thousands of tokens, minutes."""


@dataclass(frozen=True)
class Finding:
    """One check's outcome: `detail` says what broke where, and is empty if nothing did."""

    check: str
    detail: str

    @property
    def passed(self) -> bool:
        return not self.detail


def certify(build: Build, device: str = "cpu", finest: torch.dtype = torch.float64) -> Iterator[Finding]:
    """Runs every check on what `build` makes, one finding after the other.

    Without a `reference` no one can know which function was meant. What stays certain then: it is causal, deaf to
    padding, the same streamed, batched and repeated, finite, its gradient is its slope, float32 keeps its precision, and
    its claims about cost are true. So an off-by-one window would pass, or a state that is a scalar product k·v.
    Raises NotImplementedError where a check does: what does not run here is neither right nor wrong.
    """
    subject = Subject(build, device, finest)
    for check in CHECKS:
        with one_thread(), torch.set_grad_enabled(check in NEEDS_GRAD):
            try:
                detail = check(subject) or ""
            except NotImplementedError:
                raise
            except Exception as error:  # noqa: BLE001  the subject is anybody's code: whatever it raises is a finding
                detail = f"raised {type(error).__name__}: {one_sentence(error)}"
        yield Finding(check.__name__, detail)


@contextmanager
def one_thread() -> Iterator[None]:
    """On a busy machine threads that share a small matrix product wait for each other far longer than it takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def certify_isolated(build: Build, device: str, dtype: torch.dtype, memory_limit_bytes: int) -> Result:
    """The findings, from a process apart: on the CPU in float64, or where its kernels run only on the comparison's GPU, there.

    There all checks are made in the comparison's precision, and see no error below its rounding. Not yet run on a GPU.
    """
    limits: dict[str, Any] = {"timeout_s": TIMEOUT_S, "memory_limit_bytes": memory_limit_bytes}
    result = run_isolated(findings, build, **limits)
    if result.outcome == "unsupported" and device != "cpu":
        result = run_isolated(findings, build, device, dtype, **limits)
    return result


def findings(build: Build, device: str = "cpu", finest: torch.dtype = torch.float64) -> list[Finding]:
    return list(certify(build, device, finest))
