"""The reference's last outputs of a sequence that is too long for all of them."""

import torch
from torch import Tensor

from bsbr.interface import Attention

ROWS = 16


@torch.no_grad()
def last_reference_outputs(attention: Attention, hidden_states: Tensor, rows: int = ROWS) -> Tensor | None:
    """What `reference` returns for the last queries alone, which most references compute without the other queries.

    Whether one does is tried on a short sequence: a recurrence takes the last queries for the first.

    Args:
        attention: has the reference and the projections.
        hidden_states: [batch, time, hidden_dim].
        rows: number of queries.

    Returns:
        The last rows of what `attend` must return; None if there is no reference, or if it needs all queries.
    """
    if attention.reference is None:
        return None
    short = attention.project(hidden_states[:, : 3 * rows])
    whole = attention.reference(*short)
    try:
        last = _of_last_queries(attention, short, rows)
    except Exception:  # noqa: BLE001  anybody's code, called in a way that it need not support
        return None
    expected = whole[..., -rows:, :]
    if last.shape != expected.shape or not torch.allclose(last, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())):
        return None
    return _of_last_queries(attention, attention.project(hidden_states), rows)


def _of_last_queries(attention: Attention, tensors: tuple[Tensor, ...], rows: int) -> Tensor:
    assert attention.reference is not None
    return attention.reference(tensors[0][..., -rows:, :], *tensors[1:])
