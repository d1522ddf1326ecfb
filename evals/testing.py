"""`check_attention`: the certificate of an attention as one line of its own test suite.

    from evals.testing import check_attention

    def test_my_attention_keeps_the_contract():
        check_attention(MyAttention, temperature=8.0)

It is here and not in `bsbr`, because the core imports nothing of the harness.
"""

from functools import partial
from typing import Any

import torch

from bsbr.interface import Attention
from evals.certification.certificate import badge, certify


def check_attention(
    attention: type[Attention],
    /,
    *,
    hidden_dim: int = 64,
    num_heads: int = 4,
    device: str = "cpu",
    runs_in: torch.dtype = torch.float64,
    timed_in: torch.dtype | None = None,
    **options: Any,
) -> str:
    """Runs all checks of the certificate on an attention, in this process; takes seconds.

    The checks run at lengths around the block of the attention (1, a block less 1, a block, a block and 1, three blocks and 7), so
    an option such as `chunk_size=16` makes them quick.

    Args:
        attention: a class that keeps the contract of `bsbr.Attention`; it may be defined anywhere, a test function included.
        hidden_dim, num_heads: the sizes with which it is built.
        device: cpu or cuda.
        runs_in: the most precise dtype that its kernels take.
        timed_in: a dtype that is checked in addition; only float16 adds checks.
        options: further arguments of its constructor.

    Returns:
        A line to quote, such as `certified: 14 checks, 54 configurations`.

    Raises:
        AssertionError: if a check fails. The message has a line for each failed check: what differs, where and by how much.
        NotImplementedError: if it does not run on this device or in this precision.
    """
    __tracebackhide__ = True  # pytest shows the line of the test, and the message
    findings = certify(partial(attention, hidden_dim=hidden_dim, num_heads=num_heads, **options), device, runs_in, timed_in)
    failures = [str(finding) for finding in findings if not finding.passed]
    if failures:
        raise AssertionError("\n".join([f"{attention.__qualname__} is not certified:", *(f"  {failure}" for failure in failures)]))
    return badge(findings)
