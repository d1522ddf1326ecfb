"""Costs that differ between the attentions of a comparison: parameters, FLOPs and state."""

from collections.abc import Mapping
from typing import Any

MATCHED_WITHIN = 0.01
"""Largest relative difference between two costs, or numbers of parameters, that count as the same."""
COSTS = {"parameter_bytes": "parameters", "flops": "FLOPs", "state_bytes": "state"}


def unmatched_costs(costs: Mapping[str, Mapping[str, Any]], relative_to: str) -> list[str]:
    """Lists the costs in which attentions differ by more than 1 %: 'parameters 1× to 1.5× (bsbr)'.

    Args:
        costs: the columns in COSTS of each attention.
        relative_to: the attention that has 1×; the first one if it is not in `costs`.
    """
    reference = costs.get(relative_to) or next(iter(costs.values()))
    differences = []
    for column, name in COSTS.items():
        ratios = {attention: costs[attention][column] / reference[column] for attention in costs if reference[column]}
        ends = [end(ratios, key=ratios.__getitem__) for end in (min, max)] if ratios else []
        unequal = [f"{ratios[end]:.2g}× ({end})" for end in ends if abs(ratios[end] - 1) > MATCHED_WITHIN]
        if unequal:
            differences.append(f"{name} {' to '.join(unequal if len(unequal) == 2 else ['1×', *unequal])}")
    return differences
