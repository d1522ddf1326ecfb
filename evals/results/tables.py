"""Writing a result table: as CSV for people and as Parquet for programs."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from evals.results.schema import conform, schema


def write_table(table: pd.DataFrame, folder: Path, kind: str) -> Path:
    """Writes a table as CSV and as Parquet, each in place of an older one only once it is complete.

    Args:
        table: its rows.
        folder: where to write; made if it does not exist.
        kind: name of the schema, which says how the files are called.

    Returns:
        The path of the CSV file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, typed = schema(kind)["file"], conform(table, kind)
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
