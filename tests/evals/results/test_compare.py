"""Comparison of two folders with known truth, and of a commit with a worse one."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, ttest_ind

from evals.benchmark import interleave
from evals.compare.__main__ import main
from evals.errors import UsageError
from evals.paths import ROOT
from evals.results.cells import Cell
from evals.results.compare import cell_ratio, compare_cells
from evals.results.ledger import Ledger
from tests.evals.commands import call

Numbers = Sequence[float] | NDArray[np.float64]


def cell(logs: Numbers, times: Sequence[float] = (), *, attention: str = "bsbr", floor: float = 0.0, **settings: Any) -> Cell:
    return Cell(
        attention=attention,
        settings={"seq_len": 512, **settings},
        origin={"processor": "P", "torch": "2", "host": "h", "commit": "c", "folder": "f"},
        options={},
        outcome="ok",
        detail="",
        noise_floor=floor,
        peak_bytes=1024.0,
        rounds=dict(enumerate(logs)),
        times=dict(enumerate(times or [0.0] * len(logs))),
    )


def in_turns(a: Numbers, b: Numbers, **other: Any) -> tuple[Cell, Cell]:
    """Round r of A is measured at 20 r seconds, that of B 10 seconds later."""
    return cell(a, [20.0 * r for r in range(len(a))], **other), cell(b, [20.0 * r + 10 for r in range(len(b))], **other)


# --- one cell -----------------------------------------------------------------------------------


def test_paired_rounds_give_students_t_on_their_differences() -> None:
    ratio, paired = cell_ratio(*in_turns([0.1, 0.5, 0.3], [0.0, 0.3, 0.0]))
    # By hand: differences 0.1, 0.2, 0.3 have mean 0.2 and deviation 0.1; t(0.975, 2) = 4.302653.
    distance = 4.302653 * 0.1 / math.sqrt(3)
    assert paired
    assert math.log(ratio.value) == pytest.approx(0.2)
    assert [math.log(ratio.low), math.log(ratio.high)] == pytest.approx([0.2 - distance, 0.2 + distance], rel=1e-6)
    # With 2 degrees of freedom, P(|T| > t) = 1 − t / √(2 + t²), here of t = 2√3.
    assert ratio.p_value == pytest.approx(1 - 2 * math.sqrt(3) / math.sqrt(14))


def test_unpaired_rounds_give_welchs_t() -> None:
    a, b = [0.31, 0.02, 0.17], [0.11, 0.09, 0.1, 0.12, 0.05]
    ratio, paired = cell_ratio(cell(a), cell(b))
    truth = ttest_ind(a, b, equal_var=False)  # scipy's own
    bounds = truth.confidence_interval(0.95)
    assert not paired
    assert ratio.p_value == pytest.approx(truth.pvalue)
    assert [math.log(value) for value in (ratio.low, ratio.high)] == pytest.approx([bounds.low, bounds.high])
    assert math.log(ratio.value) == pytest.approx(np.mean(a) - np.mean(b))


def test_folders_whose_rounds_do_not_scatter_are_no_proof() -> None:
    ratio, _ = cell_ratio(cell([0.1, 0.1]), cell([0.0, 0.0, 0.0]))
    assert ratio.p_value == pytest.approx(mannwhitneyu([2, 3], [-1, 0, 1], method="exact").pvalue)
    assert cell_ratio(*in_turns([0.1] * 2, [0.0] * 2))[0].p_value == 0.5


@pytest.mark.parametrize("rounds", [(1, 5), (5, 1), (1, 1)])
def test_one_round_gives_no_interval(rounds: tuple[int, int]) -> None:
    one, other = (cell([0.1] * number) for number in rounds)
    ratio, _ = cell_ratio(one, other)
    assert ratio.value == pytest.approx(1)
    assert all(map(math.isnan, (ratio.low, ratio.high, ratio.p_value)))
    assert compare_cells([one], [other])["verdict"].tolist() == ["ambiguous"]


def test_rounds_are_paired_only_if_their_times_alternate() -> None:
    a, b = in_turns([0.0] * 4, [0.0] * 4)
    assert cell_ratio(a, b)[1]
    assert cell_ratio(b, a)[1]
    after = cell([0.0] * 4, [100.0 + 20 * r for r in range(4)])
    assert not cell_ratio(a, after)[1]
    assert not cell_ratio(after, a)[1]
    assert not cell_ratio(a, cell([0.0] * 4, [0.0] * 4))[1]
    elsewhere = Cell(**{**vars(b), "origin": {**b.origin, "host": "other"}})
    assert not cell_ratio(a, elsewhere)[1]
    # Base kept an old round 0 while here began again.
    restarted = Cell(**{**vars(b), "times": {**b.times, 0: 35.0}})
    assert not cell_ratio(a, restarted)[1]


def test_drift_between_rounds_cancels_in_pairs() -> None:
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 0.3, 8)
    a, b = shared + generator.normal(0, 0.005, 8), shared + 0.06 + generator.normal(0, 0.005, 8)
    assert compare_cells(*([one] for one in in_turns(a, b)))["verdict"].tolist() == ["slower"]
    assert compare_cells([cell(a)], [cell(b)])["verdict"].tolist() == ["ambiguous"]


# --- many cells ---------------------------------------------------------------------------------


def sets(generator: np.random.Generator, cells: int, ratio: float, *, paired: bool) -> tuple[list[Cell], list[Cell]]:
    """Two folders in which B takes `ratio` times as long, with noise of each cell, and of each round if they are paired."""
    a, b = [], []
    for number in range(cells):
        rounds = (6, 6) if paired else (5, 8)
        logs = [generator.normal(0, spread, length) for spread, length in zip((0.02, 0.05), rounds, strict=True)]
        if paired:
            shared = generator.normal(0, 0.2, 6)
            one, other = in_turns(logs[0] + shared, logs[1] + shared + math.log(ratio), seq_len=number)
        else:
            one, other = cell(logs[0], seq_len=number), cell(logs[1] + math.log(ratio), seq_len=number)
        a.append(one)
        b.append(other)
    return a, b


@pytest.mark.parametrize("paired", [True, False])
def test_equal_folders_rarely_differ(paired: bool) -> None:
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        verdicts = compare_cells(*sets(generator, 6, 1.0, paired=paired))["verdict"]
        wrong += bool(verdicts.isin(["faster", "slower"]).any())
    assert wrong <= 31  # of 20 expected where alpha is 5 %; more than 31 has a probability below 1 %


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_cover_a_known_ratio(paired: bool) -> None:
    a, b = sets(np.random.default_rng(2), 2000, 1.3, paired=paired)
    rows = compare_cells(a, b)
    held = (rows["ratio_low"] <= 1 / 1.3) & (rows["ratio_high"] >= 1 / 1.3)
    assert 0.935 <= held.mean() <= 0.965
    assert rows["ratio"].median() == pytest.approx(1 / 1.3, rel=0.01)


def test_a_large_ratio_is_found_in_every_cell() -> None:
    for paired in (True, False):
        a, b = sets(np.random.default_rng(3), 10, 1.5, paired=paired)
        assert set(compare_cells(a, b)["verdict"]) == {"slower"}
        assert set(compare_cells(b, a)["verdict"]) == {"faster"}


def test_verdicts_are_corrected_for_the_number_of_cells() -> None:
    doubtful = in_turns([0.15, 0.5, 0.3, 0.25], [0.0, 0.3, 0.0, 0.1])
    assert 0.01 < cell_ratio(*doubtful)[0].p_value < 0.02
    flat = [in_turns([0.1, 0.0, 0.1, 0.0], [0.0, 0.1, 0.0, 0.1], seq_len=n) for n in range(2)]
    alone = compare_cells([doubtful[0]], [doubtful[1]])
    among = compare_cells([doubtful[0], *(a for a, _ in flat)], [doubtful[1], *(b for _, b in flat)])
    assert alone["verdict"].tolist() == ["faster"]
    assert among["verdict"].tolist() == ["ambiguous"] * 3
    assert among["p_holm"][0] == pytest.approx(3 * alone["p_holm"][0])


@pytest.mark.parametrize(
    ("floors", "verdict"), [((0.01, 0.02), "slower"), ((0.01, 0.07), "ambiguous"), ((0.07, 0.01), "ambiguous")]
)
def test_no_verdict_below_the_higher_noise_floor(floors: tuple[float, float], verdict: str) -> None:
    a = [cell([0.0, 0.001, -0.001, 0.0], floor=floors[0])]
    b = [cell([0.05, 0.051, 0.049, 0.05], floor=floors[1])]
    rows = compare_cells(a, b)
    assert rows["verdict"].tolist() == [verdict]
    assert rows["noise_floor"].tolist() == [max(floors)]


def test_a_setting_unknown_to_one_folder_counts_only_if_it_varies() -> None:
    old, new = [cell([0.0, 0.1])], [cell([0.0, 0.1], match="none")]
    assert len(compare_cells(old, new)) == 1
    with pytest.raises(UsageError, match=r"chunk_size is not given in A and 16, 32 in B"):
        compare_cells(old, [cell([0.0, 0.1], chunk_size=size) for size in (16, 32)])


# --- folders ------------------------------------------------------------------------------------


@dataclass
class Made:
    """Writes a result folder as evals.run does, from the latencies of its rounds in seconds."""

    attention: str = "bsbr"
    rounds: Sequence[float] = (0.0100, 0.0101, 0.0099, 0.0100, 0.0100)
    outcome: str = "ok"
    detail: str = ""
    peak_bytes: int | None = 2**20
    floor: float | None = 0.01
    settings: dict[str, Any] = field(default_factory=dict)


def write(folder: Path, made: Sequence[Made], *, processor: str = "P", start: int = 0, step: int = 60) -> Path:
    ledger = Ledger(folder / "samples.jsonl")
    rows = []
    for number, one in enumerate(made):
        settings = {"workload": "prefill", "seq_len": 512, **one.settings, "processor": processor, "torch": "2.13"}
        of = {"comparison": f"id{number}", "attention": one.attention}
        described = {"settings": settings, "candidates": {one.attention: {"_target_": one.attention}}}
        records: list[dict[str, Any]] = [
            {"kind": "comparison", "comparison": f"id{number}", **described, "provenance": {"host": "h", "commit": "c" * 40}}
        ]
        for index, middle in enumerate(one.rounds if one.outcome == "ok" else ()):
            time = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=start + step * index)
            common = {"kind": "latency", **of, "round": index, "outcome": "ok", "time": time.isoformat(timespec="seconds")}
            slices = [[middle * 0.9, middle], [middle, middle, middle * 3]]  # an outlier does not move the median
            records += [
                {**common, "is_control": False, "time_slices": slices},
                {**common, "is_control": True, "time_slices": [[middle * 7]]},
            ]
        ledger.append(*records)
        latency = one.rounds[0] if one.outcome == "ok" else None
        measured = {"latency_s": latency, "noise_floor": one.floor, "peak_bytes": one.peak_bytes}
        rows.append({**of, **settings, "outcome": one.outcome, "detail": one.detail, **measured})
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert all(len(line) <= 80 for line in out.splitlines())
    return code, out, err


def slowed(by: float) -> list[float]:
    return [latency * by for latency in Made().rounds]


@pytest.mark.parametrize(
    ("factor", "threshold", "code"),
    [(1.0, "5%", 0), (0.8, "5%", 0), (1.04, "5%", 0), (1.2, "5%", 1), (1.2, "0.25", 0), (1.04, "3%", 1)],
)
def test_exit_code_1_for_a_slowdown_above_the_threshold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, threshold: str, code: int
) -> None:
    a, b = write(tmp_path / "a", [Made()]), write(tmp_path / "b", [Made(rounds=slowed(factor))], start=1000)
    got, out, err = run_command(capsys, a, b, "--threshold", threshold)
    assert (got, err) == (code, "")
    assert f"{1 / factor:.3f}x" in out
    assert ("regression: bsbr takes" in out) == bool(code)
    assert "not interleaved" in out


def test_a_missing_noise_floor_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", [Made(floor=None)]), write(tmp_path / "b", [Made(floor=None, rounds=slowed(1.2))], start=1000)
    code, out, _ = run_command(capsys, a, b)
    assert code == 1
    assert "Where there is no floor, nothing was measured against itself." in out


def test_a_missing_folder_of_the_csv_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", [Made()]), write(tmp_path / "b", [Made()])
    code, _, err = run_command(capsys, a, b, "--csv", tmp_path / "nowhere" / "rows.csv")
    assert code == 2
    assert "nowhere" in err
    assert len(err.splitlines()) == 1


def test_interleaved_folders_are_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = [1.0, 1.5, 0.7, 1.2, 0.9]
    a = write(tmp_path / "a", [Made(rounds=[0.01 * by for by in noise])])
    b = write(tmp_path / "b", [Made(rounds=[0.0108 * by * (1 + 0.001 * n) for n, by in enumerate(noise)])], start=25)
    code, out, _ = run_command(capsys, a, b)
    assert code == 1
    assert "slower" in out
    assert "not interleaved" not in out


def test_cells_of_one_folder_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Made("sparse", outcome="oom", detail="needs 9 GiB of 8", peak_bytes=None, settings={"seq_len": 8192})
    a = write(
        tmp_path / "a", [Made(), Made("linear"), Made("gau", outcome="crash", peak_bytes=None), Made("old", outcome="timeout")]
    )
    b = write(tmp_path / "b", [Made(), broken, Made("gau"), Made("old", outcome="timeout")])
    code, out, _ = run_command(capsys, a, b, "--csv", tmp_path / "out.csv")
    names = ("bsbr", "linear", "sparse", "gau", "old")
    verdicts = {line.split()[0]: line for line in out.splitlines() if line.split()[:1] and line.split()[0] in names}
    assert verdicts["bsbr"].endswith(" same")
    assert verdicts["linear"].endswith("only in A")
    assert verdicts["sparse"].endswith("only in B")
    assert verdicts["gau"].endswith("crash -> ok")
    assert verdicts["old"].endswith("timeout in both")
    assert code == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [(row["attention"], row["outcome_a"], row["outcome_b"]) for row in rows] == [
        ("bsbr", "ok", "ok"),
        ("linear", "ok", "absent"),
        ("gau", "crash", "ok"),
        ("old", "timeout", "timeout"),
        ("sparse", "absent", "oom"),
    ]
    assert float(rows[0]["ratio"]) == 1


def test_a_cell_that_fails_only_in_b_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", [Made(), Made("sparse")])
    b = write(tmp_path / "b", [Made(), Made("sparse", outcome="oom", detail="needs 9 GiB of 8", peak_bytes=None)])
    code, out, _ = run_command(capsys, a, b)
    assert code == 1
    assert "regression: sparse was ok and is oom: needs 9 GiB of 8" in out


@pytest.mark.parametrize(
    ("peak", "code", "is_printed"), [(2**20, 0, False), (2**20 + 4096, 0, True), (2**21, 1, True), (2**19, 0, True)]
)
def test_changed_memory_is_printed_and_growth_is_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], peak: int, code: int, is_printed: bool
) -> None:
    a = write(tmp_path / "a", [Made(), Made("linear")])
    b = write(tmp_path / "b", [Made(peak_bytes=peak), Made("linear")])
    got, out, _ = run_command(capsys, a, b)
    assert got == code
    _, _, block = out.partition("peak memory where it changed")
    assert bool(block) == is_printed
    assert ("regression: bsbr holds 2097152 bytes instead of 1048576" in block) == bool(code)
    assert "linear" not in block


def test_markdown_of_a_worked_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", [Made("a|b", rounds=[0.1] * 5), Made("linear"), Made("gau")])
    twice = Made("a|b", rounds=[0.2 * by for by in (1.01, 0.99, 1.0, 1.01, 0.99)], peak_bytes=2**20 + 2**19)
    b = write(
        tmp_path / "b", [twice, Made("linear"), Made("gau", outcome="crash", detail="it *died*", peak_bytes=None)], start=1000
    )
    assert main([str(a), str(b), "--markdown", "--threshold", "10%"]) == 1
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading == "**3 regressions in 3 cells**"
    assert r"- a\|b takes 100.0% more time" in lines
    assert r"- a\|b holds 1572864 bytes instead of 1048576" in lines
    assert r"- gau was ok and is crash: it \*died\*" in lines
    table = [[text.strip() for text in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    assert table[0] == ["attention", "time of A", "time of B", "change of time", "of memory", "verdict"]
    worse, same, failed = table[2:]
    # Welch's t by hand: five logarithms of deviation 0.01 around log 2, none around the other mean, so 4 degrees of freedom;
    # t(0.975, 4) = 2.776 and an error of 0.01 / √5 give a factor of exp(0.0124).
    assert worse == [r"a\|b", "100 ms", "200 ms", "+100.0% (+97.5% to +102.5%)", "+50.0%", "slower"]
    # Two such sides, each with logarithms of variance 2 · 0.01² / 4: t(0.975, 8) = 2.306 and an error of 0.01 / √5.
    assert same[3:] == ["+0.0% (-1.0% to +1.0%)", "", "same"]
    assert failed[1:] == ["10 ms", "", "", "", "ok -\\> crash".replace("\\>", "&gt;")]


def test_different_machines_and_long_names_fit_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a_variant_with_a_very_long_name_of_48_characters"
    many = [Made(name, settings={"seq_len": n, "dtype": dtype}) for n in (512, 1024) for dtype in ("float32", "bfloat16")]
    a, b = (
        write(tmp_path / "a", many, processor="Slow 3000 (2 cores)"),
        write(tmp_path / "b", many, processor="Fast 9000 (64 cores)"),
    )
    code, out, _ = run_command(capsys, a, b)
    assert code == 0
    assert "Their processors differ: the ratios compare these machines as much as the code." in " ".join(out.split())
    flowing = " ".join(out.split())  # where a line breaks depends on how long the folder's name is
    assert "Slow 3000 (2 cores)" in flowing
    assert "Fast 9000 (64 cores)" in flowing
    assert max(map(len, out.splitlines())) <= 80
    assert f"{name} 1024    bfloat16" in out


def test_an_incomplete_line_is_reported_and_the_rest_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", [Made()]), write(tmp_path / "b", [Made()])
    with (a / "samples.jsonl").open("a") as file:
        file.write('{"kind": "lat')
    code, _, err = run_command(capsys, a, b)
    assert code == 0
    assert err == f"warning: {a / 'samples.jsonl'} is damaged in line 12, which is left out\n"


def without(key: str) -> str:
    records = [{"kind": "comparison", "comparison": "id0", "settings": {}, "candidates": {}}]
    return json.dumps({name: value for name, value in records[0].items() if name != key})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("results.csv", None, "holds raw samples, and no results.csv, which `python -m evals.tables"),
        ("samples.jsonl", None, "holds no samples.jsonl; give a folder"),
        ("results.csv", "", "is corrupt: No columns to parse from file"),
        ("results.csv", "a,b\n1,2,3,4\n1\n", "is corrupt: its results.csv or samples.jsonl lacks 'comparison'"),
        ("results.csv", "\udcff", "is corrupt: 'utf-8' codec can't decode"),
        ("results.csv", "attention,comparison,outcome,latency_s,peak_bytes\n", "its results.csv has no row"),
        ("results.csv", "attention,comparison,outcome,latency_s,peak_bytes,detail\nx,id0,ok,fast,1,\n", "is corrupt: must be real"),
        ("samples.jsonl", "nonsense", "lacks 'id0'"),
        ("samples.jsonl", without("comparison"), "lacks 'comparison'"),
        ("samples.jsonl", without("settings"), "no sample of id0"),
    ],
)
def test_a_folder_without_usable_results_is_one_sentence_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, words: str
) -> None:
    a, b = write(tmp_path / "a", [Made()]), write(tmp_path / "b", [Made()])
    (b / name).unlink()
    if text is not None:
        (b / name).write_text(text, errors="surrogateescape")
    code, out, err = run_command(capsys, a, b)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"error: {b}")
    assert words in last


@pytest.mark.parametrize("latency", ["0.0", "-1", "null", '"fast"', "1e999", "[]"])
def test_an_invalid_latency_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], latency: str) -> None:
    a, b = write(tmp_path / "a", [Made()]), write(tmp_path / "b", [Made()])
    lines = (b / "samples.jsonl").read_text().splitlines()
    record = json.loads(lines[1])
    lines[1] = json.dumps({**record, "time_slices": ["?"]}).replace('"?"', f"[{latency}]")
    (b / "samples.jsonl").write_text("\n".join(lines))
    code, _, err = run_command(capsys, a, b)
    assert code == 2
    assert err.startswith(f"error: {b} is corrupt: ")
    assert len(err.splitlines()) == 1


def test_no_cell_in_common_names_the_settings_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", [Made(settings={"dtype": "float32"}), Made(settings={"dtype": "float32", "seq_len": 64})])
    b = write(tmp_path / "b", [Made(settings={"dtype": "bfloat16", "seq_len": 128})])
    code, _, err = run_command(capsys, a, b)
    assert code == 2
    assert err == (
        "error: A and B have no cell in common: seq_len is 512, 64 in A and 128 in B; dtype is float32 in A and bfloat16 in B\n"
    )


def test_two_machines_in_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", [Made()]), write(tmp_path / "b", [Made(), Made()])
    code, _, err = run_command(capsys, a, b)
    assert code == 2
    assert "B holds bsbr twice under the same settings" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "two folders of results are compared, got none"),
        (("a",), "two folders of results are compared, got a"),
        (("a", "b", "c"), "two folders"),
        (("a", "b", "--treshold=5%"), "two folders"),
        (("a", "b", "--threshold", "5"), "--threshold must be a fraction such as 5% or 0.05, got '5'"),
        (("a", "b", "--threshold=-1%"), "--threshold must be"),
        (("a", "b", "--threshold"), "expected one argument"),
        (("--base", "HEAD", "--rounds", "many"), "invalid int value"),
        (("a", "b", "--threshold", "much"), "--threshold must be"),
        (("a", "b"), "a does not exist; give a folder that evals.run wrote"),
        (("--base", "no-such-commit"), "'no-such-commit' is no commit of"),
        (("--base", "HEAD", "--rounds", "1"), "--rounds must be at least 2"),
        (("--base", "HEAD", "sampling.max_rounds=3"), "sampling.max_rounds=3 cannot be given with --base"),
        (("--base", "HEAD", "+results_dir=x"), "results_dir=x cannot be given with --base"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_command(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("code", "words"), [(0, ""), (1, "a regression"), (2, "")])
def test_the_workflow_fails_as_the_command_does_and_keeps_its_table(tmp_path: Path, code: int, words: str) -> None:
    workflow = yaml.safe_load((ROOT / "docs" / "assets" / "bench.yml").read_text())
    script = workflow["jobs"]["compare"]["steps"][-1]["run"].replace("${{ github.event.pull_request.base.sha }}", "abc")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > arguments\necho "{words}"\nexit {code}\n')
    python.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": "summary", **workflow["env"]}
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=variables, check=False, capture_output=True, text=True)
    assert done.returncode == code
    assert (tmp_path / "summary").read_text() == f"{words}\n"
    given = (tmp_path / "arguments").read_text().split("\n")
    assert given[:7] == ["-m", "evals.compare", "--base", "abc", "--markdown", "--threshold", "5%"]
    assert given[7:-1] == ["sweep=seq_len", "attention=[standard,bsbr]", "shape.seq_len=512,2048"]


# --- another commit -----------------------------------------------------------------------------

of_a_repository = pytest.mark.xdist_group("repository")

PROBE = """
from baselines.standard import StandardAttention

