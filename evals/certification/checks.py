"""What the certificate checks. A check takes a `Subject` and returns what broke where, in words, or None.

The checks know nothing of a variant but the contract in `bsbr.interface`. They look where blockwise code
breaks: at one token, at a block and one token to either side, and at three blocks and an odd rest.
"""

from collections.abc import Callable

from evals.certification.cost_checks import flops, memory, state_size
from evals.certification.output_checks import batch, causality, contract, determinism, finite, padding
from evals.certification.parity_check import parity
from evals.certification.streaming_check import streaming
from evals.certification.subject import Subject

CHECKS: tuple[Callable[[Subject], str | None], ...] = (
    determinism, contract, causality, padding, streaming, parity, batch, finite, memory, flops, state_size,
)  # fmt: skip
"""Causes before their consequences: what draws random numbers is no function, and fails most of the others too."""

NEEDS_GRAD = frozenset({causality, parity, finite, memory})
