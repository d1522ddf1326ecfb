import itertools
import math

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from evals.plots.heatmap import COLOURS, times
from evals.plots.style import FAILURES, PARTS, STYLES
from tests.evals.sweeps import LENGTHS, attempted, drawn, failing, table, words


def cell(picture: Figure, row: int, at: int) -> tuple[Text, list[Rectangle]]:
    """What stands in one cell of a heat map: its text, and what is painted beneath it."""
    axes = picture.axes[0]
    (text,) = [text for text in axes.texts if text.get_position() == (at, row)]
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_xy() == (at - 0.5, row - 0.5)]
    return text, patches


def test_the_map_has_a_row_an_attention_but_the_reference_and_a_column_a_place() -> None:
    results = table(tuple(STYLES)).sample(frac=1, random_state=0).assign(relative_to="standard")
    axes = drawn(results, "speedup_heatmap").axes[0]
    assert axes.get_ylim() == (6.5, -0.5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "128", "1000", "8k"]
    names = [text.get_text() for text in axes.texts if text.get_text() in STYLES]
    assert names == [name for name in results["attention"].unique() if name != "standard"]


def test_a_cell_says_its_number_and_what_may_be_said_of_it() -> None:
    results = table(("standard", "bsbr"))
    bsbr = results["attention"] == "bsbr"
    results.loc[bsbr, "speedup"] = [0.53, 1.04, 3.44, 12.4]
    results.loc[bsbr, "verdict"] = ["slower", "same", "ambiguous", "faster"]
    picture = drawn(results, "speedup_heatmap")
    cells = [cell(picture, 0, at) for at in range(4)]
    assert [text.get_text() for text, _ in cells] == ["▼ 0.53×", "= 1.04×", "3.4×", "▲ 12×"]
    assert [text.get_weight() for text, _ in cells] == ["bold", "normal", "normal", "bold"]
    assert [any(patch.get_hatch() for patch in patches) for _, patches in cells] == [False, False, True, False]
    (legend,) = picture.legends
    assert [text.get_text() for text in legend.get_texts()] == ["▲ faster", "▼ slower", "= same", "ambiguous"]


def test_without_verdicts_numbers_stand_alone() -> None:
    picture = drawn(table().drop(columns="verdict"), "speedup_heatmap")
    assert picture.legends == []
    assert {cell(picture, 0, at)[0].get_weight() for at in range(4)} == {"normal"}


def test_colour_is_centred_on_1_and_as_far_either_way() -> None:
    results = table(("standard", "bsbr", "linear"), (128, 1000))
    results["speedup"] = [1.0, 1.0, 1.0, 8.0, 0.125, 2.0]
    picture = drawn(results, "speedup_heatmap")
    shades = [cell(picture, row, at)[1][0].get_facecolor()[:3] for row, at in itertools.product((0, 1), (0, 1))]
    assert shades == [COLOURS(place)[:3] for place in (0.5, 1.0, 0.0, 2 / 3)]


def test_the_scale_rises_in_grey_and_for_every_eye() -> None:
    # Rows of Machado et al. 2009, severity 1, weighted to luminance (ITU-R BT.709); tests/evals/test_looks.py has them whole.
    shades = np.array([to_rgb(COLOURS(place)) for place in np.linspace(0, 1, 65)])
    linear = np.where(shades <= 0.04045, shades / 12.92, ((shades + 0.055) / 1.055) ** 2.4)
    grey = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(grey) > 0).all()
    assert grey[-1] > 10 * grey[0]
    # Which way from 1 is told by blue against yellow, an axis that the red-green blind see.
    assert (np.diff(shades[:, 2] - shades[:, :2].mean(axis=1)) < 0.05).all()
    assert abs(shades[32] - shades[32].mean()).max() < 0.02


def test_no_two_parts_of_memory_look_alike_in_grey() -> None:
    greys = sorted(float(np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722])) for colour in PARTS.values())
    assert min(np.diff(greys)) > 0.2


@pytest.mark.parametrize("outcome", FAILURES)
def test_a_failed_cell_of_the_map_says_its_outcome_and_has_no_colour(outcome: str) -> None:
    picture = drawn(failing(table(), "linear", 1000, outcome), "speedup_heatmap")
    text, (patch,) = cell(picture, 1, 2)
    assert text.get_text() == outcome
    assert len(set(patch.get_facecolor()[:3])) == 1


def test_where_a_word_has_no_room_a_mark_stands_for_it() -> None:
    lengths = tuple(2**power for power in range(14))
    picture = drawn(failing(table(lengths=lengths), "linear", 4, "uncertified"), "speedup_heatmap")
    marks = [mark for mark in picture.axes[0].lines if mark.get_marker() == FAILURES["uncertified"]]
    assert [(list(mark.get_xdata()), list(mark.get_ydata())) for mark in marks] == [([2], [1])]
    assert "uncertified" in [text.get_text() for legend in picture.legends for text in legend.get_texts()]