class Probe(StandardAttention):
    def attend(self, *tensors):
        spare = tensors[0].new_zeros({size})
        return super().attend(*tensors)
"""
SMALL = ("model.hidden_dim=32", "model.num_heads=2", "shape.seq_len=64", "sampling=quick", "attention=[probe]", "relative_to=probe")


def git(tree: Path, *arguments: str) -> str:
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(["git", *author, *arguments], cwd=tree, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with this code. In its working tree an attention holds 1 MiB more than in its last commit."""
    tree = tmp_path_factory.mktemp("compare").resolve() / "repository"
    for name in ("bsbr", "baselines", "evals", "conf", "schemas"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / ".gitignore").write_text("/results\n__pycache__\n")
    (tree / "conf" / "attention" / "probe.yaml").write_text("probe:\n  _target_: baselines.probe.Probe\n")
    (tree / "baselines" / "probe.py").write_text(PROBE.format(size=2**16))
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "--message=base")
    (tree / "baselines" / "probe.py").write_text(PROBE.format(size=2**16 + 2**18))
    return tree


def environment(tree: Path) -> dict[str, str]:
    """A trap: Python finds the code of the working tree from any folder, and not that of the folder in which it starts."""
    return {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}


def launch(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evals.compare", *arguments]
    return subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=False)


