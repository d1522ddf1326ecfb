"""`python -m evals.figures results/<sweep> …`: results.csv -> plots/<sweep>/, without measuring anything; `paper`: the study's.

Which figures there are, and how their tables are read. Lines over the swept setting are drawn by
`curves`, all else by `panels`, `pareto` and `longest`; what was learned, by `learning` and `depths`. Every figure is PNG and
SVG, at the width of a paper. The same tables give the same bytes wherever the same matplotlib runs: its own fonts, and no
setting of the user's.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib import style
from matplotlib.figure import Figure

from evals import conversion, learning, schema
from evals.curves import QUANTITIES, curve, scaling
from evals.depths import needle_depth
from evals.longest import longest
from evals.looks import FAILURES, RC, looks
from evals.page import SETTINGS, Sweep, is_number, laid_out, plain
from evals.panels import heatmap, memory_split
from evals.pareto import pareto

FIGURES: dict[str, Callable[[Sweep], Figure | None]] = {
    **{quantity.name: partial(curve, quantity=quantity) for quantity in QUANTITIES},
    "speedup_heatmap": heatmap,
    "memory_split": memory_split,
    "scaling": partial(scaling, which="latency"),
    "scaling_memory": partial(scaling, which="memory"),
    "pareto": pareto,
}
"""All figures. One that has nothing to show is None, and is left out."""

LEARNED = {**learning.FIGURES, "needle_depth": needle_depth}
"""All figures of what was learned."""

NUMBERS = (
    *("latency_s", "latency_low_s", "latency_high_s", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"),
    *("speedup", "speedup_low", "speedup_high", "peak_bytes", "samples", "rounds"),
)
COLUMNS = ("swept", "attention", "outcome", "relative_to", *SETTINGS, *NUMBERS)
OPTIONAL_NUMBERS = ("parameter_bytes", "state_bytes", "ceiling_fraction")
OPTIONAL_WORDS = {"verdict": ("faster", "slower", "same", "ambiguous"), "limit": ("compute", "memory"), "match": ()}
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
FORMS = ("png", "svg")
CONTEXT_NUMBERS = ("max_context", "limit_bytes", "next_seq_len")
CONTEXT_COLUMNS = ("attention", "outcome", "next_outcome", *CONTEXT_NUMBERS)

STUDY = Path("results/paper")

# --- the tables -----------------------------------------------------------------------------------


def read(folder: Path) -> pd.DataFrame:
    """The table in folder/results.csv. Raises ValueError, in one sentence, if there is none or it is no such table."""
    path = folder / "results.csv"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a folder that `python -m evals.run` wrote, such as results/seq_len")
    try:
        return checked(schema.read(path))
    except schema.OtherVersion:
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
            tables[name] = checked_fit(name, schema.read(path))
        except schema.OtherVersion:
            raise
        except pd.errors.EmptyDataError:
            continue  # nothing was fitted
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is no table of {name}: {' '.join(str(error).split())}") from error
    return tables


def checked(results: pd.DataFrame) -> pd.DataFrame:
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


def checked_fit(name: str, table: pd.DataFrame) -> pd.DataFrame:
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
    chosen = looks(results["attention"].astype(str))  # of all, so that they are the same in every figure
    apart = [name for name in SETTINGS if name != column and splits(results, column, name)]
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
        yield "".join(f"-{plain(value)}" for value in values), laid_out(rows, column, chosen, **own)


def splits(results: pd.DataFrame, column: str, name: str) -> bool:
    """Whether rows differ in a setting; a number that goes with the swept one, as heads with their size, is no difference."""
    if results[name].nunique(dropna=False) < 2:
        return False
    return not is_number(results[name]) or bool(results.groupby(column)[name].nunique(dropna=False).gt(1).any())


# --- drawing --------------------------------------------------------------------------------------


def pictures(results: pd.DataFrame, fits: dict[str, pd.DataFrame]) -> Iterator[tuple[str, Figure]]:
    """Every figure that the tables have something to show in, with its name (latency, or latency-decode)."""
    for suffix, sweep in sweeps(results, fits):
        for name, make in FIGURES.items():
            with style.context(["default", RC]):
                picture = make(sweep)
            if picture is not None:
                yield f"{name}{suffix}", picture


def draw(
    results: pd.DataFrame, folder: Path, *, scaling: pd.DataFrame | None = None, crossovers: pd.DataFrame | None = None
) -> list[Path]:
    """Writes every figure of FIGURES as png and svg into folder, in place of those drawn there; returns the paths.

    Rows that differ in another setting than the swept one go to figures of their own, named after it
    (latency-decode.svg). Figures that need a table or a column which is not there are left out. Raises
    ValueError as `checked` and `checked_fit`, and if one attention has two rows at one place.
    """
    results = checked(results)
    given = {"scaling": scaling, "crossovers": crossovers}
    fits = {name: checked_fit(name, table) for name, table in given.items() if table is not None}
    return _save(pictures(results, fits), folder, FIGURES)


def _save(named: Iterable[tuple[str, Figure]], folder: Path, kinds: Iterable[str]) -> list[Path]:
    """Writes the pictures in place of all of these kinds that were there."""
    folder.mkdir(parents=True, exist_ok=True)
    stale = {path for kind in kinds for form in FORMS for path in folder.glob(f"{kind}*.{form}")}
    paths = []
    for name, picture in named:
        paths += [save(picture, folder / f"{name}.{form}") for form in FORMS]
    for path in stale - {*paths}:
        path.unlink()
    return paths


def save(picture: Figure, path: Path) -> Path:
    """Writes a picture in the form that the path's suffix names; returns the path."""
    with style.context(["default", RC]):
        # No date: unchanged data must give unchanged bytes.
        picture.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def draw_contexts(results: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes max_context.{png,svg} into folder from a table of `context.results`; returns the paths.

    Rows that differ in a setting go to figures of their own, as those of `draw`. Raises ValueError if a column is missing,
    there is no row, a number is none, or one attention has two rows.
    """
    _demand(results, CONTEXT_COLUMNS)
    if results.empty:
        raise ValueError("there is no row to draw")
    results = results.assign(**{column: _numbers(results, column) for column in CONTEXT_NUMBERS})
    chosen = looks(results["attention"].astype(str))
    apart = [name for name in (*SETTINGS, "limit_bytes") if name in results and results[name].nunique(dropna=False) > 1]
    groups = results.groupby(apart, dropna=False, sort=True) if apart else [((), results)]
    named = []
    for values, rows in groups:
        twice = rows["attention"][rows["attention"].duplicated()]
        if len(twice):
            raise ValueError(f"{twice.iloc[0]} has more than one row: keep the one that counts")
        with style.context(["default", RC]):
            named.append((f"max_context{''.join(f'-{plain(value)}' for value in values)}", longest(rows, chosen)))
    return _save(named, folder, ["max_context"])


def learned(results: pd.DataFrame, curves: pd.DataFrame) -> Iterator[tuple[str, learning.Learned]]:
    """The rows that belong in one figure of what was learned, and what tells them from the others ("" if nothing does).

    Raises ValueError if a column is missing or a number is none.
    """
    _demand(results, learning.COLUMNS)
    results = results.assign(**{column: _numbers(results, column) for column in learning.NUMBERS})
    yield from learning.sets(results, curves, swept_column(results), looks(results["attention"].astype(str)))


def draw_learned(results: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes every figure of `learning` into folder from the tables of `scores`; returns the paths.

    Rows that differ in another setting than the swept one go to figures of their own. Raises ValueError as `learned`.
    """
    named = []
    for suffix, rows in learned(results, curves):
        for name, make in LEARNED.items():
            with style.context(["default", RC]):
                picture = make(rows)
            if picture is not None:
                named.append((f"{name}{suffix}", picture))
    return _save(named, folder, LEARNED)


def conversions(results: pd.DataFrame, positions: pd.DataFrame) -> Iterator[tuple[str, tuple[pd.DataFrame, pd.DataFrame]]]:
    """The rows of both tables that belong in one figure of conversions, and what tells them from the others.

    Raises ValueError if a column or every row is missing.
    """
    _demand(results, conversion.COLUMNS)
    if results.empty:
        raise ValueError("there is no row to draw")
    for overlap, rows in results.groupby("chunk_overlap"):
        yield f"-overlap-{overlap}", (rows, positions[positions["chunk_overlap"] == overlap])


def draw_conversions(results: pd.DataFrame, positions: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes every figure of `conversion` into folder from the tables of `python -m evals.heal`; returns the paths.

    Raises ValueError as `conversions`.
    """
    named = []
    for suffix, tables in conversions(results, positions):
        for name, make in conversion.FIGURES.items():
            with style.context(["default", RC]):
                named.append((f"{name}{suffix}", make(*tables)))
    return _save(named, folder, conversion.FIGURES)


def redraw(results: Path, plots: Path) -> list[Path]:
    """`draw` from the tables in a folder of results: results.csv, and scaling.csv and crossovers.csv where they are.

    `draw_contexts` where results.csv is of a search for the longest context, `draw_learned` where it is of training,
    `draw_conversions` where it is of conversions.
    """
    path = results / "results.csv"
    kind = schema.kind_of(path) if path.is_file() else ""
    if kind == "longest":
        return draw_contexts(schema.read(path), plots)
    if kind == "converted":
        return draw_conversions(schema.read(path), schema.read(results / "positions.csv"), plots)
    if kind == "learned":
        return draw_learned(schema.read(path), schema.read(results / "curves.csv"), plots)
    return draw(read(results), plots, **read_fits(results))


def draw_study(results: Path, plots: Path) -> list[Path]:
    """Writes every figure of the study whose data is in `results`, says on stderr which data is not; returns the paths.

    Of the GPU half, results/cuda, they go to plots/cuda. Raises ValueError for data that is none.
    """
    from evals.paper import figures as study  # which draws by what stands here

    paths = []
    for half in ("", "cuda"):
        if half == "" or (results / half).is_dir():
            paths += study.draw(results / half, plots / half)
            print(*study.missing(results / half).values(), sep="\n", file=sys.stderr)
    return paths


# --- the command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Redraws each folder given; returns 2, with one sentence on stderr, where it cannot."""
    parser = argparse.ArgumentParser(prog="python -m evals.figures", description="Redraws plots from results, without measuring.")
    parser.add_argument(
        "results", nargs="+", type=Path, help="folders that hold a results.csv, such as results/seq_len; or paper: the study's"
    )
    parser.add_argument("--plots", type=Path, default=Path("plots"), help="folder for the folders of plots (default: plots)")
    options = parser.parse_args(arguments)
    for folder in options.results:
        try:
            if folder == Path("paper"):
                folder, paths = STUDY, draw_study(STUDY, options.plots / STUDY.name)
            else:
                paths = redraw(folder, options.plots / folder.resolve().name)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{folder}: {len(paths)} files in {paths[0].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
