"""The registry draws every figure that a table has data for: readable, reproducible, and in the same styles."""

import io
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from evals.figures import main
from evals.paths import ROOT
from evals.plots.registry import FIGURES, draw_sweep, sweep_figures
from evals.plots.style import FAILURES, STYLES, style_of
from evals.results.formatting import format_setting
from evals.results.frames import check_table, read_fits
from tests.evals.sweeps import NEW, attempted, crossing, drawn, failing, fitted, line, table, words


def test_a_sweep_that_failed_everywhere_has_a_note(tmp_path: Path) -> None:
    results = table().assign(outcome="crash")
    assert "no cell gave a number" in words(drawn(results))
    assert len(draw_sweep(results, tmp_path)) == 8  # nothing to map, and no front


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, "1"), (128, "128"), (1000, "1000"), (1024, "1k"), (1536, "1.5k"), (2**20, "1M"), (0.1, "0.1"), (True, "True")],
)
def test_format_setting(value: object, expected: str) -> None:
    assert format_setting(value) == expected


def csv(results: pd.DataFrame) -> bytes:
    return results.to_csv(index=False).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no results.csv; give a folder that evals.run wrote"),
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is no table of results"),
        (b'a,b\n"1,2\n', "is no table of results"),
        (csv(table().drop(columns=["peak_bytes", "outcome"])), "column outcome, peak_bytes missing"),
        (csv(table().head(0)), "no row to draw"),
        (
            csv(table().assign(outcome="fine")),
            "outcome must be one of ok, oom, timeout, crash, unsupported, uncertified, impossible, lost, got fine",
        ),
        (csv(table().assign(verdict="better")), "verdict must be one of faster, slower, same, ambiguous, got better"),
        (csv(table().assign(bound="disk")), "bound must be one of compute, memory, got disk"),
        (csv(table().assign(roofline_fraction="high")), "roofline_fraction must hold numbers, got 'high'"),
        (csv(table().assign(latency_s="fast")), "latency_s must hold numbers, got 'fast'"),
        (csv(table().assign(latency_s=0.0)), "latency_s above 0, got 0.0 for standard"),
        (csv(table().assign(latency_s=math.inf)), "latency_s above 0, got inf for standard"),
        (csv(table().assign(swept="attention.bsbr.chunk_size")), "needs a column 'chunk_size'"),
        (csv(pd.concat([table(), table()])), "standard has more than one row at seq_len = 1"),
    ],
)
def test_an_invalid_table_is_an_error_of_one_sentence(
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


def test_a_folder_that_cannot_be_written_is_an_error_of_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.csv").write_bytes(csv(table()))
    (tmp_path / "plots").write_text("a file where a folder should be")
    assert main([str(tmp_path), "--plots", str(tmp_path / "plots")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


NUMBERS = [column for column in table() if column.endswith(("_s", "_low", "_high", "_bytes", "_fraction")) or column == "speedup"]
ALL = {*FIGURES}
FITTED = {"scaling", "scaling_memory"}


@pytest.mark.parametrize(
    ("without", "left"),
    [
        ((), ALL - FITTED),
        (NEW, ALL - FITTED - {"memory_split", "roofline"}),
        (("state_bytes",), ALL - FITTED - {"memory_split"}),
        (("roofline_fraction",), ALL - FITTED - {"roofline"}),
        (("verdict", "bound", "match"), ALL - FITTED),
    ],
)
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_a_figure_without_its_column_is_left_out(without: tuple[str, ...], left: set[str], how: str) -> None:
    results = table().drop(columns=[*without]) if how == "absent" else table().assign(**dict.fromkeys(without, math.nan))
    assert {name for name in FIGURES if attempted(results, name) is not None} == left


def test_numbers_in_a_failed_row_are_not_drawn() -> None:
    results = failing(table(), "linear", 1000, "timeout")
    cell = results["outcome"] == "timeout"
    absurd, none = (
        results.assign(**{column: results[column].astype(float).mask(cell, value) for column in NUMBERS})
        for value in (1e12, math.nan)
    )
    for name in FIGURES:
        assert svg(drawn(absurd, name, fitted())) == svg(drawn(none, name, fitted())), name


def svg(picture: Figure) -> bytes:
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "a"}):
        picture.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def test_rows_that_differ_in_another_setting_have_separate_figures(tmp_path: Path) -> None:
    results = pd.concat([table(), table().assign(workload="decode")])
    both_fits = pd.concat([fitted().assign(workload=workload) for workload in ("decode", "prefill")])
    plain, both = (check_table(fits, "scaling") for fits in (fitted(), both_fits))
    plain_names = {name for name, draw in sweep_figures(check_table(results), {"scaling": plain}) if draw()}
    assert plain_names == {f"{name}-{workload}" for name in ALL - FITTED for workload in ("decode", "prefill")}
    fitted_names = {name for name, draw in sweep_figures(check_table(results), {"scaling": both}) if draw()}
    assert fitted_names == {f"{name}-{workload}" for name in ALL for workload in ("decode", "prefill")}


def test_a_setting_that_varies_with_the_swept_one_does_not_split_the_figure() -> None:
    results = table().assign(swept="shape.head_dim", head_dim=table()["seq_len"], seq_len=64, hidden_dim=8 * table()["seq_len"])
    assert "hidden 8 to 64k" in words(drawn(results))


def test_an_attention_has_one_style_in_every_figure() -> None:
    few, many = table(("linear", "mine", "bsbr")), table((*STYLES, "mine"))
    drawn_styles = {
        (name, str(found.get_color()), found.get_marker())
        for results in (few, many)
        for name in ("bsbr", "mine")
        for kind in ("latency", "peak_memory", "roofline", "scaling")
        for found in [line(drawn(results, kind, fitted((*STYLES, "mine"))).axes[0], name)]
    }
    assert drawn_styles == {(name, style_of([name])[name].colour, style_of([name])[name].marker) for name in ("bsbr", "mine")}


def crowded() -> pd.DataFrame:
    long = "somebodys_variant_with_a_name_that_no_page_has_room_for"
    lengths = (1, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 4096, 8192, 16384, 65536)
    results = table((*STYLES, long, "user_b", "user_c"), lengths)
    for number, outcome in enumerate(FAILURES):
        results = failing(results, tuple(STYLES)[number + 1], lengths[2 * number + 1], outcome)
    processor = "a processor whose maker is as proud of it as of its name, in 2 sockets with 96 cores each"
    return results.assign(processor=processor, match="parameters matched within 1 %")


CASES: dict[str, Callable[[], pd.DataFrame]] = {
    "three": table,
    "all that is built in": lambda: failing(failing(table(tuple(STYLES)), "gau", 128, "impossible"), "gau", 1000, "uncertified"),
    "crowded": crowded,
    "one place": lambda: table(tuple(STYLES), (2048,)),
    "one attention": lambda: table(("bsbr",)),
    "no order": lambda: pd.concat(
        [table(tuple(STYLES), (128,)).assign(swept="dtype", dtype=dtype) for dtype in ("float32", "bfloat16")]
    ),
    "alike": lambda: table(tuple(STYLES)).assign(latency_s=1e-3, latency_low_s=9e-4, latency_high_s=1.1e-3, peak_bytes=2**20),
}


@pytest.mark.parametrize("case", CASES)
def test_text_can_be_read_in_print(case: str) -> None:
    results = CASES[case]()
    fits = fitted(tuple(results["attention"].unique()))
    crossings = crossing(*(("standard", name, 1000, 500, 2000) for name in results["attention"].unique()[1:]))
    for name in FIGURES:
        picture = attempted(results, name, fits, crossings)
        if picture is None:
            continue
        assert picture.get_figwidth() == 7  # the full width of a paper, so that points are points in print
        picture.set_dpi(200)  # as it is saved
        FigureCanvasAgg(picture).draw()
        texts = visible_texts(picture)
        page = picture.bbox
        boxes = [text.get_window_extent() for text in texts]
        for text, box in zip(texts, boxes, strict=True):
            assert float(text.get_fontsize()) >= 6.5, (name, text.get_text())
            assert page.x0 <= box.x0 < box.x1 <= page.x1, (name, text.get_text())
            assert page.y0 <= box.y0 < box.y1 <= page.y1, (name, text.get_text())
        # Boxes of lines hold the room below them; boxes can overlap by half a point of it.
        own = [(text.get_text(), box.padded(-0.5 * picture.dpi / 72)) for text, box in zip(texts, boxes, strict=True)]
        for (one, a), (other, b) in itertools.combinations(own, 2):
            assert not a.overlaps(b), (name, one, other)


def visible_texts(picture: Figure) -> list[Text]:
    """The visible texts of a figure, without the labels of ticks beyond the limits of their axis."""
    texts = set(picture.findobj(Text))
    for axes in picture.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = set(axis.findobj(Text)) - {axis.label}
            texts -= labels
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts |= {label for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible()}
    return [text for text in texts if text.get_text().strip()]


def test_redrawing_changes_no_byte_and_no_setting(tmp_path: Path) -> None:
    some = ("standard", "bsbr", "mine")
    results = failing(table(some), "bsbr", 8192, "timeout")
    fits = {"scaling": fitted(some), "crossovers": crossing(("standard", "bsbr", 500, 300, 900))}
    before = dict(mpl.rcParams)
    first = {path.name: path.read_bytes() for path in draw_sweep(results, tmp_path / "a", fits)}
    with mpl.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "red", "font.family": "serif"}):
        second = {path.name: path.read_bytes() for path in draw_sweep(results, tmp_path / "b", fits)}
    assert dict(mpl.rcParams) == before
    assert set(first) == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    assert first == second
    assert first["latency.png"].startswith(b"\x89PNG")
    assert first["latency.svg"].startswith(b"<?xml")


