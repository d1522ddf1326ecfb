"""What each table of results holds, from its JSON Schema in schemas/: which columns there are, of which type, unit and meaning.

The schemas are the one source: tables are made with their columns, in their order; the documentation shows their words; and
what a table was written under stands in each of its rows, as `schema_version`.
"""

import json
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
    """The JSON Schema of a row of `table`: measured, scaling, crossovers, learned, curves, longest, converted or positions."""
    read: dict[str, Any] = json.loads((FOLDER / f"{table}.schema.json").read_text(encoding="utf-8"))
    return read


def version(table: str) -> int:
    """Which version of its schema this checkout writes and reads."""
    return int(schema(table)["properties"][VERSION]["const"])


def columns(table: str) -> tuple[str, ...]:
    """Those that every table of this kind has, in order, but for the version."""
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


def conform(rows: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """Prepares a table for writing: columns of the schema's types, an empty word as null, and the schema's version."""
    dtypes = {str(name): dtype(table, str(name)) for name in rows if name in schema(table)["properties"]}
    texts = {name: rows[name].where(rows[name] != "") for name, kind in dtypes.items() if kind == "string"}
    return rows.assign(**texts).astype(dtypes).assign(**{VERSION: version(table)})


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


def read(path: Path, **options: Any) -> "pd.DataFrame":
    """The table in a CSV file, without its version. options: of pandas' read_csv.

    Raises OtherVersion if this checkout has another version of its schema.
    """
    import pandas as pd  # not at start: it takes half a second, for which the first measurement would have to wait

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
