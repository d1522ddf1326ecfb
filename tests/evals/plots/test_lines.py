"""Line plots draw the rows of the table with their intervals, failures, crossings and fitted laws."""

import math

import numpy as np
import pandas as pd
import pytest

from evals.plots.lines import LINE_METRICS
from evals.plots.style import FAILURES, STYLES
from evals.results.formatting import format_setting
from tests.evals.sweeps import LENGTHS, attempted, crossing, data, drawn, failing, fitted, legend, line, table, words

BY_NAME = {metric.name: metric for metric in LINE_METRICS}


@pytest.mark.parametrize(
    ("name", "column"), [("latency", "latency_s"), ("throughput", "tokens_per_s"), ("peak_memory", "peak_bytes")]
)
def test_lines_are_the_rows_whatever_their_order(name: str, column: str) -> None:
    results = table().sample(frac=1, random_state=0)
    axes = drawn(results, name).axes[0]
    for attention in ("standard", "bsbr", "linear"):
        rows = results[results["attention"] == attention].sort_values("seq_len")
        x, y = data(line(axes, attention))
        assert x == rows["seq_len"].tolist()
        assert y == pytest.approx(rows[column].tolist())


@pytest.mark.parametrize(("name", "low", "high"), [("latency", 0.9, 1.2), ("throughput", 1 / 1.2, 1 / 0.9)])
def test_bands_are_the_intervals(name: str, low: float, high: float) -> None:
    axes = drawn(table(("standard",)), name).axes[0]
    bars, bands = axes.collections[:2]
    band = bands.get_paths()[0].vertices
    _, y = data(line(axes, "standard"))
    for x, middle in zip(LENGTHS, y, strict=True):
        edges = np.asarray(band)[np.isclose(np.asarray(band)[:, 0], x), 1]
        assert (edges.min(), edges.max()) == pytest.approx((low * middle, high * middle))
    segments = {segment[0][0]: (segment[0][1], segment[1][1]) for segment in bars.get_segments()}  # type: ignore[attr-defined]
    assert segments == {x: pytest.approx((low * middle, high * middle)) for x, middle in zip(LENGTHS, y, strict=True)}


def test_a_point_without_neighbours_has_a_bar() -> None:
    results = failing(table(("standard",)), "standard", 128, "oom")
    bars = [bar for bar in drawn(results).axes[0].collections[0].get_segments() if len(bar)]  # type: ignore[attr-defined]
    alone = next(segment for segment in bars if segment[0][0] == 1)
    assert np.asarray(alone) == pytest.approx(np.array([[1, 0.9e-6], [1, 1.2e-6]]))
    assert 128 not in [segment[0][0] for segment in bars]


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("outcome", FAILURES)
def test_a_failure_is_the_mark_of_its_outcome_and_never_a_number(name: str, outcome: str) -> None:
    results = failing(table(), "linear", 1000, outcome)
    axes, lanes = drawn(results, name).axes
    x, y = data(line(axes, "linear"))
    assert [at for at, value in zip(x, y, strict=True) if math.isnan(value)] == [1000]
    mark = line(lanes, f"linear {outcome}")
    assert data(mark)[0] == [1000]
    assert mark.get_marker() is FAILURES[outcome]
    assert [other.get_gid() for other in lanes.lines] == [f"linear {outcome}"]
    assert legend(axes)[3:4] == [outcome]


def test_an_attention_that_failed_everywhere_is_drawn() -> None:
    results = table()
    for length in LENGTHS:
        results = failing(results, "bsbr", length, "uncertified")
    axes, lanes = drawn(results).axes
    assert data(line(lanes, "bsbr uncertified"))[0] == list(LENGTHS)
    assert [label.get_text() for label in lanes.get_yticklabels()] == ["bsbr"]
    assert data(line(axes, "bsbr"))[1] == pytest.approx([math.nan] * len(LENGTHS), nan_ok=True)


def test_an_unmeasured_setting_is_a_gap_without_a_mark() -> None:
    results = table()
    results = results[(results["attention"] != "linear") | (results["seq_len"] != 128)]
    picture = drawn(results)
    assert len(picture.axes) == 1
    assert math.isnan(data(line(picture.axes[0], "linear"))[1][1])


def test_every_value_lies_inside_the_axes_and_every_line_has_its_name() -> None:
    for name in BY_NAME:
        axes = drawn(table(tuple(STYLES)), name).axes[0]
        bottom, top = axes.get_ylim()
        left, right = axes.get_xlim()
        for attention in STYLES:
            x, y = data(line(axes, attention))
            assert bottom < min(y) <= max(y) < top
            assert left < min(x) <= max(x) < right
        assert sorted(legend(axes)[: len(STYLES)]) == sorted(STYLES)


def test_legend_has_the_order_of_the_ends_of_the_lines() -> None:
    axes = drawn(table(tuple(STYLES))).axes[0]
    ends = {attention: data(line(axes, attention))[1][-1] for attention in STYLES}
    assert legend(axes) == sorted(ends, key=lambda name: -ends[name])


