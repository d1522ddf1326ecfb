"""`python -m evals.export results/<sweep> --to markdown|latex`: the tables of the screen, for a README or a paper.

Exit code: 0, or 2 for what cannot be read, in one sentence on standard error.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from evals.cells import QUANTITIES, cell
from evals.figures import read, swept_column

Rows = Sequence[Sequence[str]]
NOTE = "±: half of the 95 % interval"
LATEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}
MARKDOWN = {**{character: rf"\{character}" for character in r"\`*_[]|"}, "<": "&lt;", ">": "&gt;", "&": "&amp;"}


def escaped(text: str, characters: dict[str, str]) -> str:
    """`text` on one line, with what has a meaning in the format put as what it looks like."""
    return "".join(characters.get(character, character) for character in re.sub(r"\s+", " ", text))


def titled(title: str, rows: Rows) -> str:
    return f"{title} ({NOTE})" if any("±" in text for row in rows for text in row) else title


def markdown(title: str, rows: Rows) -> str:
    lines = [f"| {' | '.join(escaped(text, MARKDOWN) for text in row)} |" for row in rows]
    rule = f"|:--{'|--:' * (len(rows[0]) - 1)}|"
    return "\n".join([f"**{escaped(titled(title, rows), MARKDOWN)}**", "", lines[0], rule, *lines[1:]])


def latex(title: str, rows: Rows) -> str:
    r"""A `table` with plain `\hline`: it needs no package."""
    lines = [" & ".join(escaped(text, LATEX) for text in row) + r" \\" for row in rows]
    columns = f"l{'r' * (len(rows[0]) - 1)}"
    head = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(titled(title, rows), LATEX)}}}"]
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}"]
    return "\n".join([*head, *body, r"\end{table}"])


FORMATS: dict[str, Callable[[str, Rows], str]] = {"markdown": markdown, "latex": latex}


def exported(results: pd.DataFrame, form: str) -> str:
    """One table a quantity that was measured: attentions down, the swept setting across. Raises ValueError for several sweeps."""
    swept = swept_column(results)
    twice = results[results.duplicated(["attention", swept])]
    if len(twice):
        name, place = twice.iloc[0][["attention", swept]]
        raise ValueError(
            f"{name} stands twice at {swept}={place}: a table holds one sweep, give a folder in which only {swept} varies"
        )
    places = sorted(results[swept].unique())
    cells = {(row["attention"], row[swept]): row for _, row in results.iterrows()}
    reference = next(iter(results["relative_to"].dropna()), None)
    tables = []
    for quantity in QUANTITIES:
        if quantity.column not in results or not results[quantity.column].notna().any():
            continue
        names = dict.fromkeys(results["attention"])
        rows = [[name, *(cell(cells.get((name, place)), quantity) for place in places)] for name in names]
        tables.append(FORMATS[form](quantity.title.format(reference=reference), [[swept, *map(str, places)], *rows]))
    return "\n\n".join(tables)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.export", description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", type=Path, help="a folder with a results.csv, such as results/seq_len")
    parser.add_argument("--to", choices=FORMATS, default="markdown", help="default: markdown")
    options = parser.parse_args(arguments)
    try:
        print(exported(read(options.results), options.to), flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read what we print, as head does, wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
