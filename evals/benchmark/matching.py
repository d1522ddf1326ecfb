"""`match=params`: gives every candidate the feed-forward width at which a layer has as many parameters as the reference's."""

from dataclasses import replace

import torch

from bsbr.model import TransformerLayer
from evals.config import Candidate, Comparison, Model
from evals.errors import UsageError
from evals.results.unmatched import MATCHED_WITHIN


def match_parameters(comparison: Comparison) -> Comparison:
    """Chooses each candidate's ff_dim so that its layer has as many parameters as that of the reference, within 1 %.

    The reference keeps `model.ff_dim`.

    Raises:
        UsageError: if there is no feed-forward part, no reference, or no such ff_dim.
    """
    model = comparison.model
    if model.scope == "attention":
        raise UsageError("match=params equalises parameters through ff_dim, which needs model.scope=layer or model, got attention")
    reference = next((one for one in comparison.candidates if one.name == comparison.relative_to), None)
    if reference is None:
        raise UsageError(f"match=params needs the attention relative_to='{comparison.relative_to}' among those compared")
    target = count_layer_parameters(reference, model, model.ff_dim)
    candidates = []
    for one in comparison.candidates:
        narrowest = count_layer_parameters(one, model, 1)
        step = count_layer_parameters(one, model, 2) - narrowest
        ff_dim = model.ff_dim if one == reference else max(1, 1 + round((target - narrowest) / step))
        closest = narrowest + (ff_dim - 1) * step
        if abs(closest - target) > MATCHED_WITHIN * target:
            raise UsageError(
                f"match=params cannot bring a layer of '{one.name}' within {MATCHED_WITHIN:.0%} of the {target:,} parameters of "
                f"'{reference.name}': closest is {closest:,}, at ff_dim={ff_dim}; raise model.ff_dim, or leave '{one.name}' out"
            )
        candidates.append(replace(one, ff_dim=ff_dim))
    return replace(comparison, candidates=tuple(candidates))


def count_layer_parameters(candidate: Candidate, model: Model, ff_dim: int) -> int:
    """Number of parameters of one decoder layer with a candidate's attention."""
    with torch.device("meta"):
        layer = TransformerLayer(
            model.hidden_dim, model.num_heads, ff_dim, attention=lambda **_: candidate.build(model), conv_size=model.conv_size
        )
    return sum(parameter.numel() for parameter in layer.parameters())
