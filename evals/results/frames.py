"""Reading and checking result tables, and `Sweep`: one table laid out along its swept setting.

The JSON Schemas in schemas/ give the types and the allowed words of columns.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evals.results import schema
from evals.results.formatting import format_setting
from evals.results.settings import (
    SETTINGS,
    TRAINING_SETTINGS,
    axis_label,
    group_by,
    is_number,
    setting_columns,
    setting_phrase,
    without_machine_settings,
)

NEEDED = {
    "latency": (
        *("swept", "attention", "outcome", "relative_to", *SETTINGS, "latency_s", "latency_low_s", "latency_high_s"),
        *("tokens_per_s", "tokens_per_s_low", "tokens_per_s_high", "speedup", "speedup_low", "speedup_high"),
        *("peak_bytes", "samples", "rounds"),
    ),
    "accuracy": (
        *("swept", "attention", "outcome", "best", "seeds", "seq_len", "eval_seq_len", "depth", "position", "state_bytes"),
        *("accuracy", "accuracy_low", "accuracy_high", "chance", "bits_per_byte", "bits_per_byte_low", "bits_per_byte_high"),
    ),
    "max_context": ("attention", "outcome", "max_context", "limit_bytes", "next_seq_len", "next_outcome"),
    "conversion": (
        *("model", "seed", "stage", "chunk_size", "chunk_overlap", "context", "perplexity", "gap_closed"),
        *("top_1", "top_5", "top_10"),
    ),
    "scaling": (
        *("attention", "quantity", "exponent", "exponent_low", "exponent_high", "overhead", "factor", "note"),
        "declared_exponent",
    ),
    "crossovers": ("first", "second", "at", "at_low", "at_high"),
}
"""Columns that figures and reports need of each kind of table."""
OPTIONAL = {"latency": ("parameter_bytes", "state_bytes", "roofline_fraction", "verdict", "bound", "match")}
"""Columns that they use if a table has them."""


# --- reading and checking -------------------------------------------------------------------------


def read_table(folder: Path) -> pd.DataFrame:
    """Reads and checks folder/results.csv.

    Raises:
        ValueError: in one sentence, if the file does not exist or is not a table of results.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a folder that `python -m evals.run` wrote, such as results/seq_len")
    try:
        return _read(path, schema.kind_of(path), "results")
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} is empty: run `python -m evals.run` again") from None


def read_fits(folder: Path) -> dict[str, pd.DataFrame]:
    """Reads and checks folder/scaling.csv and folder/crossovers.csv, if they exist and are not empty.

    Raises:
        ValueError: in one sentence, if one is not such a table.
    """
    tables = {}
    for kind in ("scaling", "crossovers"):
        path = folder / f"{kind}.csv"
        if path.is_file():
            try:
                tables[kind] = _read(path, kind, kind)
            except pd.errors.EmptyDataError:
                continue  # nothing was fitted
    return tables


def _read(path: Path, kind: str, content: str) -> pd.DataFrame:
    try:
        return check_table(schema.read(path), kind)
    except (schema.SchemaVersionError, pd.errors.EmptyDataError):
        raise
    except (ValueError, OSError) as error:  # pandas' parser and decoder errors are ValueErrors
        raise ValueError(f"{path} is no table of {content}: {' '.join(str(error).split())}") from error


