"""A table of text as Markdown, LaTeX or HTML."""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from evals.stats.intervals import CONFIDENCE

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    rows: list[list[str]]  # the first row is the head
    notes: list[str] = field(default_factory=list)  # footnotes; cells refer to them by superscript numbers from 1
    conditions: str = ""  # settings of the measurement, written below
    over_seeds: bool = False  # whether intervals are over the seeds of training runs

    @property
    def caption(self) -> str:
        """The title, and the meaning of ± if a cell has one."""
        if not any("±" in text for row in self.rows for text in row):
            return self.title
        seeds = " over seeds" if self.over_seeds else ""
        return f"{self.title} (±: half of the {100 * CONFIDENCE:.0f} % interval{seeds})"

    @property
    def footnotes(self) -> list[str]:
        return [f"{superscript(number)} {note}" for number, note in enumerate(self.notes, 1)]

    @property
    def lines_below(self) -> list[str]:
        return [*self.footnotes, *([self.conditions] if self.conditions else [])]


def superscript(number: int) -> str:
    """Writes a number as a superscript, which refers to a footnote."""
    return str(number).translate(SUPERSCRIPTS)


# --- formats --------------------------------------------------------------------------------------

MARKDOWN = {**{character: rf"\{character}" for character in r"\`*_[]|~$"}, "<": "&lt;", ">": "&gt;", "&": "&amp;"}
LATEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    **{character: f"{{{character}}}" for character in "[]*"},  # after the end of a row they begin an option
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


def escape(text: str, characters: dict[str, str]) -> str:
    """Puts a text on one line and replaces the characters that have a meaning in the format."""
    return "".join(characters.get(character, character) for character in re.sub(r"\s+", " ", text).strip())


def escape_latex(text: str) -> str:
    """Escapes a text for any LaTeX engine. A character that the engine may have no glyph for becomes its code point."""
    known = (one if one in LATEX or one.isspace() or " " < one <= "~" else f"(U+{ord(one):04X})" for one in text)
    separated = re.sub(r"([-,'])(?=\1)", "\\1\0", "".join(known))  # two of them would join into another character
    return escape(separated, {**LATEX, "\0": "{}"})


def markdown(table: Table) -> str:
    """Renders a table as Markdown: caption, table, footnotes."""
    head, *rows = (f"| {' | '.join(escape(text, MARKDOWN) for text in row)} |" for row in table.rows)
    rule = f"|:--{'|--:' * (len(table.rows[0]) - 1)}|"
    notes = "<br>\n".join(escape(text, MARKDOWN) for text in table.lines_below)
    return "\n".join([f"**{escape(table.caption, MARKDOWN)}**", "", head, rule, *rows, *(["", notes] if notes else [])])


def latex(table: Table) -> str:
    r"""Renders a table as a LaTeX `table` with plain `\hline`, which needs no package."""
    head, *rows = (" & ".join(map(escape_latex, row)) + r" \\" for row in table.rows)
    columns = f"l{'r' * (len(table.rows[0]) - 1)}"
    size = r"\footnotesize" if len(table.rows[0]) < 8 else r"\scriptsize"  # seven lengths fit into a page of article
    notes = " \\\\\n".join(map(escape_latex, table.lines_below))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape_latex(table.caption)}}}",
            size,
            r"\setlength{\tabcolsep}{2.5pt}",
            rf"\begin{{tabular}}{{{columns}}}",
            *(r"\hline", head, r"\hline", *rows, r"\hline"),
            r"\end{tabular}",
            *([r"\par\smallskip", rf"\parbox{{\linewidth}}{{\raggedright {notes}}}"] if notes else []),
            r"\end{table}",
        ]
    )


def html_table(table: Table) -> str:
    """Renders a table as HTML, for a notebook."""
    tags = ["th", *["td"] * (len(table.rows) - 1)]
    cells = ("".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row) for tag, row in zip(tags, table.rows, strict=True))
    rows = "".join(f"<tr>{row}</tr>" for row in cells)
    notes = "<br>".join(map(html.escape, table.lines_below))
    return f"<p><b>{html.escape(table.caption)}</b></p><table>{rows}</table><p><small>{notes}</small></p>"


FORMATS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "latex": latex}