@pytest.mark.parametrize("lengths", [(1,), (8192,)])
def test_a_single_setting_is_points_side_by_side_with_bars(lengths: tuple[int, ...]) -> None:
    axes = drawn(table(lengths=lengths).assign(swept=np.nan)).axes[0]
    positions = [data(line(axes, name))[0][0] for name in ("standard", "bsbr", "linear")]
    assert len(set(positions)) == 3
    assert [label.get_text() for label in axes.get_xticklabels()] == [format_setting(lengths[0])]
    assert data(line(axes, "bsbr"))[1] == pytest.approx([2e-6 * lengths[0] ** 1.1])


def test_settings_without_an_order_are_categories() -> None:
    results = pd.concat([table(lengths=(128,)).assign(swept="dtype", dtype=dtype) for dtype in ("float32", "bfloat16")])
    axes = drawn(results).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["float32", "bfloat16"]
    assert line(axes, "bsbr").get_linestyle() == "None"


def test_subtitle_describes_the_comparison() -> None:
    said = words(drawn(table(), "speedup"))
    for fact in (
        "over standard",
        "prefill",
        "batch 1",
        "hidden 512",
        "8 heads",
        "float32",
        "cpu",
        "2 threads",
        "30 samples",
        "3 rounds",
    ):
        assert fact in said
    assert "tokens," not in said  # seq_len is the axis


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *(("latency", 1e-3, "1 ms"), ("latency", 2e-5, "20 µs"), ("latency", 50.0, "50 s"), ("latency", 1e-9, "1 ns")),
        *(("peak_memory", 2.0**20, "1 MiB"), ("peak_memory", 2.0**33, "8 GiB"), ("peak_memory", 1.0, "1 B")),
        *(("throughput", 5e5, "500 k"), ("throughput", 1e6, "1 M"), ("throughput", 20.0, "20"), ("speedup", 0.5, "0.5×")),
    ],
)
def test_ticks_are_in_human_units(name: str, value: float, said: str) -> None:
    assert BY_NAME[name].unit.format(value) == said


# --- roofline --------------------------------------------------------------------------------------


def test_the_fill_of_a_marker_is_the_bound() -> None:
    picture = drawn(table(("standard", "bsbr")), "roofline")
    axes = picture.axes[0]
    for name in ("standard", "bsbr"):
        hollow = line(axes, f"{name} memory")
        assert data(hollow)[0] == [1, 128]
        assert hollow.get_markerfacecolor() == "white"
        assert hollow.get_markeredgecolor() == STYLES[name].colour
        assert line(axes, name).get_markerfacecolor() == STYLES[name].colour
    found = axes.get_legend()
    assert found is not None
    keys = {key.get_label(): key.get_markerfacecolor() for key in found.get_lines()}
    assert keys.items() >= {"bound by compute": "black", "bound by memory bandwidth": "white"}.items()


def test_the_roofline_itself_is_drawn() -> None:
    axes = drawn(table(), "roofline").axes[0]
    assert axes.get_ylim()[1] > 1.0
    assert set(np.asarray(line(axes, "parity").get_ydata(), float)) == {1.0}


def test_an_unknown_bound_has_a_fill_of_its_own() -> None:
    picture = drawn(table().drop(columns="bound"), "roofline")
    assert legend(picture.axes[0])[-1] == "bound by: unknown"
    assert line(picture.axes[0], "bsbr unknown").get_markerfacecolor() not in ("white", STYLES["bsbr"].colour)


# --- crossings -------------------------------------------------------------------------------------


def test_a_crossing_is_a_bar_over_its_interval_and_a_ring_on_the_line_of_the_reference() -> None:
    given = crossing(("standard", "bsbr", 500, 300, 900), ("linear", "standard", 200, 100, 400), ("bsbr", "linear", 50, 40, 60))
    (axes,) = drawn(table(), "speedup", crossovers=given).axes
    assert data(line(axes, "bsbr crossing")) == ([500], [1])
    assert data(line(axes, "linear crossing")) == ([200], [1])
    assert data(line(axes, "linear interval")) == ([100, 400], [1, 1])
    assert data(line(axes, "bsbr interval")) == ([300, 900], [1, 1])
    assert line(axes, "bsbr interval").get_color() == STYLES["bsbr"].colour
    assert {"linear\ncrosses at 200 [100 to 400]", "bsbr\ncrosses at 500 [300 to 900]", "standard"} == {*legend(axes)}


def test_an_attention_can_cross_twice() -> None:
    given = crossing(("standard", "bsbr", 3000, 2500, 3500), ("standard", "bsbr", 20, 10, 30))
    (axes,) = drawn(table(), "speedup", crossovers=given).axes
    assert "bsbr\ncrosses at 20 [10 to 30], 2.9k [2.4k to 3.4k]" in legend(axes)
    assert [data(found)[0] for found in axes.lines if found.get_gid() == "bsbr crossing"] == [[20], [3000]]


