"""The registry of all checks: the certificate, the help, the tables, the report and the documentation read it."""

from collections.abc import Callable
from dataclasses import dataclass

from evals.certification.conditions_check import conditions
from evals.certification.cost_checks import flops, memory, projections, retention, state_size
from evals.certification.output_checks import batch, causality, contract, determinism, finite, padding
from evals.certification.parity_check import parity
from evals.certification.streaming_check import streaming
from evals.certification.subject import Subject


@dataclass(frozen=True)
class Check:
    """One property that an attention must have."""

    name: str
    description: str
    function: Callable[[Subject], str | None]
    """Returns what failed and where, or None; raises NotImplementedError if the attention cannot run."""
    needs_grad: bool = False


CHECKS = (
    Check("determinism", "In eval mode the same input gives the same bits.", determinism),
    Check("contract", "Shapes, types and inputs are kept, and forward is output(attend(project(x))).", contract),
    Check("causality", "Output t does not depend on inputs after t, in value or in gradient.", causality, needs_grad=True),
    Check("padding", "Padding changes no other output, wherever it stands, and outputs at padding are 0.", padding),
    Check("streaming", "extend over any split of a sequence gives what forward gives, and changes no state.", streaming),
    Check("parity", "attend and its gradients equal those of the reference, in three precisions.", parity, needs_grad=True),
    Check("batch", "A sequence gives the same alone as in a batch.", batch),
    Check("finite", "Huge, tiny, zero and fully padded inputs give finite outputs and gradients.", finite, needs_grad=True),
    Check("conditions", "Gradients, training mode, threads, strides, copies and loaded weights change no output.", conditions),
    Check("retention", "A call keeps no memory but what it returns.", retention),
    Check("projections", "project and output cost what projections cost, and mix no tokens.", projections),
    Check("memory", "Peak memory grows as n^1.1 at most, forward and backward.", memory, needs_grad=True),
    Check("flops", "The declared FLOPs match the matrix products that run.", flops),
    Check("state_size", "state_bytes is what the state holds.", state_size),
)
"""Causes stand before their consequences: an attention that draws random numbers fails `determinism` and most others too."""
