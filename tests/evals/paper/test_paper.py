"""The study's figures and findings belong to the committed data, and captions name its origin."""

import io
import itertools
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from evals.paper.__main__ import main
from evals.paper.captions import caption
from evals.paper.crossings import crossings, stretches
from evals.paper.draw import STUDY, draw_half, drawings, missing_data
from evals.paper.figures import FIGURES
from evals.paper.findings import FINDINGS
from evals.paper.findings.data import required_source
from evals.paper.findings.speed import speed
from evals.paper.overview import comparison, dashboard, decode
from evals.paper.plan import plan
from evals.paper.radar import RINGS, radar, respects
from evals.paper.recipe import recipe, step_of
from evals.paper.sources import Source
from evals.paths import ROOT
from evals.plots.pareto import pareto
from evals.plots.save import FORMS, save
from evals.plots.style import render
from evals.results.frames import Sweep, check_table, sweeps
from tests.evals.learned import losses, recalled, sized
from tests.evals.sweeps import crossing, data, failing, fitted, line, table, words

RESULTS, PLOTS = ROOT / STUDY, ROOT / "plots" / "paper"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
ID = re.compile(r'(?<=[#"])[a-z]+[0-9a-f]{10}(?=[")])')


# --- what is committed ----------------------------------------------------------------------------


def shape(svg: str) -> str:
    """The file without numbers and without ids, which are hashes of numbers."""
    return NUMBER.sub("0", ID.sub("id", svg))


def coordinates(svg: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(ID.sub("", svg))]


def test_committed_figures_match_the_committed_data(tmp_path: Path) -> None:
    """A stale, superfluous or missing figure or caption fails; `python -m evals.figures paper` draws them again.

    About half a second of CPU a figure, nearly all of it in writing SVG.
    """
    drawn = {}
    for drawing in drawings(RESULTS):
        drawn[drawing.name] = save(drawing.picture, tmp_path / f"{drawing.name}.svg").read_text(encoding="utf-8")
        content = caption(drawing.name, drawing.description, drawing.sources, RESULTS)
        assert (PLOTS / f"{drawing.name}.md").read_text(encoding="utf-8") == content, drawing.name
    assert {path.name for path in PLOTS.iterdir()} == {f"{name}.{form}" for name in drawn for form in (*FORMS, "md")}
    for name, now in drawn.items():
        committed = (PLOTS / f"{name}.svg").read_text(encoding="utf-8")
        assert shape(committed) == shape(now), name
        # Another processor's logarithms may differ in the last digit: a hundredth of a point is nothing.
        assert coordinates(committed) == pytest.approx(coordinates(now), abs=0.01), name


def test_every_folder_that_a_figure_needs_is_in_the_recipe() -> None:
    for figure in FIGURES:
        for folder in (*figure.data, *figure.optional):
            assert step_of(folder) is not None, f"{figure.name} takes {folder}, which conf/paper.yaml does not make"
    assert len({one.name for one in FIGURES}) == len(FIGURES)


def test_every_committed_folder_is_in_the_recipe() -> None:
    """Otherwise nobody could measure the data of a figure again."""
    folders = {path.parent.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("results.csv")}
    assert folders <= {step.data for step in recipe()}


# --- captions and what is missing -----------------------------------------------------------------


def ledger(folder: Path, *records: dict[str, object]) -> Source:
    folder.mkdir(parents=True)
    pd.DataFrame({"comparison": ["aaaa", "bbbb"]}).to_csv(folder / "results.csv", index=False)
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Source(folder)


def description(key: str, commit: str, *, dirty: bool, day: str) -> dict[str, object]:
    facts = {"commit": commit, "dirty": dirty, "cpu": "a processor", "memory_bytes": 2**34, "platform": "Linux", "python": "3.11"}
    provenance = {**facts, "torch": "2.13", "gpu": None}
    return {"kind": "comparison", "comparison": key, "provenance": provenance, "time": f"{day}T10:00:00+00:00"}


