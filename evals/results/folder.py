"""What a folder of results holds for or against a claim: rows of results.csv, and the paired rounds of the ledger beside it."""

import math
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from evals.errors import UsageError, one_sentence
from evals.results import schema
from evals.results.history import History, Process
from evals.results.ledger import Ledger
from evals.results.settings import COMPARISON_SETTINGS
from evals.stats.intervals import Interval

NUMBERS = (
    "latency_s",
    "latency_low_s",
    "latency_high_s",
    "rounds",
    "speedup",
    "speedup_low",
    "speedup_high",
    "noise_floor",
    "peak_bytes",
)


class ResultFolder:
    """One folder's table, and the ledger beside it where there is one. Raises UsageError for what is no table of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            table = schema.read(folder / "results.csv")
        except schema.SchemaVersionError as error:
            raise UsageError(str(error)) from error
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder / 'results.csv'} is no table of results: {one_sentence(error)}") from error
        for column in ("attention", "outcome", "comparison", "relative_to", "seq_len"):
            if column not in table.columns:
                raise UsageError(f"{folder / 'results.csv'} has no column {column}: run `python -m evals.run` again")
        options = {str(key).rpartition(".")[2] for key in table.get("swept", pd.Series(dtype=str)).dropna()}
        # match=params gives each candidate a feed-forward width of its own, which is then no setting that they share.
        own = {"ff_dim"} - options if table.get("match", pd.Series(dtype=str)).notna().any() else set()
        self.settings = [
            column for column in dict.fromkeys((*COMPARISON_SETTINGS, *sorted(options))) if column in {*table.columns} - own
        ]
        self.table = table.reindex(columns=list(dict.fromkeys((*table.columns, *NUMBERS))))
        self.names = list(dict.fromkeys(map(str, table["attention"])))

    @cached_property
    def histories(self) -> dict[str, History]:
        records = Ledger(self.folder / "samples.jsonl").read()[0]
        try:
            return {key: History(records, key) for key in self.table["comparison"].unique()}
        except KeyError:  # a ledger of an earlier form: the table stands alone, and the evidence says so
            return {}

    def rows(self, names: Collection[str], settings: dict[str, str]) -> pd.DataFrame:
        """The rows of these attentions under these settings. Raises UsageError, with what there is, if there is none."""
        rows = self.table[self.table["attention"].isin(list(names))]
        for key, value in settings.items():
            if key not in self.settings:
                raise UsageError(f"{key} is no setting of {self.folder}; known are {', '.join(self.settings)}")
            there = [str(one) for one in sorted(self.table[key].dropna().unique())]
            chosen = [one for one in there if one == value or _number(one) == _number(value)]
            if not chosen:
                raise UsageError(f"{key} {value} was not measured in {self.folder}; measured are {', '.join(there)}")
            rows = rows[rows[key].astype(str).isin(chosen)]
        return rows

    def floor(self, cell: pd.DataFrame) -> float:
        """The noise floor of these rows; of the whole table, at its worst, where the reference failed here."""
        for rows in (cell, self.table):
            if rows["noise_floor"].notna().any():
                return float(rows["noise_floor"].max())
        return math.inf

    def speedup(self, ours: pd.Series, theirs: pd.Series) -> tuple[Interval, str]:
        """How many times faster ours is, and how that is known."""
        if ours["relative_to"] == theirs["attention"] and not math.isnan(ours["speedup"]):
            return Interval(ours["speedup"], ours["speedup_low"], ours["speedup_high"]), "paired"
        if theirs["relative_to"] == ours["attention"] and not math.isnan(theirs["speedup"]):
            return Interval(1 / theirs["speedup"], 1 / theirs["speedup_high"], 1 / theirs["speedup_low"]), "paired"
        history = self.histories.get(ours["comparison"])
        paired = history and history.speedup(Process(theirs["attention"]), Process(ours["attention"]))
        if paired:
            return paired, "paired"
        value = math.log(theirs["latency_s"] / ours["latency_s"])
        up, down = (
            math.hypot(*(math.log(row[bound] / row["latency_s"]) for row, bound in ((theirs, one), (ours, other))))
            for one, other in (("latency_high_s", "latency_low_s"), ("latency_low_s", "latency_high_s"))
        )
        return Interval(*map(math.exp, (value, value - down, value + up))), "computed from two intervals, not paired"

    def rounds(self, row: pd.Series) -> list[float]:
        """The median of each round; where there is no ledger, the one of all."""
        history = self.histories.get(row["comparison"])
        medians = history.medians(Process(row["attention"])) if history else {}
        return [float(np.median(turns)) for turns in medians.values()] or [float(row["latency_s"])]

    def log_ratios(self, ours: pd.Series, theirs: pd.Series) -> list[float]:
        """log(t_ours / t_theirs), one a round that both completed side by side; none without a ledger."""
        history = self.histories.get(ours["comparison"])
        ratios = history.ratios(Process(ours["attention"]), Process(theirs["attention"])) if history else []
        return [math.log(np.median(turns)) for turns in ratios]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
