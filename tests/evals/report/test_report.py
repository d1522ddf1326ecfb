"""The report in a browser: it shows the values of the table, reacts to clicks, loads nothing, and escapes foreign markup."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from evals.errors import UsageError
from evals.paths import ROOT
from evals.plots.style import SPARE_COLOURS, STYLES
from evals.report import write
from evals.report.changes import changes
from evals.report.charts import DARK, charts, contrast, lighten
from evals.report.library import vega
from evals.report.sources import group_sources, read_sources
from tests.evals.sweeps import failing, table

pytestmark = pytest.mark.xdist_group("report")
PAPER = ROOT / "results" / "paper" / "seq_len"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
USED = ("button", "checkbox", "combobox", "DisclosureTriangle", "link", "radio", "region", "searchbox")
HOSTILE = ('<script>window.pwned=1</script>"', "\"><img src=x onerror='window.pwned=1'>", "\u202e{{7*7}}`${1}</style>")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        message = "no browser to open the report with: install chromium (apt install chromium), or name one in CHROMIUM"
        (pytest.fail if os.environ.get("CI_BROWSER") else pytest.skip)(message)
    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=path, args=["--no-sandbox"])


def open_page(browser: Browser, path: Path) -> tuple[Page, list[str]]:
    """Opens a page, and waits until it is ready; returns it with its console messages and requests."""
    page, complaints = browser.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: None if request.url == path.as_uri() else complaints.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    return page, complaints


def write_report(folder: Path, results: pd.DataFrame) -> Path:
    folder.mkdir(parents=True)
    results.assign(comparison="c", noise_floor=0.01).to_csv(folder / "results.csv", index=False)
    return write([folder], folder / "report.html")


@pytest.fixture(scope="module")
def paper(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, list[str], Path]:
    path = write([PAPER], tmp_path_factory.mktemp("paper") / "report.html")
    return *open_page(browser, path), path


MARKS = """id => [...document.querySelectorAll(`#${id} [aria-roledescription=value]`)].map(mark => {
    const {x, y, datum} = mark.__data__; return {x, y, attention: datum.attention, x_value: datum.x, value: datum.y}})"""


def test_it_loads_nothing_and_is_small(paper: tuple[Page, list[str], Path]) -> None:
    page, complaints, path = paper
    assert complaints == []
    data = page.evaluate("document.getElementById('data').textContent.length")
    assert path.stat().st_size - data < 1.5e6


def test_charts_hold_the_values_of_the_table(paper: tuple[Page, list[str], Path]) -> None:
    page, _, _ = paper
    results = pd.read_csv(PAPER / "results.csv")
    for chart, column in (("latency", "latency_s"), ("speedup", "speedup"), ("peak_memory", "peak_bytes")):
        marks = page.evaluate(MARKS, f"chart-0-{chart}")
        drawn = {(mark["attention"], mark["x_value"]): mark["value"] for mark in marks}
        assert drawn == {(row["attention"], row["seq_len"]): row[column] for _, row in results.iterrows()}
        ordered = [mark["y"] for mark in sorted(marks, key=lambda mark: mark["value"])]
        assert ordered == sorted(ordered, reverse=True)


def test_an_attention_can_be_hidden_and_an_axis_made_linear(paper: tuple[Page, list[str], Path]) -> None:
    page, complaints, _ = paper
    page.get_by_label("bsbr", exact=True).uncheck()
    expect(page.locator("#chart-0-state [aria-roledescription=value]")).to_have_count(49)
    assert {mark["attention"] for mark in page.evaluate(MARKS, "chart-0-latency")} == {*STYLES} - {"bsbr"}
    page.locator("#chart-0-latency").get_by_label("log y").uncheck()
    page.evaluate(
        """async () => {
            while (window.report[0].charts[0].view.scale('y').type !== 'linear') await new Promise(requestAnimationFrame);
        }"""
    )
    marks = sorted(page.evaluate(MARKS, "chart-0-latency"), key=lambda mark: mark["value"])
    first, middle, last = marks[0], marks[-7], marks[-1]
    part = (middle["value"] - first["value"]) / (last["value"] - first["value"])
    assert (middle["y"] - first["y"]) / (last["y"] - first["y"]) == pytest.approx(part)
    page.get_by_role("button", name="all", exact=True).click()
    expect(page.locator("#chart-0-state [aria-roledescription=value]")).to_have_count(56)
    assert complaints == []


def test_the_table_filters_sorts_and_downloads(paper: tuple[Page, list[str], Path]) -> None:
    page, _, _ = paper
    results = pd.read_csv(PAPER / "results.csv")
    page.get_by_label("Filter").fill(f"bsbr {results['comparison'].iloc[-1]}")  # words of no other row
    assert page.locator("[data-table] tbody tr").count() == 1
    assert page.evaluate("window.report[0].table.csv().trim().split('\\r\\n').length") == 2
    page.get_by_label("Filter").fill("")
    for direction in ("ascending", "descending"):
        page.get_by_role("button", name="latency_s", exact=True).click()
        assert page.locator(f"th[aria-sort={direction}]").count() == 1
        latencies = page.evaluate("window.report[0].table.filtered.map(row => row.latency_s)")
        assert latencies == sorted(results["latency_s"], reverse=direction == "descending")


def test_a_tooltip_stays_within_the_window(paper: tuple[Page, list[str], Path]) -> None:
    page, _, _ = paper
    page.set_viewport_size({"width": 500, "height": 500})
    for index in (0, 7, 20, 55):  # near each side
        page.locator("#chart-0-latency [aria-roledescription=value]").nth(index).hover(force=True)
        expect(page.locator(".tip")).to_contain_text("fraction of the roofline")
        box = page.locator(".tip").bounding_box()
        assert box is not None
        assert (box["x"] >= 0, box["y"] >= 0, box["x"] + box["width"] <= 500) == (True, True, True)
    page.mouse.move(0, 0)
    expect(page.locator(".tip")).to_be_hidden()
    page.set_viewport_size({"width": 1280, "height": 720})


def test_every_control_has_a_name_of_its_own(paper: tuple[Page, list[str], Path]) -> None:
    page, _, _ = paper
    session = page.context.new_cdp_session(page)
    session.send("Accessibility.enable")
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    used = [node for node in nodes if node.get("role", {}).get("value") in USED and not node.get("ignored")]
    names = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in used]
    assert len(names) > 30
    assert [pair for pair in names if not pair[1]] == []
    assert [pair for pair in set(names) if names.count(pair) > 1] == []


def test_a_print_fits_the_page_and_has_every_row(paper: tuple[Page, list[str], Path]) -> None:
    page, _, _ = paper
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 703, "height": 1000})  # A4 between its margins
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("[data-table] tbody tr").count() == 56
    assert "1–56 of 56 rows" in page.locator("[data-table]").inner_text()
    beyond = """[...document.querySelectorAll("table, svg, dl, pre")].filter(element => element.checkVisibility())
        .filter(element => element.getBoundingClientRect().right > innerWidth + 1).map(element => element.outerHTML.slice(0, 80))"""
    assert page.evaluate(beyond) == []
    assert not page.get_by_label("Filter").is_visible()
    assert page.locator(".charts svg text").first.is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("[data-table] tbody tr").count() == 50
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 1280, "height": 720})


def test_arrow_keys_read_the_values_out(paper: tuple[Page, list[str], Path]) -> None:
    page, _, _ = paper
    page.locator("#chart-0-latency .chart").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#chart-0-latency .readout").inner_text().startswith("attention standard, at ")
    unnamed = "[...document.querySelectorAll('input, select')].filter(element => !element.labels.length).length"
    assert page.evaluate(unnamed) == 0


def test_a_hostile_name_is_text(browser: Browser, tmp_path: Path) -> None:
    results = failing(table(HOSTILE), HOSTILE[1], 128, "crash").assign(detail=HOSTILE[1])
    page, complaints = open_page(browser, write_report(tmp_path / "<img src=x onerror=alert(1)>", results))
    assert page.evaluate("window.pwned") is None
    assert complaints == []
    assert json.loads(page.locator("#data").inner_text())["parts"][0]["attentions"] == list(HOSTILE)
    assert page.locator("img").count() == 0
    (reason,) = page.locator("#chart-0-latency [aria-roledescription=failed]").all()
    assert HOSTILE[1] in str(reason.get_attribute("aria-label"))


def test_five_thousand_rows_answer_within_200_ms(browser: Browser, tmp_path: Path) -> None:
    page, _ = open_page(browser, write_report(tmp_path / "many", table(tuple(STYLES), tuple(range(1, 626)))))
    page.evaluate(
        """() => {
            const search = document.querySelector("input[type=search]");
            window.act = {
                filter: (round) => { search.value = round % 2 ? "" : "bsbr"; search.dispatchEvent(new Event("input")); },
                sort: () => document.querySelector("thead button").click(),
                choose: () => document.querySelector("input[data-attention]").click(),
            };
            window.answer = async (name, round) => {
                window.act[name](round);
                await new Promise(requestAnimationFrame);
                await new Promise(resolve => setTimeout(resolve));
            };
        }"""
    )
    # CPU time of the page's thread: the time that it waits for a core does not count.
    counters = page.context.new_cdp_session(page)
    counters.send("Performance.enable", {"timeDomain": "threadTicks"})

    def computed_s() -> float:
        metrics = counters.send("Performance.getMetrics")["metrics"]
        return float(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))

    for name in ("filter", "sort", "choose"):
        durations_s = []
        for number in range(5):
            before = computed_s()
            page.evaluate("([name, round]) => window.answer(name, round)", [name, number])
            durations_s.append(computed_s() - before)
        assert 0 < min(durations_s) < 0.2, name


def test_two_sets_show_what_changed_and_their_references() -> None:
    folders = [PAPER.parent / "cpu" / name for name in ("attention", "long")]
    (part,) = group_sources(read_sources(folders))
    (change,) = changes(part)
    assert "only in A" not in change.note
    assert "; 11 only in attention; 11 only in long." in change.note
    both = pd.concat([pd.read_csv(folder / "results.csv")[["attention", "seq_len"]] for folder in folders])
    assert len(change.rows) + len(change.unchanged) == both.duplicated().sum() == 1
    (speedup,) = (chart for chart in charts(part) if chart["id"] == "speedup")
    assert speedup["title"] == "Speed-up over each set's own reference (standard, bsbr), higher is better"


def test_conversions_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"distillation holds conversions of pretrained models, which evals.report cannot use; use "
    ):
        write([PAPER.parent / "distillation"], tmp_path / "report.html")


def test_a_folder_without_results_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r" holds no results.csv; give a folder that"):
        write([tmp_path], tmp_path / "report.html")


def test_colours_have_enough_contrast_to_a_dark_page() -> None:
    for colour in (*SPARE_COLOURS, *(style.colour for style in STYLES.values())):
        assert contrast(lighten(colour), DARK) >= 4.5


def test_the_library_cannot_end_its_script() -> None:
    assert "</script" not in vega().lower()


@pytest.mark.parametrize("variables", [{}, {"HOME": "/proc/nobody"}, {"XDG_CACHE_HOME": __file__}])
def test_a_cache_folder_is_not_needed(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # no user is known
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda: "a script")
    assert vega() == "a script"
