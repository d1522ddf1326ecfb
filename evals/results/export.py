"""TODO: what lives here."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from evals.plots.conversion import STAGES
from evals.results import frames, schema
from evals.results.formatting import QUANTITIES, format_bytes, format_mean, format_setting, format_value
from evals.results.frames import swept_column
from evals.results.settings import SETTINGS, TRAINING_SETTINGS, conditions

TIMED, SEEDS = "±: half of the 95 % interval", "±: half of the 95 % interval over seeds"
MARKS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, the first of them the heads; `notes` are numbered, and cells refer to them."""

    title: str
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    under: str = ""
    """What was measured, and under which settings."""
    interval: str = TIMED

    @property
    def caption(self) -> str:
        return f"{self.title} ({self.interval})" if any("±" in text for row in self.rows for text in row) else self.title

    @property
    def footnotes(self) -> list[str]:
        return [f"{str(number).translate(MARKS)} {note}" for number, note in enumerate(self.notes, 1)]


# --- formats --------------------------------------------------------------------------------------

MARKDOWN = {**{character: rf"\{character}" for character in r"\`*_[]|~$"}, "<": "&lt;", ">": "&gt;", "&": "&amp;"}
LATEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    **{character: f"{{{character}}}" for character in "[]*"},  # which begin an option of a row's end
    **{character: f"$^{{{number}}}$" for number, character in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "`": r"\textasciigrave{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': "''",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
    "…": r"\dots{}",
    "µ": r"$\mu$",
}


def escaped(text: str, characters: dict[str, str]) -> str:
    """`text` on one line, with what has a meaning in the format put as what it looks like."""
    return "".join(characters.get(character, character) for character in re.sub(r"\s+", " ", text).strip())


def in_latex(text: str) -> str:
    """`text` as any LaTeX engine sets it. What it may have no letter for is told by its code point."""
    known = (one if one in LATEX or one.isspace() or " " < one <= "~" else f"(U+{ord(one):04X})" for one in text)
    apart = re.sub(r"([-,'])(?=\1)", "\\1\0", "".join(known))  # two of them would join into another character
    return escaped(apart, {**LATEX, "\0": "{}"})


def markdown(table: Table) -> str:
    lines = [f"| {' | '.join(escaped(text, MARKDOWN) for text in row)} |" for row in table.rows]
    rule = f"|:--{'|--:' * (len(table.rows[0]) - 1)}|"
    below = [escaped(text, MARKDOWN) for text in (*table.footnotes, table.under) if text]
    text = [f"**{escaped(table.caption, MARKDOWN)}**", "", lines[0], rule, *lines[1:]]
    return "\n".join([*text, *(["", "<br>\n".join(below)] if below else [])])


def latex(table: Table) -> str:
    r"""A `table` with plain `\hline`: it needs no package."""
    lines = [" & ".join(map(in_latex, row)) + r" \\" for row in table.rows]
    columns = f"l{'r' * (len(table.rows[0]) - 1)}"
    size = r"\footnotesize" if len(table.rows[0]) < 8 else r"\scriptsize"  # seven lengths fit into a page of article
    head = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{in_latex(table.caption)}}}",
        size,
        r"\setlength{\tabcolsep}{2.5pt}",
    ]
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}"]
    below = " \\\\\n".join(in_latex(text) for text in (*table.footnotes, table.under) if text)
    notes = [r"\par\smallskip", rf"\parbox{{\linewidth}}{{\raggedright {below}}}"] if below else []
    return "\n".join([*head, *body, *notes, r"\end{table}"])


FORMATS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "latex": latex}

# --- tables ---------------------------------------------------------------------------------------


def tables(folder: Path) -> Iterator[Table]:
    """Those of one folder. Raises ValueError, in one sentence, if it holds none."""
    path = folder / "results.csv"
    kind = schema.kind_of(path) if path.is_file() else "latency"
    if kind == "latency":
        yield from measured(frames.read_table(folder))
    else:
        results = schema.read(path)
        if results.empty:
            raise ValueError(f"{path} has no row: run the command that wrote it again")
        yield from {"accuracy": learned, "max_context": longest, "conversion": converted}[kind](results)


def measured(results: pd.DataFrame) -> Iterator[Table]:
    """One a quantity, for each group of rows that differ in the swept setting alone: attentions down, that across."""
    for _, sweep in frames.sweeps(results, {}):
        notes: list[str] = []
        marks = {
            (row["attention"], row[sweep.column]): _mark(notes, row) for _, row in sweep.rows.iterrows() if row["outcome"] != "ok"
        }
        cells = {(row["attention"], row[sweep.column]): row for _, row in sweep.rows.iterrows()}
        for quantity in QUANTITIES:
            if quantity.column in sweep.rows and sweep.rows[quantity.column].notna().any():
                rows = [
                    [
                        name,
                        *(
                            format_value(cells.get((name, place)), quantity) + marks.get((name, place), "")
                            for place in sweep.places
                        ),
                    ]
                    for name in sweep.cells
                ]
                heads = [sweep.column, *map(str, sweep.places)]
                yield Table(
                    quantity.title.format(reference=sweep.reference), [heads, *rows], notes, conditions(sweep.rows, sweep.column)
                )


def _mark(notes: list[str], row: "pd.Series[Any]") -> str:
    """A mark for why this row has no number; the same for the same reason."""
    if pd.isna(row["detail"]) or not row["detail"]:
        return ""
    note = str(row["detail"])
    if note not in notes:
        notes.append(note)
    return str(notes.index(note) + 1).translate(MARKS)