def check_table(table: pd.DataFrame, kind: str = "latency") -> pd.DataFrame:
    """Checks a table of a kind in NEEDED and prepares it for figures.

    Missing optional columns are added, measured columns become floats, and empty words None. Further columns stay.

    Raises:
        ValueError: if a column is missing, a number is not a number, a word is not among those of the schema, a table of
            latencies or of longest contexts has no row, or an `ok` row has no latency.
    """
    missing = [column for column in NEEDED[kind] if column not in table.columns]
    if missing:
        raise ValueError(f"column {', '.join(missing)} missing, found {', '.join(map(str, table.columns))}")
    if table.empty and kind in ("latency", "max_context", "conversion"):
        raise ValueError("there is no row to draw")
    table = table.reset_index(drop=True)
    optional = OPTIONAL.get(kind, ())
    table = table.assign(**{column: math.nan for column in optional if column not in table.columns})
    ok = table["outcome"] == "ok" if kind == "latency" else pd.Series(True, index=table.index)  # only ok rows carry numbers
    for column in (*NEEDED[kind], *optional):
        if column in optional:
            table[column] = table[column].replace("", None)
        _check_words(table[column], kind)
        if schema.dtype(kind, column) in ("Int64", "float64"):
            if column in SETTINGS:
                continue
            numbers = _to_numbers(table[column])
            if schema.is_nullable(kind, column):
                table[column] = numbers.where(ok)
        elif column in optional:
            table[column] = table[column].astype(object).where(ok)
    if kind == "latency":
        unmeasured = table[ok & ~table["latency_s"].between(0, math.inf, inclusive="neither")]
        if len(unmeasured):
            row = unmeasured.iloc[0]
            raise ValueError(f"an ok row needs a finite latency_s above 0, got {row['latency_s']} for {row['attention']}")
    return table


def _check_words(column: "pd.Series[Any]", kind: str) -> None:
    known = schema.words(kind, str(column.name))
    values = column.dropna() if schema.is_nullable(kind, str(column.name)) else column
    unknown = sorted(set(values.astype(str)) - set(known))
    if known and unknown:
        raise ValueError(f"{column.name} must be one of {', '.join(known)}, got {', '.join(unknown)}")


def _to_numbers(column: "pd.Series[Any]") -> "pd.Series[float]":
    numbers = pd.to_numeric(column, errors="coerce")
    words = column[numbers.isna() & column.notna()]
    if len(words):
        raise ValueError(f"{column.name} must hold numbers, got {words.iloc[0]!r}")
    return numbers.astype(float)


# --- sweeps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """One table over one swept setting: rows that differ in that setting and in the attention, and in nothing else."""

    rows: pd.DataFrame
    column: str  # of the swept setting
    values: list[Any]  # of the swept setting, in ascending order if they are numbers
    x: NDArray[np.float64]  # [values], their positions on an axis
    discrete: bool  # whether there is no line to draw: one value, or values without an order
    by_attention: dict[str, pd.DataFrame]  # for each attention its rows, indexed by the value; NaN for a missing row
    attentions: tuple[str, ...]  # all of the table that the sweep is a part of, so that each has one style in all figures
    scaling: pd.DataFrame | None = None  # fits to these rows
    crossovers: pd.DataFrame | None = None

    @property
    def axis(self) -> str:
        """Label of the axis of the swept setting."""
        return axis_label(self.column)

    @property
    def ticks(self) -> list[str]:
        """The values as people write them: 8192 -> 8k."""
        return [format_setting(value) for value in self.values]

    @property
    def reference(self) -> str:
        """Name of the attention that speed-ups are relative to."""
        return ", ".join(sorted(set(self.rows["relative_to"].dropna().astype(str)))) or "the reference"

    @property
    def failed(self) -> dict[str, "pd.Series[str]"]:
        """The outcomes of all rows of each attention that has a failed row."""
        failures = set(schema.words("latency", "outcome")) - {"ok"}
        return {name: rows["outcome"] for name, rows in self.by_attention.items() if rows["outcome"].isin(failures).any()}

    @property
    def ordered(self) -> bool:
        """Whether the values are numbers."""
        return is_number(self.rows[self.column])

    def at(self, index: int) -> str:
        """Writes one value of the swept setting: 8k tokens, batch 4, chunk size = 64."""
        phrase = setting_phrase(self.column, self.values[index])
        return phrase.removesuffix("s") if phrase.startswith("1 ") else phrase


def sweeps(results: pd.DataFrame, fits: Mapping[str, pd.DataFrame]) -> Iterator[tuple[str, Sweep]]:
    """Splits a checked table of latencies into sweeps, each with the fits to its rows.

    Yields:
        A suffix that distinguishes the sweep from the others ("-decode"; empty if it is the only one), and the sweep.

    Raises:
        ValueError: if an attention has two rows at one value of the swept setting.
    """
    column = swept_column(results)
    attentions = tuple(dict.fromkeys(results["attention"].astype(str)))
    groups = list(split(results, column))
    for suffix, (settings, rows) in zip(suffixes(settings for settings, _ in groups), groups, strict=True):
        own = {kind: matching(fit, settings) for kind, fit in fits.items() if settings.keys() <= set(fit.columns)}
        yield suffix, _sweep(rows, column, attentions, **own)


