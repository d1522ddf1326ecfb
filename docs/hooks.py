"""What MkDocs does not do by itself: mathematics without JavaScript, and measured numbers that nobody types.

In a page, `$…$` and, as a paragraph of its own, `$$…$$` are LaTeX, which becomes MathML here and is drawn by the browser.
`{{ table results/<folder> <column> }}` is the table of one quantity, and `{{ cell results/<folder> <attention> <place> <column> }}`
one number of it, both as `python -m evals.export` prints them and read when the site is built. `{{ columns <schema> }}` lists the
columns that schemas/<schema>.schema.json describes, and `{{ checks }}` the checks of the certificate.

The study's page says more: `{{ finding <name> }}` is a sentence or table of `evals.paper.findings`, `{{ figure <name> }}` a figure
of `evals.paper.figures` with its caption, and `{{ recipe }}` the commands of conf/paper.yaml.
"""

import re
import xml.etree.ElementTree as etree
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from latex2mathml.converter import convert_to_element
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.util import AtomicString
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from evals.certification.checks import CHECKS
from evals.paper import figures as study
from evals.paper.draw import STUDY, missing_data
from evals.paper.findings import FINDINGS
from evals.paper.recipe import recipe
from evals.results.formatting import format_value
from evals.results.frames import read_table, rows_by_cell, swept_column
from evals.results.markup import Table, markdown
from evals.results.metrics import METRICS
from evals.results.schema import schema

ROOT = Path(__file__).resolve().parents[1]
DIRECTIVE = re.compile(r"\{\{ (\w+)((?: [^{}\s]+)*) \}\}")


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


def on_page_markdown(text: str, **_: object) -> str:
    return DIRECTIVE.sub(filled, text)


def filled(directive: re.Match[str]) -> str:
    """What stands in the site in place of a directive. Raises PluginError if it is unknown, or the results do not hold it."""
    try:
        return DIRECTIVES[directive[1]](*directive[2].split())
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise PluginError(f"{directive[0]}: {error!r}") from error


def one_cell(folder: str, name: str, value: str, column: str) -> str:
    """One metric of one attention at one value of the swept setting."""
    return format_value(_cells(table_of(folder))[name, value], METRICS[column])


def one_table(folder: str, column: str) -> str:
    """One metric of all attentions over the swept setting."""
    results, metric = table_of(folder), METRICS[column]
    cells = _cells(results)
    names, values = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    reference = next(iter(results["relative_to"].dropna()), "the reference")
    rows = [[name, *(format_value(cells.get((name, value)), metric) for value in values)] for name in names]
    return markdown(Table(metric.table_title(reference), [[swept_column(results), *values], *rows]))


def _cells(results: pd.DataFrame) -> dict[tuple[str, str], "pd.Series[Any]"]:
    return {(name, str(value)): row for (name, value), row in rows_by_cell(results, swept_column(results)).items()}


def checks() -> str:
    """The checks of the certificate as a table."""
    rows = [f"| {check.name} | {check.description} |" for check in CHECKS]
    return "\n".join(["| check | what it demands |", "|---|---|", *rows])


def listed(kind: str) -> str:
    """The columns of a schema as a table; those that not every sweep has come last."""
    described, always = schema(kind)["properties"], schema(kind)["required"]
    rows = [
        f"| `{name}` | {column.get('unit', '')} | {column['description']}{'' if name in always else ' Only where it applies.'} |"
        for name, column in described.items()
    ]
    return "\n".join(["| column | unit | meaning |", "|---|---|---|", *rows])


def figure(name: str, *optional: str) -> str:
    """The pictures of a figure, what they draw, and where that comes from; nothing where an `optional` one has no data."""
    shown = {one.name: one for one in study.FIGURES}[name]
    absent = missing_data(ROOT / STUDY, [shown])
    if absent and optional == ("optional",):
        return ""
    if absent:
        raise ValueError(absent[name])
    folder = ROOT / "plots" / STUDY.name
    paths = [path for path in sorted(folder.glob(f"{name}*.svg")) if path.stem == name or path.stem.startswith(f"{name}-")]
    if not paths and "optional" not in optional:
        raise ValueError(f"{name} is not in plots/{STUDY.name}: run `python -m evals.figures paper`")
    return "\n\n".join(map(embedded, paths))


def embedded(path: Path) -> str:
    """One picture; its caption, of which all but the first sentence opens with a click."""
    _, says, *origin = path.with_suffix(".md").read_text(encoding="utf-8").strip().split("\n\n")
    picture = f"![{says}](../{path.relative_to(ROOT).as_posix()})"
    return "\n\n".join([picture, f'<details markdown="1"><summary>{says}</summary>', *origin, "</details>"])


def commands() -> str:
    """All that the study is measured by, as a block for a shell."""
    lines = [f"# {step.what}\n" + "\n".join(step.lines(STUDY.as_posix())) for step in recipe()]
    return "\n\n".join(["```sh", *lines, "```"])


DIRECTIVES = {
    "cell": one_cell,
    "checks": checks,
    "columns": listed,
    "table": one_table,
    "finding": lambda name: FINDINGS[name](ROOT / STUDY),
    "figure": figure,
    "recipe": commands,
}


@cache
def table_of(folder: str) -> pd.DataFrame:
    results = read_table(ROOT / folder)
    return results.sort_values(swept_column(results), kind="stable")
