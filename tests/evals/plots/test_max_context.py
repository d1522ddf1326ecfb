"""The plot of longest contexts draws every attention, longest first, with the outcome at the next length."""

import math
from pathlib import Path

import pandas as pd
import pytest

from evals.plots.max_context import max_context_plot
from evals.plots.registry import draw_folder, draw_max_context
from evals.plots.style import STYLES
from tests.evals.sweeps import data


def max_context_table() -> pd.DataFrame:
    """A max_context table."""
    rows = [
        ("standard", "ok", 17560.0, 19152.0, "oom"),
        ("bsbr", "ok", 65536.0, math.nan, None),
        ("linear", "oom", math.nan, 1.0, "oom"),
        ("mine", "uncertified", math.nan, math.nan, None),
    ]
    table = pd.DataFrame(rows, columns=["attention", "outcome", "max_context", "next_seq_len", "next_outcome"])
    return table.assign(limit_bytes=2**27, workload="prefill", scope="attention", batch_size=1, dtype="float32")


def test_points_are_the_contexts_and_the_longest_comes_first() -> None:
    axes = max_context_plot(max_context_table()).axes[0]
    points = {str(point.get_gid()): point for point in axes.lines if point.get_gid()}
    assert {name: data(point) for name, point in points.items()} == {"bsbr": ([65536], [0]), "standard": ([17560], [1])}
    for name, point in points.items():
        assert (point.get_color(), point.get_marker()) == (STYLES[name].colour, STYLES[name].marker)
        assert axes.get_xlim()[0] < data(point)[0][0] < axes.get_xlim()[1]


def test_outcome_at_the_next_length_is_written() -> None:
    texts = [text.get_text() for text in max_context_plot(max_context_table()).axes[0].texts]
    assert {"64k", "17k; oom at 19k", "none (oom)", "none (uncertified)"} <= set(texts)


def test_a_search_without_a_result_is_drawn(tmp_path: Path) -> None:
    assert len(draw_max_context(max_context_table().assign(max_context=math.nan), tmp_path)) == 2


def test_other_settings_have_separate_figures(tmp_path: Path) -> None:
    both = pd.concat([max_context_table(), max_context_table().assign(dtype="bfloat16")], ignore_index=True)
    assert {path.stem for path in draw_max_context(both, tmp_path)} == {"max_context-float32", "max_context-bfloat16"}
    with pytest.raises(ValueError, match="standard has more than one row"):
        draw_max_context(pd.concat([max_context_table(), max_context_table()], ignore_index=True), tmp_path)


def test_the_command_draws_a_table_of_longest_contexts(tmp_path: Path) -> None:
    max_context_table().to_csv(tmp_path / "results.csv", index=False)
    drawn = draw_folder(tmp_path, tmp_path / "plots")
    assert {path.name for path in drawn} == {"max_context.png", "max_context.svg"}
    for path in draw_max_context(max_context_table(), tmp_path / "direct"):
        assert (tmp_path / "plots" / path.name).read_bytes() == path.read_bytes()