def test_redrawing_replaces_earlier_figures_and_does_not_change_the_tables(tmp_path: Path) -> None:
    results, scaling = table(("standard", "bsbr")), fitted()
    copies = results.copy(), scaling.copy()
    draw_sweep(results, tmp_path, {"scaling": scaling})
    old = (tmp_path / "latency.svg").read_bytes()
    (tmp_path / "mine.png").write_bytes(b"not a figure of the registry")
    paths = draw_sweep(results.assign(latency_s=results["latency_s"] * 2), tmp_path)
    assert (tmp_path / "latency.svg").read_bytes() != old
    assert {*tmp_path.iterdir()} == {*paths, tmp_path / "mine.png"}  # the earlier scaling.svg is deleted
    pd.testing.assert_frame_equal(results, copies[0])
    pd.testing.assert_frame_equal(scaling, copies[1])


def test_a_folder_gives_the_same_figures_as_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = failing(table(), "linear", 8192, "oom")
    given = {"scaling": fitted(), "crossovers": crossing(("standard", "bsbr", 500, 300, math.nan))}
    source = tmp_path / "seq_len"
    source.mkdir()
    for name, written in {"results": results, **given}.items():
        written.to_csv(source / f"{name}.csv", index=False)
    assert main([str(source), "--plots", str(tmp_path / "plots")]) == 0
    direct = draw_sweep(results, tmp_path / "direct", given)
    for path in direct:
        assert (tmp_path / "plots" / "seq_len" / path.name).read_bytes() == path.read_bytes()
    assert f"{2 * len(FIGURES)} files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scaling", csv(fitted().drop(columns="factor")), "scaling.csv is no table of scaling: column factor missing"),
        ("scaling", csv(fitted().assign(exponent="two")), "exponent must hold numbers, got 'two'"),
        ("crossovers", csv(fitted()), "crossovers.csv is no table of crossovers: column first, second, at"),
    ],
)
def test_an_invalid_table_of_fits_is_an_error_of_one_sentence(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.csv").write_bytes(csv(table()))
    (tmp_path / f"{name}.csv").write_bytes(content)
    assert main([str(tmp_path), "--plots", str(tmp_path / "plots")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", csv(fitted().head(0))])
def test_an_empty_table_of_fits_gives_no_figure(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "scaling.csv").write_bytes(content)
    assert attempted(table(), "scaling", read_fits(tmp_path).get("scaling")) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"parameter_bytes": [2**20, 2**20 + 9000, 2**20]}, None),  # within 1 %
        ({"parameter_bytes": [272630, 1363149, 2**20]}, "parameters not matched: 270 KiB to 1.3 MiB"),
        ({"parameter_bytes": [2**10, 2**20, 2**20]}, "parameters not matched: 1 KiB to 1 MiB"),
        ({"match": ["parameters matched within 1 %", "", ""]}, "parameters matched within 1 %"),
    ],
)
def test_every_figure_names_unmatched_parameters(change: dict[str, list[object]], expected: str | None) -> None:
    results = table()
    for column, values in change.items():
        results[column] = results["attention"].map(dict(zip(("standard", "bsbr", "linear"), values, strict=True)))
    for name in FIGURES:
        both_fits = words(drawn(results, name, fitted()))
        assert ("matched" in both_fits) == (expected is not None)
        assert expected is None or expected in both_fits


def test_the_colours_in_the_documentation_are_those_of_the_styles() -> None:
    axes = drawn(table(("gau", "mine"))).axes[0]
    for name, look in style_of(["gau", "mine"]).items():
        assert to_hex(line(axes, name).get_color()) == look.colour
