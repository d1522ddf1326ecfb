"""The harness: certifies, measures, summarises and draws attentions."""

import importlib.util

if importlib.util.find_spec("hydra") is None:
    raise ModuleNotFoundError(
        'evals needs packages that are not installed, such as hydra: pip install "bsbr[extras]", or ".[extras]" in a checkout',
        name="hydra",
    )