def learned(results: pd.DataFrame) -> Iterator[Table]:
    """How well each attention learned, at its best learning rate, over the swept setting; and where it was asked for more."""
    swept = swept_column(results)
    whole = results[results["depth"].isna() & results["position"].isna()]
    apart = [
        name
        for name in TRAINING_SETTINGS
        if name not in (swept, "seq_len") and name in whole and whole[name].nunique(dropna=False) > 1
    ]
    for _, group in whole.groupby(apart, dropna=False, sort=False) if apart else [((), whole)]:
        ok = group[(group["outcome"] == "ok") & group["best"].astype(bool)]
        under = ", ".join(
            TRAINING_SETTINGS[name].format(format_setting(group[name].iloc[0]))
            for name in TRAINING_SETTINGS
            if name in group and group[name].nunique() == 1
        )
        bits = ok["bits_per_byte"].notna().any()
        quantity, title = (
            ("bits_per_byte", "bits per byte, lower is better") if bits else ("accuracy", "accuracy, higher is better")
        )
        trained = ok[ok["eval_seq_len"] == ok["seq_len"]]
        failed = group[~group["attention"].isin(ok["attention"]) & (group["outcome"] != "ok")]
        yield _over(trained, failed, swept, title, under, partial(_learned_cell, quantity=quantity))
        yield _over(
            trained, failed, swept, "state to decode from, lower is better", under, lambda row: format_bytes(row["state_bytes"])
        )
        for place, rows in ok.groupby(swept):
            if rows["eval_seq_len"].nunique() > 1:
                at = TRAINING_SETTINGS.get(swept, f"{swept} {{}}").format(format_setting(place)).removeprefix("trained at ")
                of = f"{title}; trained at {at}, asked at other lengths"
                yield _over(rows, failed[:0], "eval_seq_len", of, under, partial(_learned_cell, quantity=quantity))


def _over(
    rows: pd.DataFrame, failed: pd.DataFrame, column: str, title: str, under: str, told: Callable[["pd.Series[Any]"], str]
) -> Table:
    """Attentions down, a column's values across; of what failed, the outcome with a footnote."""
    notes: list[str] = []
    places = sorted(pd.concat([rows[column], failed[column]]).unique())
    texts = {(row["attention"], row[column]): f"{row['outcome']}{_mark(notes, row)}" for _, row in failed.iterrows()}
    texts |= {(row["attention"], row[column]): told(row) for _, row in rows.iterrows()}
    names = dict.fromkeys(name for name, _ in texts)
    body = [[str(name), *(texts.get((name, place), "") for place in places)] for name in names]
    return Table(title, [[column, *map(str, places)], *body], notes, under, SEEDS)


def _learned_cell(row: "pd.Series[Any]", quantity: str) -> str:
    return format_mean(row[quantity], row[f"{quantity}_low"], row[f"{quantity}_high"])


def longest(results: pd.DataFrame) -> Iterator[Table]:
    """The longest context of each attention, for each limit and group of settings."""
    apart = [name for name in ("limit_bytes", *SETTINGS) if name in results and results[name].nunique(dropna=False) > 1]
    for _, group in results.groupby(apart, dropna=False, sort=False) if apart else [((), results)]:
        notes: list[str] = []
        rows = [["attention", "tokens", "held", "tokens that do not fit"]]
        for _, row in group.sort_values("max_context", ascending=False).iterrows():
            found = pd.notna(row["max_context"])
            beyond = f"{row['next_seq_len']:.0f}{_mark(notes, row)}" if pd.notna(row["next_seq_len"]) else ""
            rows.append(
                [
                    str(row["attention"]),
                    f"{row['max_context']:.0f}" if found else f"{row['outcome']}{'' if beyond else _mark(notes, row)}",
                    format_bytes(row["peak_bytes"]) if found else "",
                    beyond,
                ]
            )
        limit = format_bytes(group["limit_bytes"].iloc[0])
        yield Table(f"longest context within {limit}, higher is better", rows, notes, conditions(group, "attention"))


def converted(results: pd.DataFrame) -> Iterator[Table]:
    """What a conversion loses and healing gives back, means over seeds."""
    seeds = results["seed"].nunique()
    for (size, overlap, context), group in results.groupby(["chunk_size", "chunk_overlap", "context"]):
        rows = [["model", *STAGES, "given back"]]
        for model, own in group.groupby("model", sort=False):
            by_stage = own.groupby("stage")
            perplexity, closed = by_stage["perplexity"].mean(), by_stage["gap_closed"].mean()
            back = "" if pd.isna(closed.get("distilled")) else f"{closed['distilled']:.0%}"
            rows.append([str(model), *(f"{perplexity[stage]:.2f}" if stage in perplexity else "" for stage in STAGES), back])
        under = f"chunks of {size} tokens that also see {overlap} before, context of {context}, {seeds} seed{'s' * (seeds > 1)}"
        yield Table("perplexity, lower is better", rows, [], under)


# --- the command ----------------------------------------------------------------------------------


def folders_of(given: Sequence[Path]) -> dict[str, Path]:
    """Those that hold a results.csv, by how they are called: the folders themselves, or all below one that does not."""
    found: dict[str, Path] = {}
    for folder in given:
        below = sorted(path.parent for path in folder.rglob("results.csv"))
        whole = (folder / "results.csv").is_file() or not below
        found |= {str(folder): folder} if whole else {path.relative_to(folder).as_posix(): path for path in below}
    return found


def exported(folders: Sequence[Path], form: str) -> str:
    """All tables of these folders; of several, each title begins with its folder. Raises ValueError as `tables`."""
    found = {name: list(tables(folder)) for name, folder in folders_of(folders).items()}
    named = [
        replace(table, title=f"{name}: {table.title}") if len(found) > 1 else table
        for name, made in found.items()
        for table in made
    ]
    return "\n\n".join(map(FORMATS[form], named))
