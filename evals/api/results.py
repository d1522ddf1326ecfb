"""`Results`: what `evals.compare` and `evals.load` return. Everything in it is read from the files of a result folder."""

import html
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from evals import report
from evals.cli.outputs import RENDERERS
from evals.errors import UsageError
from evals.plots import registry
from evals.results import schema
from evals.results.export import TABLES
from evals.results.folder import ResultFolder
from evals.results.folder_kinds import CONTENTS, check_folder
from evals.results.history import Process
from evals.results.ledger import Ledger
from evals.results.markup import html_table
from evals.stats.verdicts import ALPHA, verdicts

OPPOSITE = {"faster": "slower", "slower": "faster"}


@dataclass(frozen=True)
class SpeedupResult:
    """How many times faster one attention is than another, with the 95 % interval and the verdict."""

    attention: str
    over: str
    settings: dict[str, Any]  # those that `Results.speedup` was given
    value: float  # latency of `over` divided by that of `attention`
    low: float
    high: float
    verdict: str  # faster, slower, same or ambiguous

    def __str__(self) -> str:
        at = "".join(f", {name} {value}" for name, value in self.settings.items())
        return f"{self.attention} over {self.over}{at}: {self.value:.3g}x ({self.low:.3g}x to {self.high:.3g}x), {self.verdict}"

    __repr__ = __str__


class ReportPath(PosixPath):
    """Path of an HTML report; a notebook shows the report."""

    def _repr_html_(self) -> str:
        page = html.escape(self.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 40em; border: 0"></iframe>'


class Results:
    """The results in one folder; those of `evals.compare` are limited to the comparisons of that call.

    A notebook shows their tables, and `print` the table of the command line.
    """

    def __init__(self, folder: Path, jobs: Collection[str] | None = None) -> None:
        """Reads the table of results.

        Args:
            folder: a result folder of `evals.compare` or `python -m evals.run`.
            jobs: the ids of the comparisons whose rows count; None: all.

        Raises:
            ValueError: in one sentence, if it is no result folder.
        """
        self.folder = folder
        self.kind = check_folder(folder, "export")
        results = schema.read(folder / "results.csv")
        column = {"latency": "comparison", "accuracy": "study"}.get(self.kind)
        if jobs is not None and column is not None:
            results = results[results[column].isin(list(jobs))].reset_index(drop=True)
        self._results = results

    def table(self) -> pd.DataFrame:
        """The table of results, one row for each attention and setting; the schemas of the documentation explain its columns."""
        return self._results.copy()

    def plot(self, name: str = "latency") -> Figure:
        """Draws one figure.

        Args:
            name: of the figure, as in the folder of plots: latency, speedup, peak_memory, throughput, pareto, distribution, …

        Raises:
            ValueError: if there is no such figure; the message names those that there are.
        """
        records = Ledger(self.folder / "samples.jsonl").read()[0] if self.kind == "latency" else []
        tables = registry.read_tables(self.folder, self.kind) | {self.kind: self._results}
        drawings = dict(registry.figures(self.kind, tables, records))
        figure = drawings[name]() if name in drawings else None
        if figure is None:
            drawable = ", ".join(one for one in drawings if one != name)
            reason = "has no data here" if name in drawings else "is not known"
            raise UsageError(f"the figure {name} {reason}; there may be {drawable}")
        return figure

    def speedup(self, attention: str, over: str, **settings: Any) -> SpeedupResult:
        """How many times faster an attention is than another, from rounds in which both were measured.

        Args:
            attention, over: names of two attentions.
            settings: as many columns of the table, with their values, as select one measurement of each, such as seq_len=8192.

        Returns:
            The ratio of latencies with its 95 % interval. The verdict over the reference is that of the table. The verdict of
            another pair is corrected for the number of all pairs.

        Raises:
            ValueError: if the attentions were not measured at these settings, or at several, or gave no number there.
        """
        if self.kind != "latency":
            raise UsageError(f"{self.folder} holds {CONTENTS[self.kind]}, which have no speed-up; use table() or plot()")
        data = ResultFolder(self.folder)
        known = list(dict.fromkeys(self._results["attention"]))
        for name in (attention, over):
            if name not in known:
                raise UsageError(f"{name} was not measured; known are {', '.join(known)}")
        rows = data.select({attention, over}, {name: str(value) for name, value in settings.items()})
        rows = rows[rows["comparison"].isin(self._results["comparison"])]
        for name in data.settings:
            values = rows[name].drop_duplicates().tolist()
            if len(values) > 1:
                raise UsageError(f"{attention} and {over} were measured at several values of {name}: give one of {values}")
        ours, theirs = (_only_row(rows, name, settings) for name in (attention, over))
        ratio = data.speedup(ours, theirs).ratio
        verdict = self._verdict(data, ours, theirs)
        return SpeedupResult(attention, over, settings, ratio.value, ratio.low, ratio.high, verdict)

    def _verdict(self, data: ResultFolder, ours: "pd.Series[Any]", theirs: "pd.Series[Any]") -> str:
        if ours["relative_to"] == theirs["attention"] and isinstance(ours["verdict"], str):
            return ours["verdict"]
        if theirs["relative_to"] == ours["attention"] and isinstance(theirs["verdict"], str):
            return OPPOSITE.get(theirs["verdict"], theirs["verdict"])
        history = data.histories.get(ours["comparison"])
        paired = history and history.speedup(Process(theirs["attention"]), Process(ours["attention"]))
        if not paired:
            return "ambiguous"
        rows = self._results[self._results["outcome"] == "ok"]
        pairs = sum(math.comb(count, 2) for count in rows.groupby("comparison").size())
        floor = data.noise_floor(data.table[data.table["comparison"] == ours["comparison"]])
        return verdicts([paired], [floor], ALPHA / pairs)[0]

    def report(self) -> ReportPath:
        """Writes the report of the whole folder to report.html in it, and returns its path. A notebook shows the report."""
        return ReportPath(report.write([self.folder], self.folder / "report.html"))

    def __repr__(self) -> str:
        render = RENDERERS.get(self.kind)
        return render(self._results) if render is not None else self._results.to_string()

    def _repr_html_(self) -> str:
        return "\n".join(map(html_table, TABLES[self.kind](self._results)))


def _only_row(rows: pd.DataFrame, name: str, settings: dict[str, Any]) -> "pd.Series[Any]":
    found = rows[rows["attention"] == name]
    at = "".join(f", {key} {value}" for key, value in settings.items())
    if found.empty:
        raise UsageError(f"{name} was not measured{at and ' at'}{at[1:]}")
    row = found.iloc[-1]
    if row["outcome"] != "ok":
        raise UsageError(f"{name}{at} gave no number: {row['outcome']}, {row['detail']}")
    return row
