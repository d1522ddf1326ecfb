"""The Pareto front: worked by hand, and against its definition written as loops."""

import math

import numpy as np
import pytest

from evals.stats.pareto import pareto_front


def test_pareto_front_by_hand() -> None:
    nan = math.nan
    points = [[1, 9], [2, 5], [2, 5], [3, 5], [9, 1], [9, 2], [0, nan], [nan, 0]]
    assert pareto_front(points) == [True, True, True, False, True, False, False, False]
    assert pareto_front(points, [False, True]) == [True, False, False, False, False, False, False, False]
    assert pareto_front([[3.0]]) == [True]
    assert pareto_front([]) == []


def test_pareto_front_agrees_with_its_definition() -> None:
    points = np.random.default_rng(15).integers(0, 5, (60, 3)).astype(float)
    expected = [not any(all(q <= p) and any(q < p) for q in points) for p in points]
    assert pareto_front(points.tolist()) == expected
    assert 0 < sum(expected) < 60


def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lengths \[1, 2\]"):
        pareto_front([[1, 2], [1]])
    with pytest.raises(ValueError, match=r"lengths \[1, 2\]"):
        pareto_front([[1, 2]], [True])
