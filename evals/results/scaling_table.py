"""What a whole sweep says: how each attention grows along the swept setting, and where one overtakes another."""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from evals.results.frames import swept_column
from evals.results.history import History, Process
from evals.results.latency_table import SETTINGS
from evals.results.ledger import Record
from evals.results.schema import columns
from evals.results.settings import is_number
from evals.stats.crossovers import NONE_IN_RANGE, crossovers
from evals.stats.scaling import agreement, fit_scaling

SCALING = columns("scaling")
CROSSOVERS = columns("crossovers")


def build(results: pd.DataFrame, records: Sequence[Record]) -> dict[str, pd.DataFrame]:
    """The tables `scaling` and `crossovers` of every group of rows that differ in the swept setting alone.

    Neither where that is no positive number: then nothing can grow with it.
    """
    column = swept_column(results)
    ok = results[results["outcome"] == "ok"]
    if not is_number(results[column]) or (results[column] <= 0).any() or ok.empty:
        return {}
    histories = {key: History(records, key) for key in ok["comparison"].unique()}
    # Where parameters are matched, ff_dim goes with the attention and the swept size, and keeps nothing apart that is compared.
    follows = {column, "ff_dim"} if results["match"].eq("params").all() else {column}
    fixed = [setting for setting in SETTINGS if setting not in follows and results[setting].nunique(dropna=False) > 1]
    scaling, crossing = [], []
    for values, rows in ok.groupby(fixed, dropna=False) if fixed else [((), ok)]:
        settings = dict(zip(fixed, values, strict=True))
        cells = {str(name): own.sort_values(column) for name, own in rows.groupby("attention", sort=False)}
        for name, own in cells.items():
            scaling += [settings | fit for fit in _fits(name, own, column, histories)]
        for first, second in combinations(cells, 2):
            crossing += [settings | found for found in _crossovers(cells[first], cells[second], column, histories)]
    return {
        "scaling": pd.DataFrame(scaling, columns=[*fixed, *SCALING]),
        "crossovers": pd.DataFrame(crossing, columns=[*fixed, *CROSSOVERS]),
    }


def _fits(name: str, rows: pd.DataFrame, column: str, histories: dict[str, History]) -> list[dict[str, object]]:
    """t = a + b·n^p of one attention's latency and memory, and what it declares: FLOPs for the one, none for the other."""
    sizes = rows[column].tolist()
    rounds = [_round_medians(histories[key], name) for key in rows["comparison"]]
    declared = fit_scaling(sizes, [[flops] for flops in rows["flops"]]) if (rows["flops"] > 0).all() else None
    fits = []
    for quantity, measured in (("latency", rounds), ("memory", [[peak] for peak in rows["peak_bytes"]])):
        if not all(one and min(one) > 0 for one in measured):  # a peak may be unknown, or nothing
            continue
        fit = fit_scaling(sizes, measured)
        row = {"attention": name, "quantity": quantity, "overhead": fit.a, "factor": fit.b, "note": fit.note}
        row |= {"exponent": fit.exponent.value, "exponent_low": fit.exponent.low, "exponent_high": fit.exponent.high}
        if quantity == "latency" and declared is not None:
            row |= {"declared_exponent": declared.exponent.value, "agreement": agreement(fit, declared)}
        fits.append(row)
    return fits


def _crossovers(first: pd.DataFrame, second: pd.DataFrame, column: str, histories: dict[str, History]) -> list[dict[str, object]]:
    names = {"first": first["attention"].iloc[0], "second": second["attention"].iloc[0]}
    both = first.merge(second, on=[column, "comparison"])
    log_ratios = {
        size: [math.log(np.median(turns)) for turns in histories[key].ratios(Process(names["second"]), Process(names["first"]))]
        for size, key in zip(both[column], both["comparison"], strict=True)
    }
    known = {size: [-ratio for ratio in ratios] for size, ratios in log_ratios.items() if ratios}
    if len(known) < 2:
        return []
    found = crossovers(list(known), list(known.values()))
    if not found:
        return [{**names, "note": NONE_IN_RANGE}]
    return [
        {**names, "at": one.at.value, "at_low": one.at.low, "at_high": one.at.high, "after": one.after, "note": ""} for one in found
    ]


def _round_medians(history: History, name: str) -> list[float]:
    return [float(np.median(turns)) for turns in history.medians(Process(name)).values()]