def test_a_caption_names_the_origin_of_the_data(tmp_path: Path) -> None:
    one = ledger(
        tmp_path / "results" / "seq_len",
        {"kind": "command", "command": "python -m evals.run sweep=seq_len mine=1", "time": "2026-01-02"},
        description("aaaa", "1" * 40, dirty=True, day="2026-01-02"),
        description("bbbb", "2" * 40, dirty=False, day="2026-01-03"),
        description("cccc", "3" * 40, dirty=False, day="2026-01-01"),  # no row of the table has this key
    )
    content = caption("speedup", "What it draws.", [one], tmp_path / "results")
    for expected in (
        "What it draws.",
        "`python -m evals.figures paper`",
        "command: `python -m evals.run sweep=seq_len mine=1`",
        "commit: 111111111111, with changes",
        "commit: 222222222222\n",
        "machine: a processor, 16 GiB of memory, Linux, Python 3.11, torch 2.13",
        "config hash: aaaa, bbbb",
        "2026-01-02 and 2026-01-03",
    ):
        assert expected in content
    assert "cccc" not in content
    assert "3333" not in content


def test_a_caption_names_the_recipe_s_command_if_the_ledger_has_none(tmp_path: Path) -> None:
    one = ledger(tmp_path / "seq_len", description("aaaa", "1" * 40, dirty=False, day="2026-01-02"))
    assert f"command: `python -m evals.run sweep=seq_len sampling=careful results_dir={tmp_path}`" in caption(
        "a", "b", [one], tmp_path
    )


def test_missing_data_are_reported_with_the_command_that_makes_them(tmp_path: Path) -> None:
    content = missing_data(tmp_path)
    assert {one.name for one in FIGURES} == {*content}
    assert content["speedup"] == (
        f"speedup is not drawn, for there is no {tmp_path}/seq_len: "
        f"`python -m evals.run sweep=seq_len sampling=careful results_dir={tmp_path}` makes it"
    )
    assert "sweep=recall " in content["recall_front"]  # a pattern's first step
    with pytest.raises(ValueError, match=r"holds no data of the study: `python -m evals\.paper`"):
        draw_half(tmp_path, tmp_path / "plots")


def test_figures_without_data_are_left_out_and_stale_ones_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "seq_len"
    folder.mkdir(parents=True)
    table().to_csv(folder / "results.csv", index=False)
    stale = tmp_path / "plots" / "needle.svg"
    stale.parent.mkdir()
    stale.write_text("an earlier figure")
    some = [one for one in FIGURES if one.name in ("radar", "crossovers", "needle")]  # nothing was fitted, nothing learned
    paths = draw_half(tmp_path / "results", tmp_path / "plots", some)
    assert {path.name for path in paths} == {"radar.svg", "radar.png", "radar.md"} == {path.name for path in stale.parent.iterdir()}


# --- the figures that only the study has ----------------------------------------------------------


def swept(results: pd.DataFrame, *crossed: tuple[str, str, float, float, float], fits: pd.DataFrame | None = None) -> Sweep:
    tables = {"crossovers": check_table(crossing(*crossed), "crossovers")} if crossed else {}
    tables |= {} if fits is None else {"scaling": check_table(fits, "scaling")}
    ((_, sweep),) = sweeps(check_table(results), tables)
    return sweep


def measured() -> pd.DataFrame:
    """Standard is the reference, of speed-up 1; bsbr's is n^0.3 / 2: slower at 1 token, faster at 128 and more."""
    results = table(("standard", "bsbr"))
    return results.assign(speedup=results["speedup"].where(results["attention"] == "bsbr", 1.0))


def test_stretches_are_cut_at_the_interval_of_a_crossing() -> None:
    sweep = swept(measured(), ("standard", "bsbr", 10.0, 5.0, 20.0))
    assert [tuple(one) for one in stretches(sweep, "bsbr", "standard")] == [
        (1, 5, "slower"),
        (5, 20, "unclear"),
        (20, 8192, "faster"),
    ]
    assert [one.state for one in stretches(sweep, "standard", "bsbr")] == ["faster", "unclear", "slower"]


def test_an_interval_is_clipped_to_the_range_and_no_crossing_is_one_stretch() -> None:
    doubtful = swept(measured(), ("standard", "bsbr", math.nan, 0.0, 128.0))
    assert [tuple(one) for one in stretches(doubtful, "bsbr", "standard")] == [(1, 128, "unclear"), (128, 8192, "faster")]
    never = swept(measured().query("seq_len > 1"), ("standard", "bsbr", math.nan, math.nan, math.nan))
    assert [tuple(one) for one in stretches(never, "bsbr", "standard")] == [(128, 8192, "faster")]


