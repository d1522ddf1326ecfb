"""What each table of results holds, from its JSON Schema in schemas/: which columns there are, of which type, unit and meaning.

The schemas are the one source: tables are made with their columns, in their order; the documentation shows their words; and
what a table was written under stands in each of its rows, as `schema_version`.
"""

import csv
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from evals.paths import SCHEMAS as FOLDER

VERSION = "schema_version"
DTYPES = {"string": "string", "integer": "Int64", "number": "float64", "boolean": "boolean"}
Cell = str | int | float | bool | None


@cache
def schema(table: str) -> dict[str, Any]:
    """The JSON Schema of a row of `table`: measured, scaling, crossovers, learned, curves, longest, converted or positions."""
    read: dict[str, Any] = json.loads((FOLDER / f"{table}.schema.json").read_text(encoding="utf-8"))
    return read


def version(table: str) -> int:
    """Which version of its schema this checkout writes and reads."""
    return int(schema(table)["properties"][VERSION]["const"])


def columns(table: str) -> tuple[str, ...]:
    """Those that every table of this kind has, in order, but for the version."""
    return tuple(name for name in schema(table)["required"] if name != VERSION)


def conform(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The table as it is written: of the schema's types also where a column is empty, no word as none, and with its version."""
    known = schema(kind)["properties"]
    typed = {name: DTYPES[_type(known[name])] for name in table if name in known}
    words = {str(name): table[name].where(table[name] != "") for name, dtype in typed.items() if dtype == "string"}
    return table.assign(**words).astype(typed).assign(**{VERSION: version(kind)})


def _type(column: dict[str, Any]) -> str:
    """The one type that is not null."""
    types = column["type"] if isinstance(column["type"], list) else [column["type"]]
    (found,) = (name for name in types if name != "null")
    return str(found)


class SchemaVersionError(ValueError):
    """A table that was written under another version of its schema: one sentence, which says what to do."""


# --- files ----------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """Of which kind the table in a file is, by its name and its first line."""
    if path.stem != "results":
        return path.stem
    with path.open("rb") as file:
        heads = file.readline()
    marks = {b"max_context": "max_context", b"gap_closed": "conversion", b"eval_seq_len": "accuracy"}
    return next((kind for mark, kind in marks.items() if mark in heads), "latency")


def read(path: Path, **options: Any) -> pd.DataFrame:
    """The table in a CSV file, without its version. options: of pandas' read_csv.

    Raises OtherVersion if this checkout has another version of its schema.
    """
    table: pd.DataFrame = pd.read_csv(path, **options)
    kind = kind_of(path)
    if VERSION not in table:  # a table of one's own, or a part of one: whoever needs a column will say so
        return table
    other = [value for value in table[VERSION].unique() if value != version(kind)]
    if other:
        raise SchemaVersionError(
            f"{path} was written under version {other[0]} of {kind}.schema.json, and this checkout reads version "
            f"{version(kind)}: `python -m evals.tables {path.parent}` makes it again from the samples beside it"
        )
    return table.drop(columns=VERSION)


def read_rows(path: Path) -> Iterator[dict[str, Cell]]:
    """The rows of a CSV file as JSON has them: numbers and booleans as such, null for an empty cell.

    A cell that is not of its column's type stays text, for the schema to object to. Raises ValueError for a line with more or
    fewer cells than the first.
    """
    known = schema(kind_of(path))["properties"]
    with path.open(encoding="utf-8", newline="") as file:
        names, *lines = csv.reader(file)
    for line in lines:
        yield {name: parse_cell(text, _type(known[name]) if name in known else "") for name, text in zip(names, line, strict=True)}


def parse_cell(text: str, kind: str = "") -> Cell:
    """A cell of CSV under its type; without one, as a number or boolean wherever it can be read as one."""
    if text == "":
        return None
    if kind in ("", "boolean") and text in ("True", "False"):
        return text == "True"
    if kind in ("", "integer", "number"):
        try:
            number = float(text)
        except ValueError:
            return text
        if not math.isnan(number):  # inf: an interval without an end
            return int(number) if number.is_integer() and kind != "number" else number
    return text
