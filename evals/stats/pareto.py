"""TODO: what lives here."""

from collections.abc import Sequence

import numpy as np

# --- who is beaten by nobody ----------------------------------------------------------------------


def pareto_front(points: Sequence[Sequence[float]], higher_is_better: Sequence[bool] = ()) -> list[bool]:
    """For each row of quantities, whether no other row is at least as good in all of them and better in one.

    Less is better, but where `higher_is_better` says True (recall). Equal rows stand or fall together. A row with a
    NaN is not on the front and beats nobody. Raises ValueError for rows of unlike length.
    """
    if not len(points):
        return []
    lengths = {len(row) for row in points} | ({len(higher_is_better)} if higher_is_better else set())
    if len(lengths) > 1:
        raise ValueError(f"every row, and higher_is_better, needs one entry a quantity, got lengths {sorted(lengths)}")
    values = np.array(points, dtype=np.float64)
    if higher_is_better:
        values = np.where(higher_is_better, -values, values)
    no_worse, better = values[None] <= values[:, None], values[None] < values[:, None]
    beaten = np.any(np.all(no_worse, axis=2) & np.any(better, axis=2), axis=1)
    return [bool(one) for one in ~beaten & ~np.isnan(values).any(axis=1)]
