"""The Pareto plot draws the points of one setting, their front, and names the attentions without a point."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from evals.plots.pareto import draw_front
from evals.plots.style import STYLES
from tests.evals.sweeps import attempted, data, drawn, failing, legend, line, table, words


def test_the_front_is_the_set_of_points_that_none_dominates() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 2, 9, 40):
        # Few values, so that there are ties.
        latency, memory = generator.integers(1, 12, (2, size)).astype(float)
        latency[generator.random(size) < 0.1] = math.nan
        points = [i for i in range(size) if math.isfinite(latency[i])]
        beaten = {
            i
            for i, j in itertools.permutations(points, 2)
            if latency[j] <= latency[i] and memory[j] <= memory[i] and (latency[j], memory[j]) != (latency[i], memory[i])
        }
        axes = Figure().subplots()
        axes.set(xlim=(0, 12), ylim=(0, 12))
        draw_front(axes, latency, memory)
        corners = list(zip(*data(line(axes, "front")), strict=True))[1:-1]
        assert set(corners) == {(latency[i], memory[i]) for i in set(points) - beaten}
        assert corners == sorted(corners)


def test_points_are_the_rows_of_the_greatest_setting() -> None:
    results = table(tuple(STYLES)).sample(frac=1, random_state=0)
    axes = drawn(results, "pareto").axes[0]
    (scatter,) = (found for found in axes.collections if isinstance(found, PathCollection))
    rows = results[results["seq_len"] == 8192]
    assert np.asarray(scatter.get_offsets()) == pytest.approx(rows[["latency_s", "peak_bytes"]].to_numpy())
    assert [to_hex(colour) for colour in scatter.get_facecolors()] == [STYLES[name].colour for name in rows["attention"]]
    assert "8k tokens" in words(drawn(results, "pareto"))


def test_the_front_is_a_line_of_steps_through_its_points() -> None:
    results = table(("standard", "bsbr", "linear", "gau"), (128, 8192))
    # standard is fastest and bsbr smallest; linear lies between them, and gau is beaten by linear.
    results["latency_s"] = results["attention"].map({"standard": 1.0, "linear": 2.0, "gau": 3.0, "bsbr": 4.0})
    results["peak_bytes"] = results["attention"].map({"standard": 8e6, "linear": 4e6, "gau": 5e6, "bsbr": 1e6})
    axes = drawn(results, "pareto").axes[0]
    x, y = data(line(axes, "front"))
    assert line(axes, "front").get_drawstyle() == "steps-post"
    assert x == [1, 1, 2, 4, axes.get_xlim()[1]]
    assert y == [axes.get_ylim()[1], 8e6, 4e6, 1e6, 1e6]


def test_every_point_has_its_name_in_the_legend() -> None:
    results = table(tuple(f"{name}_{number}" for name in STYLES for number in range(3)), (128, 8192))
    assert sorted(legend(drawn(results, "pareto").axes[0])) == sorted(results["attention"].unique())


def test_a_failure_at_the_greatest_setting_is_named_and_not_drawn() -> None:
    results = failing(table(tuple(STYLES)), "hopfield", 8192, "oom")
    picture = drawn(results, "pareto")
    assert "not shown: hopfield (oom)" in words(picture)
    assert "hopfield" not in legend(picture.axes[0])


def test_the_setting_is_the_greatest_one_with_two_points() -> None:
    results = failing(failing(table(), "standard", 8192, "oom"), "linear", 8192, "timeout")
    assert "1000 tokens" in words(drawn(results, "pareto"))
    assert attempted(table(("bsbr",)), "pareto") is None


def test_settings_without_an_order_are_side_by_side_on_one_scale() -> None:
    dtypes = ("float32", "bfloat16", "float16", "float64")
    results = pd.concat([table(lengths=(128 * 2**i,)).assign(swept="dtype", dtype=dtype) for i, dtype in enumerate(dtypes)])
    results["seq_len"] = 128
    axes = drawn(results, "pareto").axes
    assert [panel.get_title(loc="left") for panel in axes] == ["float32", "bfloat16", "float16"]
    assert len({(panel.get_xlim(), panel.get_ylim()) for panel in axes}) == 1