def split(table: pd.DataFrame, swept: str, kind: str = "latency") -> "Iterator[tuple[dict[str, Any], pd.DataFrame]]":
    """Splits a table of a kind into groups of rows that differ in the swept setting and the attention alone.

    Yields:
        The settings in which the group differs from the others, with their values, and its rows.
    """
    fixed = [name for name in setting_columns(table, kind) if name != swept and varies_independently(table, swept, name)]
    fixed = without_machine_settings(table, fixed)
    for values, rows in group_by(table, fixed):
        yield dict(zip(fixed, values, strict=True)), rows


def suffixes(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """A suffix of a file name for each group of settings, such as "-decode" or "-window_size_16"; no two are the same."""
    texts: list[str] = []
    for settings in groups:
        parts = (
            format_setting(value) if name in (*SETTINGS, *TRAINING_SETTINGS) else f"{name}_{format_setting(value)}"
            for name, value in settings.items()
        )
        text = "".join("-" + re.sub(r"[^.+,A-Za-z0-9_-]+", "_", part)[:60] for part in parts)
        texts.append(text if text not in texts else f"{text}-{len(texts)}")
    return texts


def matching(table: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of a table that have these settings."""
    for setting, value in settings.items():
        table = table[table[setting].isin([value])]
    return table


def _sweep(rows: pd.DataFrame, column: str, attentions: tuple[str, ...], **fits: pd.DataFrame) -> Sweep:
    duplicates = rows[rows.duplicated(["attention", column])]
    if len(duplicates):
        row = duplicates.iloc[0]
        raise ValueError(f"{row['attention']} has more than one row at {column} = {row[column]}: keep the one that counts")
    values = swept_values(rows, column)
    discrete = not is_number(rows[column]) or len(values) == 1
    x = np.arange(len(values), dtype=float) if discrete else np.asarray(values, dtype=float)
    tables = {str(name): part.set_index(column).reindex(values) for name, part in rows.groupby("attention", sort=False)}
    return Sweep(rows, column, values, x, discrete, tables, attentions, **fits)


def swept_column(results: pd.DataFrame) -> str:
    """Column of the swept setting: the last part of the config key (shape.seq_len -> seq_len).

    If the table names no key, it is the setting with most values, or seq_len if none varies.

    Raises:
        ValueError: if the table names two keys, or lacks the column.
    """
    keys = results["swept"].dropna().unique()
    if len(keys) > 1:
        raise ValueError(f"one table holds one sweep, got swept = {', '.join(map(str, keys))}")
    if not len(keys):
        known = [name for name in ("seq_len", *SETTINGS) if name in results]
        return max(known, key=lambda name: results[name].nunique())
    column = schema.column_of(str(keys[0]), results.columns)
    if column not in results.columns:
        raise ValueError(f"the swept key {keys[0]!r} needs a column {column!r}, found {', '.join(map(str, results.columns))}")
    return column


def swept_values(rows: pd.DataFrame, column: str) -> list[Any]:
    """The values of the swept setting: numbers in ascending order, others as they came."""
    values = list(rows[column].unique())
    return sorted(values) if is_number(rows[column]) else values


def rows_by_cell(results: pd.DataFrame, column: str) -> "dict[tuple[str, Any], pd.Series[Any]]":
    """The last row of each attention and value of the swept setting."""
    return {(row["attention"], row[column]): row for _, row in results.iterrows()}


def varies_independently(results: pd.DataFrame, swept: str, setting: str) -> bool:
    """Whether a setting varies for a reason other than the swept one.

    The number of heads may only follow their size, and any setting may follow the choice of a config group, such as a model.
    """
    if results[setting].nunique(dropna=False) < 2:
        return False
    may_follow = is_number(results[setting]) or (swept not in (*SETTINGS, *TRAINING_SETTINGS) and not is_number(results[swept]))
    return not may_follow or bool(results.groupby(swept)[setting].nunique(dropna=False).gt(1).any())
