"""The checks before results are committed: one made-up folder, and one corruption of it each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from evals.cli.outputs import build_tables
from evals.cli.result_checks import Submission, certificates, folders_below, intervals, origin, physics, verdicts
from evals.paths import ROOT
from evals.results import schema
from evals.results.ledger import Ledger
from evals.results.schema import write_table
from evals.tables import main
from tests.evals.results.test_merge import folder, measured


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a machine, as they should be committed."""
    machine = tmp_path_factory.mktemp("results") / "slow-3000-2-cores-a"
    records = measured(rounds=6)
    for record in records:
        if "provenance" in record:
            record["provenance"]["cpu"] = "Slow 3000 (2 cores)"
    folder(machine / "seq_len", records)
    Ledger(machine / "certificates.jsonl").append(
        *({"key": name, "attention": name, "failure": ""} for name in ("standard", "twice"))
    )
    return machine


@pytest.fixture
def results(right: Path, tmp_path: Path) -> Path:
    return shutil.copytree(right, tmp_path / right.name) / "seq_len"


def checked(results: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    code = main(["--check", str(results.parent)])
    *found, last = capsys.readouterr().out.splitlines()
    assert last.startswith("1 folder checked: ")
    return code, found


def edit(results: Path, column: str, value: object, name: str = "twice") -> None:
    """Changes a cell of the table, in both of its files."""
    for suffix, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        table = read(results / f"results.{suffix}")
        if isinstance(value, float) and column in table:
            table[column] = table[column].astype(float)
        table.loc[table["attention"] == name, column] = value
        getattr(table, f"to_{suffix}")(results / f"results.{suffix}", index=False)


def edit_ledger(results: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Changes or drops records of the ledger, and makes the tables again."""
    path = results / "samples.jsonl"
    records = [one for one in map(json.loads, path.read_text().splitlines()) if change(one) is not False]
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    for kind, table in build_tables(records).items():
        write_table(table, results, kind)


def test_results_as_they_should_be_have_no_finding(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in results.rglob("*")}
    assert checked(results, capsys) == (0, [])
    assert {path: path.read_bytes() for path in results.rglob("*")} == before


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("speedup", 9.0, "speedup is 9.0, and the samples give"),
        ("speedup", 9.0, "speedup 9 is outside its interval"),
        ("latency_s", 1e-9, "latency_s is 1e-09, and the samples give"),
        ("peak_bytes", 13, "peak_bytes is 13, and the samples give 12800"),
        ("verdict", "slower", "the verdict is slower, and the speed-up lies between"),
        ("roofline_fraction", 2.5, "it is 2.5 times as fast as the roofline of its machine: impossible"),
        ("outcome", "fine", "outcome: 'fine' is not one of"),
        ("outcome", "oom", "is not of type 'null'"),
        ("latency_ms", 1.0, "'latency_ms' was unexpected"),
        ("schema_version", 1, "schema_version: 4 was expected"),
        ("threads", 1.5, "threads: 1.5 is not of type 'integer'"),
    ],
)
def test_a_wrong_cell_is_found(
    results: Path, capsys: pytest.CaptureFixture[str], column: str, value: object, sentence: str
) -> None:
    edit(results, column, value)
    code, found = checked(results, capsys)
    assert code == 1
    assert any(line.startswith(f"{results / 'results.csv'}, line 3: ") and sentence in line for line in found), found


CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "the table is missing": (lambda at: (at / "results.csv").unlink(), "results.csv: is missing"),
    "a column is missing": (
        lambda at: pd.read_csv(at / "results.csv").drop(columns="latency_low_s").to_csv(at / "results.csv", index=False),
        "'latency_low_s' is a required property",
    ),
    "a row is missing": (
        lambda at: (at / "results.csv").write_text("".join((at / "results.csv").read_text().splitlines(True)[:-1])),
        "results.csv: has 1 rows, and the samples give 2",
    ),
    "a line is torn": (
        lambda at: (at / "results.csv").write_text((at / "results.csv").read_text()[:-80]),
        "results.csv: is no table",
    ),
    "the other file differs": (
        lambda at: pd.read_parquet(at / "results.parquet").assign(threads=64).to_parquet(at / "results.parquet", index=False),
        "results.parquet: does not hold the rows of results.csv",
    ),
    "the other file is missing": (lambda at: (at / "results.parquet").unlink(), "results.parquet: cannot be read"),
    "there are no samples": (lambda at: (at / "samples.jsonl").unlink(), "samples.jsonl: holds no record"),
    "a sample is torn": (
        lambda at: (at / "samples.jsonl").write_text((at / "samples.jsonl").read_text()[:-9]),
        "samples.jsonl: is damaged in line",
    ),
    "a sample was beautified": (
        lambda at: (at / "samples.jsonl").write_text((at / "samples.jsonl").read_text().replace('"round": 0', '"round": 99')),
        "and the samples give",
    ),
    "no certificate": (
        lambda at: (at.parent / "certificates.jsonl").unlink(),
        "line 2: standard has a number, and no certificates.jsonl above holds its certificate",
    ),
    "a failed certificate": (
        lambda at: (at.parent / "certificates.jsonl").write_text(
            (at.parent / "certificates.jsonl")
            .read_text()
            .replace('"twice", "failure": ""', '"twice", "failure": "it is not causal"')
        ),
        "line 3: twice has a number, and no certificates.jsonl above holds its certificate",
    ),
    "no command": (lambda at: edit_ledger(at, lambda one: one["kind"] != "command"), "samples.jsonl: records no command"),
    "no machine": (lambda at: edit_ledger(at, lambda one: one.pop("provenance", None)), "samples.jsonl: records no machine"),
    "no commit": (
        lambda at: edit_ledger(at, lambda one: one.update(provenance={"host": "a", "cpu": "P"}) if "provenance" in one else None),
        "has a measurement that does not record its commit",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_found(results: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    corrupt, sentence = CORRUPTIONS[name]
    corrupt(results)
    code, found = checked(results, capsys)
    assert code == 1
    assert any(sentence in line for line in found), found


def test_committed_results_can_be_repeated_and_are_certified() -> None:
    """The quick checks; test_schema has the columns, and `python -m evals.tables --check results/paper` takes a minute."""
    submissions = [Submission(folder) for folder in folders_below(ROOT / "results" / "paper")]
    quick = (intervals, verdicts, physics, certificates, origin)
    assert len(submissions) > 15
    assert [str(finding) for one in submissions for check in quick for finding in check(one)] == []


def test_a_folder_without_results_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err
    assert set(schema.kinds()) >= {"latency", "accuracy"}
