"""The Pareto front: the candidates that no other candidate beats in every quantity."""

from collections.abc import Sequence

import numpy as np


def pareto_front(points: Sequence[Sequence[float]], higher_is_better: Sequence[bool] = ()) -> list[bool]:
    """For each row of quantities, whether no other row is at least as good in all of them and better in one.

    Args:
        points: one row a candidate, one column a quantity. Equal rows are on the front together or not at all. A row with a NaN
            is not on the front and beats no other.
        higher_is_better: for each quantity, whether larger is better (recall); by default smaller is (latency).

    Raises:
        ValueError: for rows of different lengths.
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
    return (~beaten & ~np.isnan(values).any(axis=1)).tolist()  # type: ignore[no-any-return]