def test_a_ring_of_the_radar_is_twice_as_bad() -> None:
    results = table(("standard", "bsbr"))  # bsbr's latency, memory and state are twice those of standard
    sweep = swept(results)
    picture = radar(sweep)
    assert picture is not None
    levels = {panel.get_title(): data(line(panel, panel.get_title()))[1] for panel in picture.axes}
    keys = [axis.key for axis in respects(sweep)]
    for key, ring in (("latency", RINGS - 1), ("memory", RINGS - 1), ("growth", RINGS), ("weights", RINGS)):
        assert levels["bsbr"][keys.index(key)] == pytest.approx(ring)
        assert levels["standard"][keys.index(key)] == pytest.approx(RINGS)
    content = " ".join(words(picture).split())
    assert all(f"{axis.key}: {axis.meaning}" in content for axis in respects(sweep))


def test_a_failure_has_no_corner_and_no_mark() -> None:
    sweep = swept(failing(table(), "linear", 8192, "oom"))
    (latency,) = [axis for axis in respects(sweep) if axis.key == "latency"]
    assert {*latency.costs} == {"standard", "bsbr"}
    picture = comparison(sweep)
    assert picture is not None
    assert "not shown: linear at 8k tokens (oom)" in words(picture)


def test_the_area_of_a_disc_is_proportional_to_the_parameters() -> None:
    sizes = {"standard": 2**20, "bsbr": 2**22, "linear": 2**20}
    picture = pareto(swept(table().assign(parameter_bytes=table()["attention"].map(sizes))), parameters=True)
    assert picture is not None
    (discs,) = (found for found in picture.axes[0].collections if found.get_gid() == "parameters")
    areas = dict(zip(sizes, discs.get_sizes(), strict=True))  # type: ignore[attr-defined]
    assert areas["bsbr"] / areas["standard"] == pytest.approx(4)


def test_text_can_be_read_in_print() -> None:
    every = ("standard", "bsbr", "linear", "sliding_window", "sparse", "hopfield", "delta_net", "gau")
    results = failing(table(every), "gau", 8192, "crash")
    pairs = tuple((a, b, 500.0, 300.0, 900.0) for a, b in itertools.combinations(every, 2))
    sweep = swept(results, *pairs, fits=fitted(every))
    for make in (comparison, dashboard, decode, radar, crossings):
        picture = render(make, sweep)
        assert picture is not None
        assert picture.get_figwidth() == 7
        assert_readable(picture, make.__name__)


def assert_readable(picture: Figure, name: str) -> None:
    """Checks that no text is small, leaves the page, or covers another; labels of ticks are not checked for overlap."""
    picture.set_dpi(200)
    FigureCanvasAgg(picture).draw()
    own = [text for axes in picture.axes for text in (axes.title, axes._left_title, *axes.texts)]
    texts = [text for text in [*picture.texts, *own] if text.get_text().strip()]
    for text in {*texts, *picture.findobj(Text)}:
        if text.get_text().strip():
            assert float(text.get_fontsize()) >= 6.5, (name, text.get_text())
    for text in texts:
        box = text.get_window_extent()
        assert picture.bbox.x0 <= box.x0 < box.x1 <= picture.bbox.x1, (name, text.get_text())
        assert picture.bbox.y0 <= box.y0 < box.y1 <= picture.bbox.y1, (name, text.get_text())
    level = [text for text in texts if not text.get_rotation()]
    boxes = [(text.get_text(), text.get_window_extent().padded(-0.5 * picture.dpi / 72)) for text in level]
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), (name, one, other)


# --- measuring ---------------------------------------------------------------------------------


def test_plan_of_everything_is_the_recipe_in_order() -> None:
    commands, results, plots = plan([])
    assert commands == [command for step in recipe() for command in step.lines("results/paper")]
    assert (results, plots) == (Path("results/paper"), Path("plots/paper"))


