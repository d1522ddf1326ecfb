"""Comparison of a timed call with an untimed one, which another process makes: it has timed nothing and is told nothing."""

from pathlib import Path

import torch

from evals.benchmark.tolerance import allowed_rounding, copies, value_difference
from evals.benchmark.workloads import Prepared, prepare
from evals.certification.subject import dropouts
from evals.config import Candidate, Comparison


def keep_call(path: Path, prepared: Prepared, returned: object) -> None:
    """Writes what a call read and returned to a file, with the weights; writes nothing if its outputs are random or unknown."""
    returned = copies(returned)  # at once: work that goes on in the background must not be finished meanwhile
    module = prepared.module
    if prepared.work.outputs is None or (module.training and any(probability for *_, probability in dropouts(module))):
        return
    torch.save({"read": prepared.read.detach(), "returned": returned, "weights": module.state_dict()}, path)


def difference_from_untimed(comparison: Comparison, candidate: Candidate, path: Path, threads: int) -> str:
    """How what a timed call returned differs from what this process returns for the same input and weights.

    Args:
        comparison, candidate: what was timed.
        path: a file of `keep_call`; without it nothing is compared.
        threads: of this process, which others of its kind may run beside.

    Returns:
        The difference; empty if there is none but rounding.
    """
    if not path.exists():
        return ""
    kept = torch.load(path)
    prepared = prepare(comparison, candidate)
    torch.set_num_threads(threads)
    prepared.module.load_state_dict(kept["weights"])
    with torch.no_grad():
        prepared.read.copy_(kept["read"])
    prepared.work.refresh()
    return value_difference(kept["returned"], prepared.work.call(), allowed_rounding(prepared.module, comparison))
