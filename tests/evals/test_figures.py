import itertools
import math
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from evals.figures import QUANTITIES, checked, draw, figure, main, plain, spread
from evals.looks import FAILURES, LOOKS, SPARE_COLOURS, SPARE_MARKERS, looks

LENGTHS = (1, 128, 1000, 8192)
ROOT = Path(__file__).parents[2]
BY_NAME = {quantity.name: quantity for quantity in QUANTITIES}


def table(attentions: tuple[str, ...] = ("standard", "bsbr", "linear"), lengths: tuple[int, ...] = LENGTHS) -> pd.DataFrame:
    """What a sweep writes: every number known, none like another."""
    cells = pd.DataFrame(itertools.product(attentions, lengths), columns=["attention", "seq_len"])
    at = cells["attention"].map({name: index for index, name in enumerate(attentions, 1)}).astype(float)
    latency, speedup = at * cells["seq_len"] ** 1.1 * 1e-6, cells["seq_len"] ** 0.3 / at
    return cells.assign(
        sweep="seq_len",
        swept="shape.seq_len",
        workload="prefill",
        scope="attention",
        num_layers=math.nan,
        processor="a processor",
        torch="2.13.0",
        device="cpu",
        dtype="float32",
        threads=2,
        batch_size=1,
        hidden_dim=512,
        num_heads=8,
        outcome="ok",
        samples=30,
        rounds=3,
        relative_to=attentions[0],
        latency_s=latency,
        latency_low_s=0.9 * latency,
        latency_high_s=1.2 * latency,
        tokens_per_s=cells["seq_len"] / latency,
        tokens_per_s_low=cells["seq_len"] / latency / 1.2,
        tokens_per_s_high=cells["seq_len"] / latency / 0.9,
        speedup=speedup,
        speedup_low=0.8 * speedup,
        speedup_high=1.1 * speedup,
        peak_bytes=1000 * at * cells["seq_len"],
    )


def failing(results: pd.DataFrame, attention: str, length: int, outcome: str) -> pd.DataFrame:
    """The table with one cell failed, whose numbers stay: nothing may draw them."""
    cell = (results["attention"] == attention) & (results["seq_len"] == length)
    return results.assign(outcome=results["outcome"].mask(cell, outcome))


def drawn(results: pd.DataFrame, name: str = "latency") -> Figure:
    return figure(checked(results), BY_NAME[name])


def line(axes: Axes, gid: str) -> Line2D:
    (found,) = [line for line in axes.lines if line.get_gid() == gid]
    return found


