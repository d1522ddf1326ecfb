"""TODO: what lives here."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from evals.plots.layout import SETTINGS, Sweep, is_number, laid_out
from evals.plots.style import FAILURES, style_of
from evals.results import schema
from evals.results.formatting import format_setting

NUMBERS = (
    *("latency_s", "latency_low_s", "latency_high_s", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"),
    *("speedup", "speedup_low", "speedup_high", "peak_bytes", "samples", "rounds"),
)
COLUMNS = ("swept", "attention", "outcome", "relative_to", *SETTINGS, *NUMBERS)
OPTIONAL_NUMBERS = ("parameter_bytes", "state_bytes", "roofline_fraction")
OPTIONAL_WORDS = {"verdict": ("faster", "slower", "same", "ambiguous"), "bound": ("compute", "memory"), "match": ()}
"""Columns of words, and which words there are (any, where none is named)."""
FITS = {
    "scaling": (
        *("attention", "quantity", "exponent", "exponent_low", "exponent_high"),
        *("overhead", "factor", "note", "declared_exponent"),
    ),
    "crossovers": ("first", "second", "at", "at_low", "at_high"),
}
"""The tables that may lie beside results.csv, and the columns that figures need of them."""
FIT_WORDS = ("attention", "quantity", "note", "first", "second")
OUTCOMES = ("ok", *FAILURES)
CONTEXT_NUMBERS = ("max_context", "limit_bytes", "next_seq_len")
CONTEXT_COLUMNS = ("attention", "outcome", "next_outcome", *CONTEXT_NUMBERS)

# --- the tables -----------------------------------------------------------------------------------


def read_table(folder: Path) -> pd.DataFrame:
    """The table in folder/results.csv. Raises ValueError, in one sentence, if there is none or it is no such table."""
    path = folder / "results.csv"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a folder that `python -m evals.run` wrote, such as results/seq_len")
    try:
        return check_table(schema.read(path))
    except schema.SchemaVersionError:
        raise
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} is empty: run `python -m evals.run` again") from None
    except (ValueError, OSError) as error:  # pandas' parser and decoder errors are ValueErrors
        raise ValueError(f"{path} is no table of results: {' '.join(str(error).split())}") from error


def read_fits(folder: Path) -> dict[str, pd.DataFrame]:
    """What was fitted to the results: the tables in folder/scaling.csv and folder/crossovers.csv, those that there are.

    Raises ValueError, in one sentence, if one is no such table.
    """
    tables = {}
    for name in FITS:
        path = folder / f"{name}.csv"
        if not path.is_file():
            continue
        try:
            tables[name] = check_fit(name, schema.read(path))
        except schema.SchemaVersionError:
            raise
        except pd.errors.EmptyDataError:
            continue  # nothing was fitted
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is no table of {name}: {' '.join(str(error).split())}") from error
    return tables


def check_table(results: pd.DataFrame) -> pd.DataFrame:
    """The table as the figures need it: only `ok` rows carry numbers, and no column that they know is missing.

    Raises ValueError if a column is missing that is not optional, there is no row, an outcome, a verdict or
    a limit is unknown, a number is none, or an `ok` row has no latency.
    """
    _demand(results, COLUMNS)
    if results.empty:
        raise ValueError("there is no row to draw")
    results = results.reset_index(drop=True)
    absent = [column for column in (*OPTIONAL_NUMBERS, *OPTIONAL_WORDS) if column not in results.columns]
    results = results.assign(**dict.fromkeys(absent, math.nan))
    for column, words in {"outcome": OUTCOMES, **OPTIONAL_WORDS}.items():
        found = results[column] if column == "outcome" else results[column].replace("", None).dropna()
        unknown = sorted({str(word) for word in found} - {*words})
        if words and unknown:
            raise ValueError(f"{column} must be one of {', '.join(words)}, got {', '.join(unknown)}")
    ok = results["outcome"] == "ok"
    for column in (*NUMBERS, *OPTIONAL_NUMBERS):
        results[column] = _numbers(results, column).where(ok)
    for column in OPTIONAL_WORDS:
        results[column] = results[column].astype(object).replace("", None).where(ok)
    unmeasured = results[ok & ~results["latency_s"].between(0, math.inf, inclusive="neither")]
    if len(unmeasured):
        row = unmeasured.iloc[0]
        raise ValueError(f"an ok row needs a finite latency_s above 0, got {row['latency_s']} for {row['attention']}")
    return results


def check_fit(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """A table of fits as the figures need it. Raises ValueError if a column is missing or a number is none."""
    _demand(table, FITS[name])
    numbers = {column: _numbers(table, column) for column in FITS[name] if column not in FIT_WORDS}
    return table.reset_index(drop=True).assign(**{column: values.to_numpy() for column, values in numbers.items()})


def _demand(table: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"column {', '.join(missing)} missing, found {', '.join(map(str, table.columns))}")


def _numbers(table: pd.DataFrame, column: str) -> "pd.Series[float]":
    numbers = pd.to_numeric(table[column], errors="coerce")
    words = table[column][numbers.isna() & table[column].notna()]
    if len(words):
        raise ValueError(f"{column} must hold numbers, got {words.iloc[0]!r}")
    return numbers.astype(float)


def swept_column(results: pd.DataFrame) -> str:
    """The column of the swept config key (`shape.seq_len` -> seq_len); where none is named, the setting that varies most."""
    keys = results["swept"].dropna().unique()
    if len(keys) > 1:
        raise ValueError(f"one table holds one sweep, got swept = {', '.join(map(str, keys))}")
    if not len(keys):
        known = [name for name in ("seq_len", *SETTINGS) if name in results]
        return max(known, key=lambda name: results[name].nunique())  # seq_len where nothing does
    column = str(keys[0]).rsplit(".", 1)[-1]
    if column not in results.columns:
        raise ValueError(f"the swept key {keys[0]!r} needs a column {column!r}, found {', '.join(map(str, results.columns))}")
    return column


def sweeps(results: pd.DataFrame, fits: dict[str, pd.DataFrame]) -> Iterator[tuple[str, Sweep]]:
    """The rows that belong in one figure, of tables that are checked, and what tells them from the others ("" if nothing does)."""
    column = swept_column(results)
    chosen = style_of(results["attention"].astype(str))  # of all, so that they are the same in every figure
    apart = [name for name in SETTINGS if name != column and varies_independently(results, column, name)]
    if not apart:
        yield "", laid_out(results, column, chosen, **fits)
        return
    for values, rows in results.groupby(apart, dropna=False, sort=True):
        own = {}
        for kind, table in fits.items():
            # A fit that does not say which of these rows it is of is of none.
            if all(name in table.columns for name in apart):
                same = [table[name].isin([value]) for name, value in zip(apart, values, strict=True)]
                own[kind] = table[pd.concat(same, axis=1).all(axis=1)]
        yield "".join(f"-{format_setting(value)}" for value in values), laid_out(rows, column, chosen, **own)


def varies_independently(results: pd.DataFrame, column: str, name: str) -> bool:
    """Whether rows differ in a setting; a number that goes with the swept one, as heads with their size, is no difference."""
    if results[name].nunique(dropna=False) < 2:
        return False
    return not is_number(results[name]) or bool(results.groupby(column)[name].nunique(dropna=False).gt(1).any())
