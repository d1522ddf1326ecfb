"""The JSON Schemas of the result tables in schemas/, and the files of tables that follow them.

Tables are built with the columns of their schema in its order, the documentation shows its descriptions, and each row of a
table holds the version of the schema that it was written under, as `schema_version`.
"""

import csv
import json
import os
from collections.abc import Callable, Container
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.errors import naming
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


@cache
def kinds() -> tuple[str, ...]:
    """The names of all schemas."""
    return tuple(sorted(path.name.partition(".")[0] for path in FOLDER.glob("*.schema.json")))


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


def column_of(key: str, columns: Container[str]) -> str:
    """The column of a swept key: the last part of its name (shape.seq_len -> seq_len), or the whole, if another column has that."""
    return key if key in columns else key.rpartition(".")[2]


class SchemaVersionError(ValueError):
    """A table was written under another version of its schema; the message says what to do."""


# --- files ----------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """The kind of the table in a file, from the name of the file and its columns."""
    if path.stem != "results":
        return path.stem
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        names = set(next(csv.reader(file), ()))
    marks = {"max_context": "max_context", "gap_closed": "conversion", "eval_seq_len": "accuracy"}
    return "latency" if "latency_s" in names else next((kind for mark, kind in marks.items() if mark in names), "latency")


def read(path: Path) -> "pd.DataFrame":
    """Reads the table in a CSV file, without its version.

    What `write_table` wrote is read back as it was: only an empty cell is missing, and a word stays a word even if it looks like a
    number (an attention called NA, or 007). In a column that the schema does not know, such as an option of a user's attention, the
    cells are numbers or booleans if all of them are written as such.

    Raises:
        SchemaVersionError: if the file was written under another version of its schema.
    """
    import pandas as pd  # not at start: it takes half a second, for which the first measurement would have to wait

    kind, head = kind_of(path), pd.read_csv(path, nrows=0).columns
    known = schema(kind)["properties"]
    texts = [name for name in head if name not in known or dtype(kind, name) == "string"]
    missing = {name: [""] if name in texts else ["", "nan", "NaN"] for name in head}
    table: pd.DataFrame = pd.read_csv(path, dtype=dict.fromkeys(texts, "str"), keep_default_na=False, na_values=missing)
    table = table.assign(**{name: _parse(table[name]) for name in texts if name not in known})
    if VERSION not in table:  # a table of the user's own; check_table names the columns that it lacks
        return table
    other = [value for value in table[VERSION].unique() if value != version(kind)]
    if other:
        raise SchemaVersionError(
            f"{path} was written under version {other[0]} of {kind}.schema.json, and this checkout reads version "
            f"{version(kind)}: `python -m evals.tables {path.parent}` makes it again from the samples beside it"
        )
    return table.drop(columns=VERSION)


def _parse(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """The values of a column of text if all are written as Python writes an integer, a float or a boolean; else the column."""
    texts = set(column.dropna())
    for kinds in ((int, float), (lambda text: text == "True",)):
        values = {text: value for text in texts for kind in kinds if str(value := _call(kind, text)) == text != "nan"}
        if texts and values.keys() == texts:
            return column.map(values)
    return column


def _call(kind: Callable[[str], object], text: str) -> object:
    try:
        return kind(text)
    except ValueError:
        return None


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
            with naming(unfinished):
                save(unfinished)
            unfinished.replace(folder / f"{name}.{suffix}")
        finally:
            unfinished.unlink(missing_ok=True)
    return folder / f"{name}.csv"


def one_type(table: "pd.DataFrame", kind: str) -> "pd.DataFrame":
    """Makes each column that may be missing or empty a column of numbers, of booleans or of text.

    An option of an attention may be a number in one comparison, and a word, a list or null in another: then all become text.
    """
    import pandas as pd

    single = ("integer", "floating", "mixed-integer-float", "boolean", "string", "empty")
    options = [str(name) for name in table if _is_optional(kind, str(name))]
    mixed = [name for name in options if pd.api.types.infer_dtype(table[name], skipna=True) not in single]
    return table.assign(**{name: table[name].map(_text, na_action="ignore") for name in mixed})


def _is_optional(table: str, column: str) -> bool:
    return column not in columns(table) or is_nullable(table, column)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _conform(rows: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """The rows with the schema's dtypes, null for an empty word, one type a column, and the schema's version."""
    import pandas as pd

    rows = one_type(rows, table)
    optional = [str(name) for name in rows if _is_optional(table, str(name))]
    words = {name for name in optional if pd.api.types.infer_dtype(rows[name], skipna=True) == "string"}
    known = [str(name) for name in rows if name in schema(table)["properties"]]
    dtypes = {name: "string" if name in words else dtype(table, name) for name in known}
    texts = {name: rows[name].where(rows[name] != "") for name, kind in dtypes.items() if kind == "string"}
    return rows.assign(**texts).astype(dtypes).assign(**{VERSION: version(table)})
