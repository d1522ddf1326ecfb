"""The JSON Schemas of the result tables in schemas/, and the files of tables that follow them.

Tables are built with the columns of their schema in its order, the documentation shows its descriptions, and each row of a
table holds the version of the schema that it was written under, as `schema_version`.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.paths import SCHEMAS as FOLDER

if TYPE_CHECKING:
    import pandas as pd

VERSION = "schema_version"
DTYPES = {"string": "string", "integer": "Int64", "number": "float64", "boolean": "boolean"}


@cache
def schema(table: str) -> dict[str, Any]:
    """The JSON Schema of a row of a table: latency, accuracy, max_context, conversion, scaling, crossovers, curves or positions."""
    read: dict[str, Any] = json.loads((FOLDER / f"{table}.schema.json").read_text(encoding="utf-8"))
    return read


def version(table: str) -> int:
    """The version of a table's schema that this checkout writes and reads."""
    return int(schema(table)["properties"][VERSION]["const"])


def columns(table: str) -> tuple[str, ...]:
    """The columns that every table of this kind has, in order, without the version."""
    return tuple(name for name in schema(table)["required"] if name != VERSION)


def dtype(table: str, column: str) -> str:
    """pandas' type of a column: string, Int64, float64 or boolean."""
    (name,) = (name for name in _types(table, column) if name != "null")
    return DTYPES[name]


def is_nullable(table: str, column: str) -> bool:
    """Whether a cell of the column may be empty."""
    return "null" in _types(table, column)


def words(table: str, column: str) -> tuple[str, ...]:
    """The words that a column may hold; empty if it may hold any."""
    return tuple(word for word in schema(table)["properties"][column].get("enum", ()) if word is not None)


def _types(table: str, column: str) -> list[str]:
    types = schema(table)["properties"][column]["type"]
    return types if isinstance(types, list) else [types]


class SchemaVersionError(ValueError):
    """A table was written under another version of its schema; the message says what to do."""


# --- files ----------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """The kind of the table in a file, from the name of the file and the columns in its first line."""
    if path.stem != "results":
        return path.stem
    with path.open("rb") as file:
        heads = file.readline()
    marks = {b"max_context": "max_context", b"gap_closed": "conversion", b"eval_seq_len": "accuracy"}
    return next((kind for mark, kind in marks.items() if mark in heads), "latency")


def read(path: Path, **options: Any) -> "pd.DataFrame":
    """Reads the table in a CSV file with pandas' `read_csv(path, **options)`, without its version.

    Raises:
        SchemaVersionError: if the file was written under another version of its schema.
    """
    import pandas as pd  # not at start: it takes half a second, for which the first measurement would have to wait

    table: pd.DataFrame = pd.read_csv(path, **options)
    kind = kind_of(path)
    if VERSION not in table:  # a table of the user's own; check_table names the columns that it lacks
        return table
    other = [value for value in table[VERSION].unique() if value != version(kind)]
    if other:
        raise SchemaVersionError(
            f"{path} was written under version {other[0]} of {kind}.schema.json, and this checkout reads version "
            f"{version(kind)}: `python -m evals.tables {path.parent}` makes it again from the samples beside it"
        )
    return table.drop(columns=VERSION)


def write_table(table: "pd.DataFrame", folder: Path, kind: str) -> Path:
    """Writes a table as CSV for people and as Parquet for programs; each replaces an older file only once it is complete.

    Returns:
        The path of the CSV file, which the schema names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, typed = schema(kind)["file"], _conform(table, kind)
    formats: dict[str, Callable[[Path], object]] = {
        "csv": lambda path: typed.to_csv(path, index=False),
        "parquet": lambda path: typed.to_parquet(path, index=False),
    }
    for suffix, save in formats.items():
        unfinished = folder / f".{name}.{suffix}.{os.getpid()}"
        try:
            save(unfinished)
            unfinished.replace(folder / f"{name}.{suffix}")
        finally:
            unfinished.unlink(missing_ok=True)
    return folder / f"{name}.csv"


def _conform(rows: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """The rows with the schema's dtypes, null for an empty word, and the schema's version."""
    dtypes = {str(name): dtype(table, str(name)) for name in rows if name in schema(table)["properties"]}
    texts = {name: rows[name].where(rows[name] != "") for name, kind in dtypes.items() if kind == "string"}
    return rows.assign(**texts).astype(dtypes).assign(**{VERSION: version(table)})
