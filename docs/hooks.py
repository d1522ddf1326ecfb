"""MkDocs hooks: LaTeX formulas become MathML, and directives are replaced by numbers, tables and figures of the results.

Formulas: `$…$` inside a line, and `$$…$$` as a paragraph of its own. The browser draws MathML without JavaScript.

Directives, which are expanded when the site is built:

    {{ value results/<folder> <attention> <setting> <column> }}    one number, formatted as `python -m evals.export` prints it
    {{ table results/<folder> <column> }}                          one metric of all attentions over the swept setting
    {{ columns <schema> }}                                         the columns described by schemas/<schema>.schema.json
    {{ checks }}                                                   the checks of the certificate
    {{ finding <name> }}                                           a sentence or table of `evals.paper.findings`
    {{ figure <name> [optional] }}                                 a figure of `evals.paper.figures` with its caption
    {{ recipe }}                                                   the commands of conf/paper.yaml
    {{ board <sweep> }}                                            the committed results/<machine>/<sweep> side by side
    {{ false_alarms }}                                             how often the guard was wrong: docs/assets/guard.csv
"""

import re
import subprocess
import xml.etree.ElementTree as etree
from collections.abc import Callable
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
from evals.paper.draw import STUDY, missing_data
from evals.paper.figures import FIGURES
from evals.paper.findings import FINDINGS
from evals.paper.recipe import recipe
from evals.results.board import board
from evals.results.formatting import format_value
from evals.results.frames import read_table, rows_by_cell, swept_column
from evals.results.markup import Table, markdown
from evals.results.metrics import METRICS
from evals.results.schema import schema

ROOT = Path(__file__).resolve().parents[1]
DIRECTIVE = re.compile(r"\{\{ (\w+)((?: [^{}\s]+)*) \}\}")


class Mathematics(Extension):
    """Converts `$…$` and `$$…$$` to MathML."""

    def extendMarkdown(self, md: Markdown) -> None:
        # The priority lies between code in backticks (190), whose dollars are no formulas, and backslash escapes (180), which would
        # eat the backslashes of LaTeX.
        md.inlinePatterns.register(Formula(r"\$\$(.+?)\$\$", md, "block"), "displayed_formula", 186)
        md.inlinePatterns.register(Formula(r"(?<![\w$])\$(?! )([^$\n]+?)(?<! )\$(?![\w$])", md, "inline"), "formula", 185)


