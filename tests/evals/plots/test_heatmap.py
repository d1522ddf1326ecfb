"""Heatmaps show speed-ups with their verdicts, and memory bars the parts of memory; failures are marked in both."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from evals.plots.heatmap import format_ratio
from evals.plots.style import DARK_TO_LIGHT, FAILURES, PARTS, STYLES
from tests.evals.sweeps import LENGTHS, attempted, data, drawn, failing, legend, line, table, words


def cell(picture: Figure, row: int, at: int) -> str:
    """The text in one cell of a heatmap."""
    return "".join(text.get_text() for text in picture.axes[0].texts if text.get_position() == (at + 0.5, row + 0.5))


def shades(picture: Figure) -> list[tuple[float, ...]]:
    """The colours of all cells, row by row; a cell without a number is transparent."""
    return [tuple(shade) for shade in np.asarray(picture.axes[0].collections[0].get_facecolor())]


def test_heatmap_has_a_row_per_attention_but_the_reference_and_a_column_per_setting() -> None:
    results = table(tuple(STYLES)).sample(frac=1, random_state=0).assign(relative_to="standard")
    axes = drawn(results, "speedup_heatmap").axes[0]
    assert axes.get_ylim() == (7, 0)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "128", "1000", "8k"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [name for name in results["attention"].unique() if name != "standard"]


def test_heatmap_texts_are_the_speedup_and_the_sign_of_its_verdict() -> None:
    results = table(("standard", "bsbr"))
    bsbr = results["attention"] == "bsbr"
    results.loc[bsbr, "speedup"] = [0.53, 1.04, 3.44, 12.4]
    results.loc[bsbr, "verdict"] = ["slower", "same", "ambiguous", "faster"]
    picture = drawn(results, "speedup_heatmap")
    assert [cell(picture, 0, at) for at in range(4)] == ["▼ 0.53×", "= 1.04×", "? 3.4×", "▲ 12×"]
    assert "verdict: ▲ faster, ▼ slower, = same, ? ambiguous" in words(picture)


def test_without_verdicts_texts_are_numbers_alone() -> None:
    picture = drawn(table().drop(columns="verdict"), "speedup_heatmap")
    assert "verdict" not in words(picture)
    assert all(cell(picture, 0, at)[0].isdigit() for at in range(4))


def test_colour_scale_is_symmetric_around_1() -> None:
    results = table(("standard", "bsbr", "linear"), (128, 1000))
    results["speedup"] = [1.0, 1.0, 1.0, 8.0, 0.125, 2.0]
    picture = drawn(results, "speedup_heatmap")
    assert np.asarray(shades(picture)) == pytest.approx(np.array([DARK_TO_LIGHT(place) for place in (0.5, 1.0, 0.0, 2 / 3)]))


def test_colour_scale_is_monotonic_in_grey_and_for_every_colour_vision() -> None:
    # Rows of Machado et al. 2009, severity 1, weighted to luminance (ITU-R BT.709).
    shades = np.array([to_rgb(DARK_TO_LIGHT(place)) for place in np.linspace(0, 1, 65)])
    linear = np.where(shades <= 0.04045, shades / 12.92, ((shades + 0.055) / 1.055) ** 2.4)
    grey = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(grey) > 0).all()
    assert grey[-1] > 10 * grey[0]
    # The side of 1 is blue against yellow, an axis that the red-green blind see.
    assert (np.diff(shades[:, 2] - shades[:, :2].mean(axis=1)) < 0.05).all()
    assert abs(shades[32] - shades[32].mean()).max() < 0.02


def test_parts_of_memory_differ_in_grey() -> None:
    greys = sorted(float(np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722])) for colour in PARTS.values())
    assert min(np.diff(greys)) > 0.2


@pytest.mark.parametrize("outcome", FAILURES)
def test_a_failure_in_the_heatmap_has_the_mark_of_its_outcome_and_no_colour(outcome: str) -> None:
    picture = drawn(failing(table(), "linear", 1000, outcome), "speedup_heatmap")
    axes = picture.axes[0]
    mark = line(axes, f"linear {outcome}")
    assert mark.get_marker() is FAILURES[outcome]
    assert data(mark) == ([2.5], [1.5])
    assert legend(axes) == [outcome]
    assert cell(picture, 1, 2) == ""
    assert shades(picture)[1 * 4 + 2][3] == 0


def test_an_unmeasured_setting_in_the_heatmap_is_a_dash() -> None:
    results = table()
    results = results[(results["attention"] != "linear") | (results["seq_len"] != 128)]
    assert cell(drawn(results, "speedup_heatmap"), 1, 1) == "–"


def test_heatmap_without_speedups_is_left_out() -> None:
    assert attempted(table(("standard",)), "speedup_heatmap") is None
    assert attempted(table().assign(speedup=math.nan), "speedup_heatmap") is None


RATIOS = {0.004: "0.004×", 0.526: "0.53×", 0.999: "1.00×", 1.04: "1.04×", 2.04: "2.0×", 9.96: "10×", 123: "123×"}


@pytest.mark.parametrize(("value", "expected"), RATIOS.items())
def test_format_ratio(value: float, expected: str) -> None:
    assert format_ratio(value) == expected


# --- memory ----------------------------------------------------------------------------------------


UNITS = {"KiB": 2**10, "MiB": 2**20}


def bars(picture: Figure, panel: int, name: str) -> dict[str, tuple[float, float]]:
    """Where each part of a bar begins and how long it is."""
    axes = picture.axes[panel]
    row = [label.get_text() for label in picture.axes[0].get_yticklabels()].index(name)
    unit = UNITS[axes.get_xlabel().removeprefix("memory in ")]
    parts = zip(PARTS, axes.containers, strict=True)
    return {part: (unit * bars[row].get_x(), unit * bars[row].get_width()) for part, bars in parts}


def test_bars_stack_the_bytes_of_the_rows() -> None:
    results = table().sample(frac=1, random_state=0)
    picture = drawn(results, "memory_split")
    for panel, length in enumerate((1, 1000, 8192)):
        for name in ("standard", "bsbr", "linear"):
            row = results[(results["attention"] == name) & (results["seq_len"] == length)].iloc[0]
            parameters, peak, state = (float(row[column]) for column in ("parameter_bytes", "peak_bytes", "state_bytes"))
            found = bars(picture, panel, name)
            assert found["parameters"] == pytest.approx((0, parameters))
            assert found["activations"] == pytest.approx((parameters, peak))
            assert found["state"] == pytest.approx((parameters + peak, state))


@pytest.mark.parametrize(
    ("lengths", "expected_lengths"),
    [
        ((128,), ["128"]),
        ((128, 1024), ["128", "1k"]),
        (LENGTHS, ["1", "1000", "8k"]),
        ((1, 2, 4, 8, 16, 32, 64), ["1", "8", "64"]),
    ],
)
def test_panels_are_the_least_the_middle_and_the_greatest_setting(lengths: tuple[int, ...], expected_lengths: list[str]) -> None:
    axes = drawn(table(lengths=lengths), "memory_split").axes
    titles = [panel.get_title(loc="left") for panel in axes]
    assert [title.split(" ")[0] for title in titles] == expected_lengths


def test_each_panel_begins_at_0_and_has_round_ticks_in_its_unit() -> None:
    for axes in drawn(table(), "memory_split").axes:
        assert axes.get_xlabel().removeprefix("memory in ") in UNITS
        assert axes.get_xlim()[0] == 0
        assert 3 <= len(axes.get_xticks()) <= 7
        for place, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
            assert place == pytest.approx(float(text.get_text()))


def test_a_failed_or_incomplete_bar_is_labelled() -> None:
    results = failing(table(), "linear", 1, "oom")
    results.loc[(results["attention"] == "bsbr") & (results["seq_len"] == 1), "peak_bytes"] = math.nan
    picture = drawn(results, "memory_split")
    expected = [text.get_text() for text in picture.axes[0].texts]
    assert "oom" in expected
    assert "activations: unknown" in expected
    assert {width for _, width in bars(picture, 0, "linear").values()} == {0}


def test_note_on_the_state_is_absent_for_decoding() -> None:
    assert "not held here" in words(drawn(table(), "memory_split"))
    assert "not held here" not in words(drawn(table().assign(workload="decode"), "memory_split"))
