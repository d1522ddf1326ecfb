"""All committed tables conform to their JSON Schemas, and rows with a wrong column, type or version do not."""

import hashlib
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonschema import Draft202012Validator

from evals import report
from evals.cli.outputs import build_tables
from evals.errors import UsageError
from evals.paths import ROOT
from evals.plots.style import FAILURES
from evals.results import frames
from evals.results.cells import read_cells
from evals.results.csv_rows import parse_cell, read_rows
from evals.results.folder import ResultFolder
from evals.results.schema import FOLDER, VERSION, kind_of, schema, version, write_table
from evals.tables import main
from tests.evals.results.test_latency_table import sweep as records_of_a_sweep

PAPER = ROOT / "results" / "paper"
KINDS = sorted(path.name.partition(".")[0] for path in FOLDER.glob("*.schema.json"))
TABLES = sorted(PAPER.rglob("*.csv"))


@cache
def validator(kind: str) -> Draft202012Validator:
    return Draft202012Validator(schema(kind))


def objections(row: dict[str, Any], kind: str) -> list[str]:
    return [error.message for error in validator(kind).iter_errors(row)]


# --- the schemas --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_has_a_description_and_numbers_a_unit(kind: str) -> None:
    Draft202012Validator.check_schema(schema(kind))
    assert schema(kind)["$id"] == f"urn:bsbr:{kind}:{version(kind)}"
    known = schema(kind)["properties"]
    assert [name for name in known if name in schema(kind)["required"]] == schema(kind)["required"]
    for name, column in known.items():
        assert column["description"]
        counts = {"integer", "number"} & {*([column["type"]] if isinstance(column["type"], str) else column["type"])}
        assert bool(counts) == bool(column.get("unit")), name


def test_a_changed_schema_has_a_new_version() -> None:
    """schemas/versions.json holds a digest of each version without its descriptions; any other change needs a new version."""
    known = json.loads((FOLDER / "versions.json").read_text())
    for kind in KINDS:
        parts = {name: part for name, part in schema(kind).items() if name not in ("title", "description")}
        for group in ("properties", "patternProperties"):
            if group in parts:
                parts[group] = {name: {**part, "description": ""} for name, part in parts[group].items()}
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        assert known[kind].get(str(version(kind))) == digest, (
            f"{kind}.schema.json changed: raise {VERSION} in it and in its $id, and add it with {digest} to versions.json; "
            "change a line there only where no table was written under its version yet"
        )


def test_figures_know_all_outcomes() -> None:
    assert schema("latency")["properties"]["outcome"]["enum"] == ["ok", *FAILURES]


# --- rows that are right ------------------------------------------------------------------------