@of_a_repository
def test_the_base_runs_its_own_code_and_b_that_of_the_working_tree(repository: Path) -> None:
    done = launch(repository, "--base", "HEAD", "--rounds", "2", *SMALL)
    folder = repository / "results" / "compare" / git(repository, "rev-parse", "HEAD")[:12]
    base, here = (Ledger(folder / side / "samples.jsonl").read()[0] for side in ("base", "here"))
    peaks = [record["peak_bytes"] for records in (base, here) for record in records if "peak_bytes" in record]
    assert len(peaks) == 2, done.stderr
    assert peaks[1] - peaks[0] == 4 * 2**18, done.stderr
    for records in (base, here):
        rounds = {record["round"] for record in records if record["kind"] == "latency" and not record["is_control"]}
        assert rounds == {0, 1}
        assert len({record["comparison"] for record in records if record["kind"] != "command"}) == 1
    assert done.returncode == 1
    assert f"regression: probe holds {peaks[1]} bytes instead of {peaks[0]}" in done.stdout
    assert "not interleaved" not in done.stdout
    assert git(repository, "worktree", "list").splitlines() == [
        f"{repository}  {git(repository, 'rev-parse', '--short', 'HEAD')} [{git(repository, 'branch', '--show-current')}]"
    ]


@of_a_repository
def test_ctrl_c_removes_the_checkout_of_the_base(repository: Path) -> None:
    command = [sys.executable, "-m", "evals.compare", "--base", "HEAD", *SMALL]
    with subprocess.Popen(command, cwd=repository, env=environment(repository), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.startswith("results go to") for line in process.stderr)
        assert len(git(repository, "worktree", "list").splitlines()) == 2
        process.send_signal(signal.SIGINT)
        words = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted" in words
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@of_a_repository
def test_a_base_that_cannot_be_measured_is_reported_with_its_error(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(tree: Path, *more: str) -> str:
        """The error of a command for `tree` that runs in this process, with this process's imports."""
        monkeypatch.chdir(tree)
        monkeypatch.setattr(interleave, "ROOT", tree)
        for name, value in environment(tree).items():
            monkeypatch.setenv(name, value)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            done = call(main, "--base", "HEAD", *SMALL, *more)
        finally:
            signal.signal(signal.SIGTERM, handler)
        assert done.returncode == 2
        return done.stderr

    words = refused(repository, "shape.width=3")
    assert "cannot be measured: error: Could not override 'shape.width'" in words.splitlines()[-1]
    before = repository.parent / "before"
    shutil.copytree(repository, before)
    git(before, "rm", "-r", "--quiet", "--cached", "evals/run.py")
    git(before, "commit", "--quiet", "--message=before there was a harness")
    assert refused(before).startswith("error: base cannot be measured: there is no evals.run in it")