def test_a_cell_that_was_not_measured_is_a_dash() -> None:
    results = table()
    results = results[(results["attention"] != "linear") | (results["seq_len"] != 128)]
    assert cell(drawn(results, "speedup_heatmap"), 1, 1)[0].get_text() == "–"


def test_a_map_without_a_comparison_is_left_out() -> None:
    assert attempted(table(("standard",)), "speedup_heatmap") is None
    assert attempted(table().assign(speedup=math.nan), "speedup_heatmap") is None


RATIOS = {0.004: "0.004×", 0.526: "0.53×", 0.999: "1.00×", 1.04: "1.04×", 2.04: "2.0×", 9.96: "10×", 123: "123×"}


@pytest.mark.parametrize(("value", "said"), RATIOS.items())
def test_ratios_are_told_in_the_digits_that_they_are_worth(value: float, said: str) -> None:
    assert times(value) == said


# --- memory ----------------------------------------------------------------------------------------


def bars(picture: Figure, panel: int, name: str) -> dict[str, tuple[float, float]]:
    """Where each part of a bar begins and how long it is."""
    found = {}
    for patch in picture.axes[panel].patches:
        owner, _, part = str(patch.get_gid()).rpartition(" ")
        if owner == name and isinstance(patch, Rectangle):
            found[part] = (patch.get_x(), patch.get_width())
    return found


def test_bars_stack_what_the_rows_hold() -> None:
    results = table().sample(frac=1, random_state=0)
    picture = drawn(results, "memory_split")
    for panel, length in enumerate((1, 1000, 8192)):
        for name in ("standard", "bsbr", "linear"):
            row = results[(results["attention"] == name) & (results["seq_len"] == length)].iloc[0]
            parameters, peak, state = (float(row[column]) for column in ("parameter_bytes", "peak_bytes", "state_bytes"))
            assert bars(picture, panel, name) == {
                "parameters": (0, parameters),
                "activations": (parameters, peak),
                "state": (parameters + peak, pytest.approx(state)),
            }


@pytest.mark.parametrize(
    ("lengths", "shown"),
    [
        ((128,), ["128"]),
        ((128, 1024), ["128", "1k"]),
        (LENGTHS, ["1", "1000", "8k"]),
        ((1, 2, 4, 8, 16, 32, 64), ["1", "8", "64"]),
    ],
)
def test_panels_are_the_least_the_middle_and_the_greatest_place(lengths: tuple[int, ...], shown: list[str]) -> None:
    axes = drawn(table(lengths=lengths), "memory_split").axes
    titles = [panel.get_title(loc="left") for panel in axes]
    assert [title.split(" ")[0] for title in titles] == shown


def test_each_panel_begins_at_0_and_has_round_ticks_in_its_unit() -> None:
    for axes in drawn(table(), "memory_split").axes:
        unit = {"KiB": 2**10, "MiB": 2**20}[axes.get_title(loc="left").split(" in ")[1]]
        left, right = axes.get_xlim()
        assert left == 0
        assert 3 <= len(axes.get_xticks()) <= 7
        for place, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
            assert place == pytest.approx(float(text.get_text()) * unit)
            assert place < right


def test_a_failed_or_unknown_bar_says_so() -> None:
    results = failing(table(), "linear", 1, "oom")
    results.loc[(results["attention"] == "bsbr") & (results["seq_len"] == 1), "peak_bytes"] = math.nan
    picture = drawn(results, "memory_split")
    said = [text.get_text() for text in picture.axes[0].texts]
    assert "oom" in said
    assert "activations: unknown" in said
    assert {width for _, width in bars(picture, 0, "linear").values()} == {0}


def test_what_is_not_held_at_once_is_told_apart_from_what_is() -> None:
    assert "not held here" in words(drawn(table(), "memory_split"))
    assert "not held here" not in words(drawn(table().assign(workload="decode"), "memory_split"))


def test_rows_have_the_keys_of_their_attentions() -> None:
    results = table(tuple(STYLES))
    for name in ("speedup_heatmap", "memory_split"):
        axes = drawn(results, name).axes[0]
        for mark in axes.lines:
            (row,) = set(mark.get_ydata())
            (text,) = [text for text in axes.texts if text.get_position()[1] == row and text.get_text() in STYLES]
            look = STYLES[text.get_text()]
            assert (mark.get_color(), mark.get_marker()) == (look.colour, look.marker)