@pytest.mark.parametrize("path", TABLES, ids=lambda path: str(path.relative_to(PAPER)))
def test_every_committed_row_conforms_to_its_schema(path: Path) -> None:
    found = list(read_rows(path))
    # Of the thousands of points of a loss curve, some.
    for row in found[:: 1 + len(found) // 100]:
        assert objections(row, kind_of(path)) == []
    assert pq.read_table(path.with_suffix(".parquet")).to_pylist() == found


def test_parquet_columns_have_the_types_of_the_schema_even_if_empty() -> None:
    kinds = {
        "string": pa.types.is_string,
        "integer": pa.types.is_int64,
        "number": pa.types.is_float64,
        "boolean": pa.types.is_boolean,
    }
    for path in TABLES:
        stored = pq.read_schema(path.with_suffix(".parquet"))
        known = schema(kind_of(path))["properties"]
        for name in stored.names:
            (kind,) = {known[name]["type"]} if isinstance(known[name]["type"], str) else {*known[name]["type"]} - {"null"}
            of_type = stored.field(name).type
            assert kinds[kind](of_type) or (kind == "string" and pa.types.is_large_string(of_type)), f"{path}: {name} is {of_type}"


def test_rows_with_a_failure_and_with_an_option_of_the_user_conform(tmp_path: Path) -> None:
    records = records_of_a_sweep({n: {"standard": 0.01 * n, "twice": 0.005 * n} for n in (128, 512, 1024, 2048)})
    failed = next(one for one in records if one["kind"] == "latency" and one["attention"] == "twice")
    failed.update(outcome="oom", detail="it needed 9 GiB")
    for one in records:
        if one["kind"] == "comparison":  # of a user's workload with an option
            one["settings"] = {**one["settings"], "workload": "mine", "depth": 3}
    tables = build_tables(records)
    assert sorted(tables) == ["crossovers", "latency", "scaling"]
    for kind, table in tables.items():
        path = write_table(table, tmp_path, kind)
        rows = list(read_rows(path))
        assert [objections(row, kind) for row in rows] == [[]] * len(rows)
        assert len(rows) == len(table) > 0
        assert {row[VERSION] for row in rows} == {version(kind)}


# --- rows that are wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        ("seq_len", {"latency_s": "fast"}, "'fast' is not of type 'number', 'null'"),
        ("seq_len", {"seq_len": 12.5}, "12.5 is not of type 'integer'"),
        ("seq_len", {"latency_s": ...}, "'latency_s' is a required property"),
        ("seq_len", {VERSION: ...}, f"'{VERSION}' is a required property"),
        ("seq_len", {VERSION: 0}, f"{version('latency')} was expected"),
        ("seq_len", {"latency_ms": 1.0}, "('latency_ms' was unexpected)"),
        ("seq_len", {"outcome": "slow"}, "'slow' is not one of"),
        ("seq_len", {"latency_s": None}, "None should not be valid under"),
        ("seq_len", {"outcome": "oom"}, "is not of type 'null'"),
        ("retrieval", {"accuracy": 1.5}, "1.5 is greater than the maximum of 1"),
        ("retrieval", {"recall": 1.0}, "('recall' was unexpected)"),
        ("retrieval", {"best": "yes"}, "'yes' is not of type 'boolean'"),
        ("distillation", {"stage": "melted"}, "'melted' is not one of"),
    ],
)
def test_a_wrong_row_is_refused(folder: str, change: dict[str, Any], message: str) -> None:
    path = PAPER / folder / "results.csv"
    right = next(row for row in read_rows(path) if row.get("outcome", "ok") == "ok")
    wrong = {name: value for name, value in (right | change).items() if value is not ...}
    assert message in "\n".join(objections(wrong, kind_of(path)))


def test_parsing_cells_of_csv() -> None:
    assert [parse_cell("2.0", "integer"), parse_cell("2.5", "integer"), parse_cell("1e-3", "number"), parse_cell("", "string")] == [
        2,
        2.5,
        0.001,
        None,
    ]
    assert [
        parse_cell("True", "boolean"),
        parse_cell("yes", "boolean"),
        parse_cell("nan", "number"),
        parse_cell("inf", "number"),
    ] == [
        True,
        "yes",
        "nan",
        math.inf,
    ]
    assert [parse_cell("7", "string"), parse_cell("7"), parse_cell("7 tokens")] == ["7", 7, "7 tokens"]


# --- another version ----------------------------------------------------------------------------


def test_a_table_of_another_version_is_refused_in_one_sentence_and_can_be_rebuilt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("results.csv", "samples.jsonl"):
        (tmp_path / name).write_bytes((PAPER / "cpu" / "million" / name).read_bytes())
    path = tmp_path / "results.csv"
    pd.read_csv(path).assign(**{VERSION: 99}).to_csv(path, index=False)
    sentence = (
        f"{path} was written under version 99 of latency.schema.json, and this checkout reads version {version('latency')}: "
        f"`python -m evals.tables {tmp_path}` makes it again from the samples beside it"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        frames.read_table(tmp_path)
    for reader in (read_cells, ResultFolder, lambda folder: report.write([folder], tmp_path / "report.html")):
        with pytest.raises(UsageError, match=f"^{re.escape(sentence)}$"):
            reader(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "results.csv").read_bytes() == (PAPER / "cpu" / "million" / "results.csv").read_bytes()
    assert frames.read_table(tmp_path)["attention"].tolist() == ["bsbr"]
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
