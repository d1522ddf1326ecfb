"""What MkDocs does not do by itself: mathematics without JavaScript, and measured numbers that nobody types.

In a page, `$…$` and, as a paragraph of its own, `$$…$$` are LaTeX, which becomes MathML here and is drawn by the browser.
`{{ table results/<folder> <column> }}` is the table of one quantity, and `{{ cell results/<folder> <attention> <place> <column> }}`
one number of it, both as `python -m evals.export` prints them and read when the site is built.
"""

import re
import xml.etree.ElementTree as etree
from functools import cache
from pathlib import Path

import pandas as pd
from latex2mathml.converter import convert_to_element
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.util import AtomicString
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from evals.cells import QUANTITIES, Quantity, cell
from evals.export import markdown as table
from evals.figures import read, swept_column

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {
    quantity.column: quantity
    for quantity in (
        *QUANTITIES,
        Quantity("% of ceiling", "part of what this machine can do at most, in %, higher is better", "ceiling_fraction", 0.01),
        Quantity("MFLOP", "what a call must compute, in MFLOP", "flops", 1e6),
        Quantity("state KiB", "what decoding must keep, in KiB, lower is better", "state_bytes", 2.0**10),
        Quantity("noise %", "how far the reference seemed to be from itself, in %", "noise_floor", 0.01),
    )
}
DIRECTIVE = re.compile(r"\{\{ (table|cell) ([^{}]*) \}\}")


class Mathematics(Extension):
    """`$…$` and `$$…$$` -> MathML."""

    def extendMarkdown(self, md: Markdown) -> None:
        # Before backslash escapes (180), after code in backticks (190): both have a meaning of their own in LaTeX.
        md.inlinePatterns.register(Formula(r"\$\$(.+?)\$\$", md, "block"), "displayed_formula", 186)
        md.inlinePatterns.register(Formula(r"(?<![\w$])\$(?! )([^$\n]+?)(?<! )\$(?![\w$])", md, "inline"), "formula", 185)


class Formula(InlineProcessor):
    def __init__(self, pattern: str, md: Markdown, display: str) -> None:
        super().__init__(pattern, md)
        self.display = display

    def handleMatch(self, match: re.Match[str], data: str) -> tuple[etree.Element, int, int]:
        formula = convert_to_element(match[1], display=self.display)
        for element in formula.iter():
            # The library passes on what it does not know.
            if element.text and "\\" in element.text:
                raise PluginError(f"not known to latex2mathml: {element.text} in {match[0]}")
            element.text = element.text and AtomicString(element.text)
        return formula, match.start(0), match.end(0)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(Mathematics())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The committed figures are files of the site, under the paths that they have in the repository."""
    for path in sorted((ROOT / "plots" / "paper").rglob("*.svg")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return DIRECTIVE.sub(filled, markdown)


def filled(directive: re.Match[str]) -> str:
    """What stands in the site in place of a directive. Raises PluginError if the results do not hold it."""
    what, (folder, *words) = directive[1], directive[2].split()
    try:
        results = table_of(folder)
        cells = {(row["attention"], str(row[swept_column(results)])): row for _, row in results.iterrows()}
        if what == "cell":
            name, place, column = words
            return cell(cells[name, place], KNOWN[column])
        (quantity,) = (KNOWN[column] for column in words)
    except (ValueError, KeyError) as error:
        raise PluginError(f"{directive[0]}: {error!r}") from error
    names, places = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    reference = next(iter(results["relative_to"].dropna()), None)
    rows = [[name, *(cell(cells.get((name, place)), quantity) for place in places)] for name in names]
    return table(quantity.title.format(reference=reference), [[swept_column(results), *places], *rows])


@cache
def table_of(folder: str) -> pd.DataFrame:
    results = read(ROOT / folder)
    return results.sort_values(swept_column(results), kind="stable")
