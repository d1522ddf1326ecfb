"""Export of result folders as tables of text, for a README or a paper."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from evals.results import frames, schema
from evals.results.accuracy_table import over_all_targets, score_metric
from evals.results.folder_kinds import check_folder
from evals.results.formatting import format_setting, format_value
from evals.results.latency_table import TABLE_METRICS
from evals.results.markup import FORMATS, Table, superscript
from evals.results.max_context_table import split_searches
from evals.results.metrics import BYTES, MAX_CONTEXT, PERPLEXITY, STATE
from evals.results.settings import conditions, training_conditions, training_phrase


def export(folders: Sequence[Path], form: str) -> str:
    """Renders all tables of some result folders, or of all result folders below them, as markdown or latex.

    Raises:
        ValueError: in one sentence, if a folder holds no table of results.
    """
    named = result_folders(folders)
    tables = ((name, table) for name, folder in named.items() for table in tables_of(folder))
    titled = (replace(table, title=f"{name}: {table.title}") if len(named) > 1 else table for name, table in tables)
    return "\n\n".join(map(FORMATS[form], titled))


def result_folders(given: Sequence[Path]) -> dict[str, Path]:
    """Folders that hold a results.csv, by name. A given folder without one stands for all such folders below it."""
    folders: dict[str, Path] = {}
    for folder in given:
        below = sorted(path.parent for path in folder.rglob("results.csv"))
        if (folder / "results.csv").is_file() or not below:
            folders[str(folder)] = folder
        else:
            folders |= {path.relative_to(folder).as_posix(): path for path in below}
    return folders


def tables_of(folder: Path) -> Iterator[Table]:
    """The tables of one folder.

    Raises:
        ValueError: in one sentence, if it holds no table of results.
    """
    kind = check_folder(folder, "export")
    results = frames.read_table(folder)
    if results.empty:
        raise ValueError(f"{folder / 'results.csv'} has no row: run the command that wrote it again")
    yield from TABLES[kind](results)


# --- kinds of tables ------------------------------------------------------------------------------


def latency_tables(results: pd.DataFrame) -> Iterator[Table]:
    """A table for each sweep and metric: attentions down, the swept setting across."""
    for _, sweep in frames.sweeps(results, {}):
        notes: list[str] = []
        rows = frames.rows_by_cell(sweep.rows, sweep.column)
        marks = {cell: _mark(notes, row) for cell, row in rows.items() if row["outcome"] != "ok"}
        for metric in TABLE_METRICS:
            if metric.column not in sweep.rows or not sweep.rows[metric.column].notna().any():
                continue
            body = [
                [name, *(format_value(rows.get((name, value)), metric) + marks.get((name, value), "") for value in sweep.values)]
                for name in sweep.by_attention
            ]
            head = [sweep.column, *map(str, sweep.values)]
            yield Table(metric.table_title(sweep.reference), [head, *body], notes, conditions(sweep.rows, sweep.column))


def accuracy_tables(results: pd.DataFrame) -> Iterator[Table]:
    """Scores and decoding state at the best learning rate over the swept setting; scores over evaluation lengths."""
    swept = frames.swept_column(results)
    whole = over_all_targets(results)
    for _, group in frames.split(whole, swept, "accuracy"):
        ok = group[(group["outcome"] == "ok") & group["best"].astype(bool)]
        failed = group[~group["attention"].isin(ok["attention"]) & (group["outcome"] != "ok")]
        metric, caption = score_metric(ok), training_conditions(group)
        score = partial(format_value, metric=metric)
        trained = ok[ok["eval_seq_len"] == ok["seq_len"]]
        yield _grid(trained, failed, swept, metric.table_title(), caption, score)
        yield _grid(trained, failed, swept, STATE.title().lower(), caption, lambda row: BYTES.format(row["state_bytes"]))
        for value, rows in ok.groupby(swept):
            if rows["eval_seq_len"].nunique() > 1:
                at = training_phrase(swept, format_setting(value)).removeprefix("trained at ")
                title = f"{metric.table_title()}; trained at {at}, evaluated at other lengths"
                yield _grid(rows, failed[:0], "eval_seq_len", title, caption, score)


def _grid(
    rows: pd.DataFrame, failed: pd.DataFrame, column: str, title: str, caption: str, write: Callable[["pd.Series[Any]"], str]
) -> Table:
    """A table with attentions down and the values of a column across; a failed row gives its outcome and a footnote."""
    notes: list[str] = []
    texts = {cell: f"{row['outcome']}{_mark(notes, row)}" for cell, row in frames.rows_by_cell(failed, column).items()}
    texts |= {cell: write(row) for cell, row in frames.rows_by_cell(rows, column).items()}
    values = frames.swept_values(pd.concat([rows, failed]), column)
    body = [[str(name), *(texts.get((name, value), "") for value in values)] for name in dict.fromkeys(name for name, _ in texts)]
    return Table(title, [[column, *map(_whole, values)], *body], notes, caption, over_seeds=True)


def _whole(value: Any) -> str:
    """A value as text; a column of whole numbers with missing ones is read as floats."""
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)


def max_context_tables(results: pd.DataFrame) -> Iterator[Table]:
    """The longest context of each attention, for each memory limit and group of settings."""
    for _, group in split_searches(results):
        notes: list[str] = []
        rows = [["attention", "tokens", "held", "tokens that do not fit"]]
        for _, row in group.sort_values("max_context", ascending=False).iterrows():
            beyond = f"{row['next_seq_len']:.0f}{_mark(notes, row)}" if pd.notna(row["next_seq_len"]) else ""
            if pd.notna(row["max_context"]):
                fitting = [f"{row['max_context']:.0f}", BYTES.format(row["peak_bytes"])]
            else:
                fitting = [f"{row['outcome']}{'' if beyond else _mark(notes, row)}", ""]
            rows.append([str(row["attention"]), *fitting, beyond])
        title = f"longest context within {BYTES.format(group['limit_bytes'].iloc[0])}, {MAX_CONTEXT.better}"
        yield Table(title, rows, notes, conditions(group, "attention"))


def conversion_tables(results: pd.DataFrame) -> Iterator[Table]:
    """Mean perplexity over seeds of each model as original, converted and distilled, and the share that distilling gives back."""
    seeds, stages = results["seed"].nunique(), schema.words("conversion", "stage")
    for (size, overlap, context), group in results.groupby(["chunk_size", "chunk_overlap", "context"]):
        rows = [["model", *stages, "given back"]]
        for model, rows_of_model in group.groupby("model", sort=False):
            by_stage = rows_of_model.groupby("stage")
            perplexity, closed = by_stage["perplexity"].mean(), by_stage["gap_closed"].mean()
            back = "" if pd.isna(closed.get("distilled")) else f"{closed['distilled']:.0%}"
            rows.append([str(model), *(f"{perplexity[stage]:.2f}" if stage in perplexity else "" for stage in stages), back])
        caption = f"chunks of {size} tokens that also see {overlap} before, context of {context}, {seeds} seed{'s' * (seeds > 1)}"
        yield Table(PERPLEXITY.table_title(), rows, conditions=caption)


TABLES = {
    "latency": latency_tables,
    "accuracy": accuracy_tables,
    "max_context": max_context_tables,
    "conversion": conversion_tables,
}
"""The tables of each kind of results."""


def _mark(notes: list[str], row: "pd.Series[Any]") -> str:
    """The superscript of the footnote with the row's reason, added to `notes` if it is new; empty without a reason."""
    if pd.isna(row["detail"]) or not row["detail"]:
        return ""
    note = str(row["detail"])
    if note not in notes:
        notes.append(note)
    return superscript(notes.index(note) + 1)