class Formula(InlineProcessor):
    """Converts one kind of formula. display: block or inline."""

    def __init__(self, pattern: str, md: Markdown, display: str) -> None:
        super().__init__(pattern, md)
        self.display = display

    def handleMatch(self, match: re.Match[str], data: str) -> tuple[etree.Element, int, int]:
        formula = convert_to_element(match[1], display=self.display)
        for element in formula.iter():
            # latex2mathml copies commands that it does not know into the output.
            if element.text and "\\" in element.text:
                raise PluginError(f"not known to latex2mathml: {element.text} in {match[0]}")
            element.text = element.text and AtomicString(element.text)
        return formula, match.start(0), match.end(0)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(Mathematics())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the committed figures to the site, under their paths in the repository."""
    for path in sorted((ROOT / "plots" / "paper").rglob("*.svg")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(text: str, **_: object) -> str:
    return DIRECTIVE.sub(expand_directive, text)


def expand_directive(match: re.Match[str]) -> str:
    """Returns the Markdown of a directive. Raises PluginError if the directive is unknown or the results lack its data."""
    name, arguments = match[1], match[2].split()
    try:
        return DIRECTIVES[name](*arguments)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise PluginError(f"{match[0]}: {error!r}") from error


# --- directives ------------------------------------------------------------------------------------


def value(folder: str, attention: str, setting: str, column: str) -> str:
    """One metric of one attention at one value of the swept setting."""
    return format_value(rows_by_name_and_setting(folder)[attention, setting], METRICS[column])


def metric_table(folder: str, column: str) -> str:
    """One metric of all attentions over the swept setting."""
    results, metric, rows = sorted_results(folder), METRICS[column], rows_by_name_and_setting(folder)
    names, settings = (list(dict.fromkeys(keys)) for keys in zip(*rows, strict=True))
    reference = next(iter(results["relative_to"].dropna()), "the reference")
    lines = [[name, *(format_value(rows.get((name, setting)), metric) for setting in settings)] for name in names]
    return markdown(Table(metric.table_title(reference), [[swept_column(results), *settings], *lines]))


def column_table(name: str) -> str:
    """The columns of a schema with unit and meaning; columns that only some sweeps have come last."""
    properties, required = schema(name)["properties"], schema(name)["required"]
    rows = [
        f"| `{column}` | {about.get('unit', '')} | {about['description']}{'' if column in required else ' Only in some sweeps.'} |"
        for column, about in properties.items()
    ]
    return "\n".join(["| column | unit | meaning |", "|---|---|---|", *rows])


def check_table() -> str:
    """The checks of the certificate, in the order in which they run."""
    rows = [f"| {check.name} | {check.description} |" for check in CHECKS]
    return "\n".join(["| check | what it demands |", "|---|---|", *rows])


def finding(name: str) -> str:
    """A sentence or table of the study."""
    return FINDINGS[name](ROOT / STUDY)


def figure(name: str, *options: str) -> str:
    """The pictures of one figure of the study with their captions; empty if it is `optional` and has no data."""
    is_optional = options == ("optional",)
    study_figure = {one.name: one for one in FIGURES}[name]
    missing = missing_data(ROOT / STUDY, [study_figure])
    if missing and not is_optional:
        raise ValueError(missing[name])
    folder = ROOT / "plots" / STUDY.name
    paths = [path for path in sorted(folder.glob(f"{name}*.svg")) if path.stem == name or path.stem.startswith(f"{name}-")]
    if not paths and not is_optional:
        raise ValueError(f"{name} is not in plots/{STUDY.name}: run `python -m evals.figures paper`")
    return "" if missing else "\n\n".join(map(picture_with_caption, paths))


def picture_with_caption(path: Path) -> str:
    """One picture, and below it a fold with its caption: the first sentence is visible, the source of the data opens on a click."""
    _, description, *source = path.with_suffix(".md").read_text(encoding="utf-8").strip().split("\n\n")
    picture = f"![{description}](../{path.relative_to(ROOT).as_posix()})"
    return "\n\n".join([picture, f'<details markdown="1"><summary>{description}</summary>', *source, "</details>"])


def recipe_commands() -> str:
    """All commands of the study as one block of shell."""
    steps = ["\n".join([f"# {step.what}", *step.lines(STUDY.as_posix())]) for step in recipe()]
    return "\n\n".join(["```sh", *steps, "```"])


def machine_board(sweep: str) -> str:
    """The tables of all committed results of one sweep: those of the study, and of machines in results/<machine>."""
    folders = sorted(ROOT.glob(f"results/*/{sweep}"))
    if (ROOT / ".git").exists():  # an unpacked archive holds committed files alone
        list_files = ["git", "ls-files", f"results/*/{sweep}/results.csv"]
        committed = subprocess.run(list_files, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
        folders = [ROOT / Path(path).parent for path in committed]
    return "\n\n".join(map(markdown, board(folders)))


def false_alarms() -> str:
    """How many runs of the guard on unchanged code found a regression."""
    cells = pd.read_csv(ROOT / "docs" / "assets" / "guard.csv")
    runs, alarms = (table["run"].nunique() for table in (cells, cells[cells["false_alarms"].notna()]))
    low, high = (f"{cells['load_1m'].quantile(share):.0f}" for share in (0.05, 0.95))
    return f"**{alarms} of {runs}** runs of unchanged code found a regression, at a load of {low} to {high} processes"


DIRECTIVES: dict[str, Callable[..., str]] = {
    "value": value,
    "table": metric_table,
    "columns": column_table,
    "checks": check_table,
    "finding": finding,
    "figure": figure,
    "recipe": recipe_commands,
    "board": machine_board,
    "false_alarms": false_alarms,
}


# --- results ---------------------------------------------------------------------------------------


@cache
def sorted_results(folder: str) -> pd.DataFrame:
    """The table of results of a folder, sorted by the swept setting."""
    results = read_table(ROOT / folder)
    return results.sort_values(swept_column(results), kind="stable")


def rows_by_name_and_setting(folder: str) -> "dict[tuple[str, str], pd.Series[Any]]":
    """The rows of a folder's results by attention and value of the swept setting, both as text."""
    results = sorted_results(folder)
    return {(name, str(setting)): row for (name, setting), row in rows_by_cell(results, swept_column(results)).items()}
