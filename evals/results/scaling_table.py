"""The tables of fits: the scaling of each attention's latency and memory along the swept setting, and crossings of latencies."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd

from evals.results.frames import split, swept_column
from evals.results.history import History, Process
from evals.results.ledger import Record
from evals.results.schema import columns
from evals.results.settings import COMPARISON_SETTINGS, group_by, is_number, varying
from evals.stats.crossovers import NONE_IN_RANGE, crossovers
from evals.stats.scaling import agreement, fit_scaling

Row = dict[str, object]


def build(results: pd.DataFrame, records: Sequence[Record]) -> dict[str, pd.DataFrame]:
    """Builds the tables `scaling` and `crossovers` from the table of latencies and the records of its ledger.

    Returns:
        Both tables, with a fit for each group of rows that differ in the swept setting alone, after columns with the other
        settings and options that vary; none if the swept setting is not a positive number.
    """
    swept = swept_column(results)
    ok = results[results["outcome"] == "ok"]
    if not is_number(results[swept]) or not results[swept].between(0, math.inf, inclusive="neither").all() or ok.empty:
        return {}
    histories = {key: History(records, key) for key in ok["comparison"].unique()}
    # With matched parameters ff_dim follows from the attention and the swept size, and separates no groups.
    dependent = {swept, "ff_dim"} if results["match"].eq("params").all() else {swept}
    options = dict.fromkeys(name for settings, _ in split(results, swept) for name in settings if name not in COMPARISON_SETTINGS)
    fixed = [*varying(results, [setting for setting in COMPARISON_SETTINGS if setting not in dependent]), *options]
    scaling: list[Row] = []
    crossing: list[Row] = []
    for values, rows in group_by(ok, fixed):
        settings: Row = dict(zip(fixed, values, strict=True))
        attentions = [group.sort_values(swept) for _, group in rows.groupby("attention", sort=False)]
        scaling += [settings | fit for group in attentions for fit in _fits(group, swept, histories)]
        crossing += [settings | row for pair in combinations(attentions, 2) for row in _crossovers(*pair, swept, histories)]
    return {
        "scaling": pd.DataFrame(scaling, columns=[*fixed, *columns("scaling")]),
        "crossovers": pd.DataFrame(crossing, columns=[*fixed, *columns("crossovers")]),
    }


def _fits(rows: pd.DataFrame, swept: str, histories: Mapping[str, History]) -> list[Row]:
    """Fits t = a + b·n^p to the latency and the memory of one attention, and for the latency to its declared FLOPs."""
    name, sizes = str(rows["attention"].iloc[0]), rows[swept].tolist()
    rounds = [histories[key].round_medians(Process(name)) for key in rows["comparison"]]
    declared = fit_scaling(sizes, [[flops] for flops in rows["flops"]]) if (rows["flops"] > 0).all() else None
    fits = []
    for quantity, measured in (("latency", rounds), ("memory", [[peak] for peak in rows["peak_bytes"]])):
        if not all(values and min(values) > 0 for values in measured):  # a memory peak may be unknown, or 0
            continue
        fit = fit_scaling(sizes, measured)
        row: Row = {"attention": name, "quantity": quantity, "overhead": fit.a, "factor": fit.b, "note": fit.note}
        row |= {"exponent": fit.exponent.value, "exponent_low": fit.exponent.low, "exponent_high": fit.exponent.high}
        if quantity == "latency" and declared is not None:
            row |= {"declared_exponent": declared.exponent.value, "agreement": agreement(fit, declared)}
        fits.append(row)
    return fits


def _crossovers(first: pd.DataFrame, second: pd.DataFrame, swept: str, histories: Mapping[str, History]) -> list[Row]:
    """The sizes at which the latencies of two attentions cross, from the rounds that both completed."""
    names = {"first": first["attention"].iloc[0], "second": second["attention"].iloc[0]}
    both = first.merge(second, on=[swept, "comparison"])
    log_ratios = {
        size: [-ratio for ratio in histories[key].log_ratios(Process(names["second"]), Process(names["first"]))]
        for size, key in zip(both[swept], both["comparison"], strict=True)
    }
    known = {size: ratios for size, ratios in log_ratios.items() if ratios}
    if len(known) < 2:
        return []
    rows: list[Row] = []
    for crossing in crossovers(list(known), list(known.values())):
        ends = {"at": crossing.at.value, "at_low": crossing.at.low, "at_high": crossing.at.high}
        rows.append({**names, **ends, "after": crossing.after, "note": ""})
    return rows or [{**names, "note": NONE_IN_RANGE}]