@pytest.mark.parametrize(
    "row",
    [
        ("standard", "bsbr", math.nan, math.nan, math.nan),
        ("standard", "bsbr", 1e6, 1e5, 1e7),
        ("bsbr", "linear", 500, 300, 900),
        ("standard", "gau", 500, 300, 900),
    ],
    ids=["none in range", "out of range", "not with the reference", "of nobody here"],
)
def test_a_crossing_outside_of_the_figure_is_not_drawn(row: tuple[str, str, float, float, float]) -> None:
    (axes,) = drawn(table(), "speedup", crossovers=crossing(row)).axes
    assert not [found for found in axes.lines if "crossing" in str(found.get_gid())]
    assert "crosses" not in "".join(legend(axes))


def test_an_interval_without_an_end_is_a_point_and_one_beyond_the_range_ends_at_it() -> None:
    given = crossing(("standard", "bsbr", 500, math.nan, math.nan), ("standard", "linear", 100, 0, math.inf))
    (axes,) = drawn(table(), "speedup", crossovers=given).axes
    assert data(line(axes, "bsbr interval"))[0] == [500, 500]
    assert data(line(axes, "linear interval"))[0] == pytest.approx(axes.get_xlim())


def test_other_figures_have_no_crossings() -> None:
    given = crossing(("standard", "bsbr", 500, 300, 900))
    for name in BY_NAME.keys() - {"speedup"}:
        assert not [found for found in drawn(table(), name, crossovers=given).axes[0].lines if "crossing" in str(found.get_gid())]


# --- scaling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "column"), [("scaling", "latency_s"), ("scaling_memory", "peak_bytes")])
def test_the_law_is_drawn_through_the_points(name: str, column: str) -> None:
    # Of the table, latency is a·n^1.1, and so the law goes through every point; memory it misses.
    results, laws = table(), fitted()
    laws.loc[laws["quantity"] == "memory", "exponent"] = 1.0
    axes = drawn(results, name, laws).axes[0]
    for attention in ("standard", "bsbr", "linear"):
        points, law = line(axes, attention), line(axes, f"{attention} fit")
        rows = results[results["attention"] == attention]
        assert data(points) == (rows["seq_len"].tolist(), pytest.approx(rows[column].tolist()))
        assert points.get_linestyle() == "None"
        n, fit = data(law)
        assert (n[0], n[-1]) == pytest.approx((1, 8192))
        assert np.interp(np.log(points.get_xdata()), np.log(n), np.log(fit)) == pytest.approx(np.log(rows[column]), abs=1e-3)
        assert law.get_color() == points.get_color()


def test_the_exponent_and_its_interval_are_below_the_name() -> None:
    figure = drawn(table(), "scaling", fitted())
    said = "\n".join([words(figure), *legend(figure.axes[0])])
    assert said.count("1.10 (1.05 to 1.16), declared 1") == 3
    assert "95% interval" in said


@pytest.mark.parametrize("note", ["range too short", "overhead dominated"])
def test_a_note_replaces_the_exponent(note: str) -> None:
    laws = fitted()
    bsbr = laws["attention"] == "bsbr"
    laws.loc[bsbr, ["exponent", "exponent_low", "exponent_high", "overhead", "factor"]] = math.nan
    laws.loc[bsbr, "note"] = note
    picture = drawn(table(), "scaling", laws)
    assert f"bsbr\n{note}" in legend(picture.axes[0])
    assert [found.get_gid() for found in picture.axes[0].lines if "fit" in str(found.get_gid())] == ["standard fit", "linear fit"]
    assert data(line(picture.axes[0], "bsbr"))[0] == list(LENGTHS)


def test_an_exponent_without_an_interval_or_a_declared_one() -> None:
    laws = fitted().assign(exponent_low=math.nan, exponent_high=math.nan, declared_exponent=math.nan)
    assert "bsbr\n1.10" in legend(drawn(table(), "scaling", laws).axes[0])


def test_a_law_is_drawn_over_lengths_only() -> None:
    batches = table().rename(columns={"seq_len": "batch_size", "batch_size": "seq_len"}).assign(swept="shape.batch_size")
    assert attempted(batches, "scaling", fitted()) is None
    assert attempted(table(lengths=(128,)), "scaling", fitted()) is None
    assert attempted(table(), "scaling") is None
    assert attempted(table(), "scaling_memory", fitted()[fitted()["quantity"] == "latency"]) is None


def test_a_law_ends_at_the_last_measured_length() -> None:
    axes = drawn(failing(table(), "linear", 8192, "oom"), "scaling", fitted()).axes[0]
    assert data(line(axes, "linear fit"))[0][-1] == pytest.approx(1000)


def test_tick_labels_do_not_overlap() -> None:
    lengths = (*range(1000, 1010), 4096, 8192)
    axes = drawn(table(lengths=lengths)).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1009", "4k", "8k"]