def test_arguments_select_data_and_are_passed_on() -> None:
    commands, results, _ = plan(["seq_len", "distillation", "results_dir=/tmp/mine", "sampling=quick"], dry=True)
    assert commands[0] == "python -m evals.run sweep=seq_len sampling=careful results_dir=/tmp/mine sampling=quick --dry-run"
    assert all("--results-dir /tmp/mine" in command and "sampling" not in command for command in commands[1:])
    assert results == Path("/tmp/mine")


def test_the_gpu_half_has_a_separate_folder() -> None:
    commands, results, _ = plan(["device=cuda"])
    assert commands
    assert all("results_dir=results/paper/cuda" in command and "device=cuda" in command for command in commands)
    assert results == Path("results/paper")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["seq"], "unknown data seq; known are seq_len, "),
        (["distillation", "device=cuda"], "distillation is measured on a CPU only"),
    ],
)
def test_a_wrong_argument_is_an_error_of_one_sentence(given: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


# --- what the page says ---------------------------------------------------------------------------


def test_findings_state_the_numbers_of_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "seq_len"
    folder.mkdir()
    table().to_csv(folder / "results.csv", index=False)
    crossing(("standard", "bsbr", 10.0, 5.0, 20.0)).to_csv(folder / "crossovers.csv", index=False)
    last = table()[(table()["attention"] == "bsbr") & (table()["seq_len"] == 8192)].iloc[0]
    content = speed(tmp_path)
    assert (
        f"is {last['speedup']:.3g} [{last['speedup_low']:.3g}, {last['speedup_high']:.3g}] times as fast as `standard`" in content
    )
    assert "faster at 128, 1000 and 8k tokens, slower at 1." in content
    assert "They cross at 10 [5, 20] tokens." in content
    losing = {row.split("|")[1].strip(): row for row in FINDINGS["disadvantages"](tmp_path).splitlines()}
    assert "| `standard` | 2.0× | 1 of 2 |" in losing["latency at 8k tokens"]


def test_required_data_raise_and_optional_data_are_reported_as_not_measured(tmp_path: Path) -> None:
    required_source.cache_clear()
    with pytest.raises(ValueError, match=r"seq_len holds no results, .* `python -m evals\.run sweep=seq_len .*` makes it"):
        FINDINGS["speed"](tmp_path)
    learned = ("recall", "recall_wider", "recall_sizes", "retrieval", "retrieval_length", "extrapolation", "needle", "language")
    for name in ("decode_all", *learned, "conversion_speed"):
        assert FINDINGS[name](tmp_path).startswith("*Not measured yet, ")


def test_a_table_of_recall_has_the_state_once_or_with_every_size(tmp_path: Path) -> None:
    required_source.cache_clear()
    rows = recalled()
    for name, found in {"recall": rows, "recall_sizes": sized(rows)}.items():
        (tmp_path / name).mkdir()
        found.to_csv(tmp_path / name / "results.csv", index=False)
        losses().to_csv(tmp_path / name / "curves.csv", index=False)
    once, each = ([row.split(" | ") for row in FINDINGS[name](tmp_path).splitlines()] for name in ("recall", "recall_sizes"))
    assert once[2][1:] == ["pairs 4", "pairs 8", "pairs 16", "state", "of standard |"]
    last = rows[rows["best"] & (rows["num_pairs"] == 16)].sort_values("accuracy", ascending=False)
    assert [row[0] for row in once[4:]] == [f"| `{name}`" for name in last["attention"]]
    states = {row[0]: row[4:] for row in once[4:]}  # 1000, 2000 and 3000 bytes
    assert states["| `bsbr`"] == ["1.95 KiB", "2.0× |"]
    assert each[2][1:] == ["hidden dim 4", "hidden dim 8", "hidden dim 16 |"]
    content = {row[0]: [one.partition(", ")[2] for one in row[1:]] for row in each[4:]}
    assert content["| `bsbr`"] == ["7.81 KiB", "15.6 KiB", "31.2 KiB |"]


def test_every_finding_is_well_formed_markdown() -> None:
    """In the findings of the committed data, every row of a table has as many columns as its head, and no number is NaN."""
    for name, tell in FINDINGS.items():
        content = tell(RESULTS)
        assert "nan" not in content, name
        for block in re.findall(r"(?:^\|.*\n?)+", content, flags=re.MULTILINE):
            assert len({row.count("|") for row in io.StringIO(block)}) == 1, name
