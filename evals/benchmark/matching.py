"""TODO: what lives here."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from bsbr.model import TransformerLayer
from evals.config import Candidate, Comparison, Model
from evals.errors import UsageError
from evals.results.unmatched import MATCHED_WITHIN

if TYPE_CHECKING:
    pass


# --- the same number of parameters --------------------------------------------------------------


def match_parameters(comparison: Comparison) -> Comparison:
    """Every candidate with the ff_dim at which a layer of it has the parameters of the reference's, within 1 %.

    Raises UsageError where there is no feed-forward part, no reference, or no such ff_dim.
    """
    model = comparison.model
    if model.scope == "attention":
        raise UsageError("match=params equalises parameters through ff_dim, which needs model.scope=layer or model, got attention")
    reference = next((one for one in comparison.candidates if one.name == comparison.relative_to), None)
    if reference is None:
        raise UsageError(f"match=params needs the attention relative_to='{comparison.relative_to}' among those compared")
    target = layer_parameters(reference, model, model.ff_dim)
    candidates = []
    for one in comparison.candidates:
        least = layer_parameters(one, model, 1)
        step = layer_parameters(one, model, 2) - least
        ff_dim = model.ff_dim if one == reference else max(1, 1 + round((target - least) / step))
        closest = least + (ff_dim - 1) * step
        if abs(closest - target) > MATCHED_WITHIN * target:
            raise UsageError(
                f"match=params cannot bring a layer of '{one.name}' within {MATCHED_WITHIN:.0%} of the {target:,} parameters of "
                f"'{reference.name}': closest is {closest:,}, at ff_dim={ff_dim}; raise model.ff_dim, or leave '{one.name}' out"
            )
        candidates.append(replace(one, ff_dim=ff_dim))
    return replace(comparison, candidates=tuple(candidates))


def layer_parameters(candidate: Candidate, model: Model, ff_dim: int) -> int:
    with torch.device("meta"):
        layer = TransformerLayer(
            model.hidden_dim, model.num_heads, ff_dim, attention=lambda **_: candidate.build(model), conv_size=model.conv_size
        )
    return sum(parameter.numel() for parameter in layer.parameters())
