"""Reading a CSV table row by row with JSON's types, so that a JSON Schema can be held against it."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from evals.results.schema import kind_of, schema

JSON_TYPES = ("string", "integer", "number", "boolean")
Cell = str | int | float | bool | None


def read_rows(path: Path) -> Iterator[dict[str, Cell]]:
    """Reads a CSV file with JSON's types: numbers and booleans, and null for an empty cell.

    A cell that is not of its column's type stays text, for the schema to object to.

    Raises:
        ValueError: if a line has more or fewer cells than the first.
    """
    known = schema(kind_of(path))["properties"]
    types = {name: next(one for one in [column["type"], *column["type"]] if one in JSON_TYPES) for name, column in known.items()}
    with path.open(encoding="utf-8", newline="") as file:
        names, *lines = csv.reader(file)
    for line in lines:
        yield {name: parse_cell(text, types.get(name, "")) for name, text in zip(names, line, strict=True)}


def parse_cell(text: str, kind: str = "") -> Cell:
    """Parses a cell under its JSON type; without a type as a number or boolean if it reads as one."""
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
