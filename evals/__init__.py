"""The harness: certifies, measures, summarises and draws attentions."""

import importlib.util

if importlib.util.find_spec("hydra") is None:
    raise ModuleNotFoundError(
        'evals needs packages that are not installed, such as hydra: pip install "bsbr[extras]", or ".[extras]" in a checkout',
        name="hydra",
    )

# A package of the same name holds the command. It is imported here and now, so that no later import can replace the function.
from evals.compare import compare, load

__all__ = ["compare", "load"]