def data(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = line.get_xdata(), line.get_ydata()
    return np.asarray(x, float).tolist(), np.asarray(y, float).tolist()


def words(picture: Figure) -> str:
    return "\n".join(text.get_text() for text in [*picture.texts, *(text for axes in picture.axes for text in axes.texts)])


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
    band = axes.collections[0].get_paths()[0].vertices
    _, y = data(line(axes, "standard"))
    for x, middle in zip(LENGTHS, y, strict=True):
        edges = np.asarray(band)[np.isclose(np.asarray(band)[:, 0], x), 1]
        assert (edges.min(), edges.max()) == pytest.approx((low * middle, high * middle))


def test_a_point_without_neighbours_has_a_bar() -> None:
    results = failing(table(("standard",)), "standard", 128, "oom")
    bars = drawn(results).axes[0].collections[1].get_segments()  # type: ignore[attr-defined]
    assert np.asarray(bars) == pytest.approx(np.array([[[1, 0.9e-6], [1, 1.2e-6]]]))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("outcome", FAILURES)
def test_a_failed_cell_is_a_mark_of_its_kind_and_never_a_number(name: str, outcome: str) -> None:
    results = failing(table(), "linear", 1000, outcome)
    axes, lanes = drawn(results, name).axes
    x, y = data(line(axes, "linear"))
    assert [at for at, value in zip(x, y, strict=True) if math.isnan(value)] == [1000]
    mark = line(lanes, f"linear {outcome}")
    assert data(mark)[0] == [1000]
    assert mark.get_marker() is FAILURES[outcome]
    assert [other.get_gid() for other in lanes.lines] == [f"linear {outcome}"]
    legend = lanes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [outcome]


def test_numbers_left_in_a_failed_row_reach_no_pixel(tmp_path: Path) -> None:
    results = failing(table(), "linear", 1000, "timeout")
    cell = results["outcome"] == "timeout"
    numbers = [
        "latency_s",
        "latency_low_s",
        "latency_high_s",
        "tokens_per_s",
        "speedup",
        "speedup_low",
        "speedup_high",
        "peak_bytes",
    ]
    for kept, value in (("absurd", 1e12), ("none", math.nan)):
        draw(results.assign(**{column: results[column].astype(float).mask(cell, value) for column in numbers}), tmp_path / kept)
    for path in (tmp_path / "absurd").iterdir():
        assert path.read_bytes() == (tmp_path / "none" / path.name).read_bytes()


def test_an_attention_that_failed_everywhere_is_still_in_the_picture() -> None:
    results = table()
    for length in LENGTHS:
        results = failing(results, "bsbr", length, "uncertified")
    axes, lanes = drawn(results).axes
    assert data(line(lanes, "bsbr uncertified"))[0] == list(LENGTHS)
    assert "bsbr" in [text.get_text() for text in lanes.texts]
    assert "bsbr" not in [text.get_text() for text in axes.texts]


def test_a_sweep_that_failed_everywhere_says_so(tmp_path: Path) -> None:
    results = table().assign(outcome="crash")
    assert "no cell gave a number" in words(drawn(results))
    assert len(draw(results, tmp_path)) == 8


def test_a_cell_that_was_not_measured_is_a_gap_without_a_mark() -> None:
    results = table()
    results = results[(results["attention"] != "linear") | (results["seq_len"] != 128)]
    picture = drawn(results)
    assert len(picture.axes) == 1
    assert math.isnan(data(line(picture.axes[0], "linear"))[1][1])


def test_every_value_lies_inside_the_axes_and_every_line_has_its_name() -> None:
    for name in BY_NAME:
        axes = drawn(table(tuple(LOOKS)), name).axes[0]
        bottom, top = axes.get_ylim()
        left, right = axes.get_xlim()
        for attention in LOOKS:
            x, y = data(line(axes, attention))
            assert bottom < min(y) <= max(y) < top
            assert left < min(x) <= max(x) < right
        assert sorted(text.get_text() for text in axes.texts) == sorted(LOOKS)


def test_names_stand_in_the_order_of_their_lines() -> None:
    axes = drawn(table(tuple(LOOKS))).axes[0]
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    ends = {attention: data(line(axes, attention))[1][-1] for attention in LOOKS}
    assert sorted(heights, key=lambda name: heights[name]) == sorted(ends, key=lambda name: ends[name])


@pytest.mark.parametrize("lengths", [(1,), (8192,)])
def test_a_single_place_is_points_side_by_side_with_bars(lengths: tuple[int, ...]) -> None:
    axes = drawn(table(lengths=lengths).assign(swept=np.nan)).axes[0]
    positions = [data(line(axes, name))[0][0] for name in ("standard", "bsbr", "linear")]
    assert len(set(positions)) == 3
    assert [label.get_text() for label in axes.get_xticklabels()] == [plain(lengths[0])]
    assert data(line(axes, "bsbr"))[1] == pytest.approx([2e-6 * lengths[0] ** 1.1])


def test_settings_without_an_order_make_categories() -> None:
    results = pd.concat([table(lengths=(128,)).assign(swept="dtype", dtype=dtype) for dtype in ("float32", "bfloat16")])
    axes = drawn(results).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["float32", "bfloat16"]
    assert line(axes, "bsbr").get_linestyle() == "None"


def test_the_picture_says_what_was_compared() -> None:
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


def test_what_differs_in_another_setting_goes_to_its_own_figure(tmp_path: Path) -> None:
    results = pd.concat([table(), table().assign(workload="decode")])
    paths = draw(results, tmp_path)
    assert len(paths) == 16
    assert tmp_path / "latency-decode.svg" in paths
    assert tmp_path / "latency-prefill.svg" in paths


def test_one_look_everywhere() -> None:
    few, many = table(("linear", "bsbr")), table((*LOOKS, "mine"))
    colours = {
        str(line(drawn(results, name).axes[0], "bsbr").get_color()) for results, name in itertools.product((few, many), BY_NAME)
    }
    assert colours == {LOOKS["bsbr"].colour}


def test_other_names_get_looks_of_their_own_that_do_not_move() -> None:
    assert looks(["mine"])["mine"] == looks(["mine", *LOOKS])["mine"]
    names = [f"variant_{number}" for number in range(len(SPARE_COLOURS))]
    chosen = looks([*names, *LOOKS])
    assert chosen == looks([*LOOKS, *reversed(names)])
    assert len({look.colour for look in chosen.values()}) == len(chosen)
    crowd = looks(f"variant_{number}" for number in range(60))
    assert len(set(crowd.values())) == 60


def test_looks_do_not_depend_on_the_interpreter() -> None:
    command = "from evals.figures import looks; print(looks(['mine'])['mine'].colour)"
    seen = {
        subprocess.run(
            [sys.executable, "-c", command],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_built_in_looks_differ_without_colour_too() -> None:
    assert len({look.marker for look in LOOKS.values()}) == len(LOOKS)
    assert len({(look.dashes, look.width) for look in LOOKS.values()}) == len(LOOKS)
    assert not {look.marker for look in LOOKS.values()} & set(SPARE_MARKERS)
    assert not {look.colour for look in LOOKS.values()} & set(SPARE_COLOURS)


# Machado, Oliveira & Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency", severity 1.
VISION = {
    "normal": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227969], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def lab(colour: str, vision: str) -> NDArray[np.float64]:
    """CIE L*a*b* (D65) of an sRGB colour as that vision sees it."""
    srgb = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_built_in_colours_can_be_told_apart(vision: str) -> None:
    # A difference of 2.3 is just noticeable; six times that holds for thin lines.
    for one, other in itertools.combinations(LOOKS.values(), 2):
        assert np.linalg.norm(lab(one.colour, vision) - lab(other.colour, vision)) > 14, (one, other)


def test_names_are_spread_no_further_than_they_must() -> None:
    assert spread([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spread([0.2, 0.49, 0.5, 0.51], 0.1) == pytest.approx([0.2, 0.4, 0.5, 0.6])
    assert min(spread([0.0] * 5, 0.05)) > 0
    assert max(spread([1.0] * 5, 0.05)) < 1


@pytest.mark.parametrize(
    ("value", "said"),
    [(1, "1"), (128, "128"), (1000, "1000"), (1024, "1k"), (1536, "1.5k"), (2**20, "1M"), (0.1, "0.1"), (True, "True")],
)
def test_settings_read_as_people_write_them(value: object, said: str) -> None:
    assert plain(value) == said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *(("latency", 1e-3, "1 ms"), ("latency", 2e-5, "20 µs"), ("latency", 50.0, "50 s"), ("latency", 1e-9, "1 ns")),
        *(("peak_memory", 2.0**20, "1 MiB"), ("peak_memory", 2.0**33, "8 GiB"), ("peak_memory", 1.0, "1 B")),
        *(("throughput", 5e5, "500 k"), ("throughput", 1e6, "1 M"), ("throughput", 20.0, "20"), ("speedup", 0.5, "0.5×")),
    ],
)
def test_ticks_are_in_human_units(name: str, value: float, said: str) -> None:
    assert BY_NAME[name].tick(value) == said


def test_text_can_be_read_in_print() -> None:
    picture = drawn(failing(table(), "linear", 128, "oom"))
    picture.canvas.draw()
    assert picture.get_figwidth() == 7  # the full width of a paper, so that points are points in print
    for axes in picture.axes:
        sizes = [
            float(text.get_fontsize()) for text in [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label]
        ]
        assert min(sizes) >= 7


def test_redrawing_changes_no_byte_and_no_setting(tmp_path: Path) -> None:
    results = failing(table((*LOOKS, "mine")), "sparse", 8192, "timeout")
    before = dict(mpl.rcParams)
    first = {path.name: path.read_bytes() for path in draw(results, tmp_path / "a")}
    with mpl.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "red"}):
        second = {path.name: path.read_bytes() for path in draw(results, tmp_path / "b")}
    assert dict(mpl.rcParams) == before
    assert set(first) == {
        f"{name}.{kind}" for name in ("latency", "throughput", "peak_memory", "speedup") for kind in ("png", "svg")
    }
    assert first == second
    assert first["latency.png"].startswith(b"\x89PNG")
    assert first["latency.svg"].startswith(b"<?xml")


def test_redrawing_replaces_what_was_there_and_leaves_the_table_alone(tmp_path: Path) -> None:
    results = table()
    copy = results.copy()
    draw(results, tmp_path)
    old = (tmp_path / "latency.svg").read_bytes()
    draw(results.assign(latency_s=results["latency_s"] * 2), tmp_path)
    assert (tmp_path / "latency.svg").read_bytes() != old
    pd.testing.assert_frame_equal(results, copy)


def test_a_csv_draws_what_its_table_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = failing(table(), "linear", 8192, "oom")
    (tmp_path / "seq_len").mkdir()
    results.to_csv(tmp_path / "seq_len" / "results.csv", index=False)
    assert main([str(tmp_path / "seq_len"), "--plots", str(tmp_path / "plots")]) == 0
    direct = draw(results, tmp_path / "direct")
    for path in direct:
        assert (tmp_path / "plots" / "seq_len" / path.name).read_bytes() == path.read_bytes()
    assert "8 files" in capsys.readouterr().out


def csv(results: pd.DataFrame) -> bytes:
    return results.to_csv(index=False).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "results.csv does not exist"),
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is no table of results"),
        (b'a,b\n"1,2\n', "is no table of results"),
        (csv(table().drop(columns=["peak_bytes", "outcome"])), "column outcome, peak_bytes missing"),
        (csv(table().head(0)), "no row to draw"),
        (csv(table().assign(outcome="fine")), "outcome must be one of ok, oom, timeout, crash, unsupported, uncertified, got fine"),
        (csv(table().assign(latency_s="fast")), "latency_s must hold numbers, got 'fast'"),
        (csv(table().assign(latency_s=0.0)), "latency_s above 0, got 0.0 for standard"),
        (csv(table().assign(latency_s=math.inf)), "latency_s above 0, got inf for standard"),
        (csv(table().assign(swept="attention.bsbr.chunk_size")), "needs a column 'chunk_size'"),
        (csv(pd.concat([table(), table()])), "standard has more than one row at seq_len = 1"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "results.csv").write_bytes(content)
    assert main([str(tmp_path), "--plots", str(tmp_path / "plots")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_command_exits_with_2_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "evals.figures", str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.csv").write_bytes(csv(table()))
    (tmp_path / "plots").write_text("a file where a folder should be")
    assert main([str(tmp_path), "--plots", str(tmp_path / "plots")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_colours_on_the_page_are_those_of_the_looks() -> None:
    axes = drawn(table(("gau", "mine"))).axes[0]
    for name, look in looks(["gau", "mine"]).items():
        assert to_hex(line(axes, name).get_color()) == look.colour
