"""The table of latencies: one row per attention and setting, computed from the raw samples in a ledger."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from evals.measure.machine import IDENTITY
from evals.results.formatting import align_columns, format_value, wrap
from evals.results.frames import rows_by_cell, split, swept_column, swept_values
from evals.results.history import History, Process
from evals.results.ledger import Record
from evals.results.machines import MACHINE
from evals.results.metrics import LATENCY, PEAK_MEMORY, SENT, SPEEDUP, Metric
from evals.results.schema import columns, one_type
from evals.results.settings import setting_phrase
from evals.results.unmatched import unmatched_costs
from evals.stats.intervals import Speedup
from evals.stats.roofline import TOLERANCE, Peaks, Roofline, implausible_peak, impossible, merge_peaks, roofline
from evals.stats.verdicts import ONE_SIGMA, noise_floor, verdicts

COLUMNS = columns("latency")
MEASURED = ("peak_bytes", "process_peak_bytes", "sent_bytes", "certified_as")
"""Columns of a preflight that only rows with a right number show."""
TABLE_METRICS = (LATENCY, SPEEDUP, PEAK_MEMORY, SENT)
"""Metrics of the tables on the terminal and in exports."""


# --- from the ledger ------------------------------------------------------------------------------


def build(records: Sequence[Record]) -> pd.DataFrame:
    """Builds the table from all records of a ledger.

    Of comparisons with the same settings the last one counts. Settings that only a user's workload has become further columns.
    """
    descriptions = _descriptions(records)
    samples: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if "comparison" in record:
            samples[record["comparison"]].append(record)
    peaks = _peaks_by_machine(descriptions.values())
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for key, description in descriptions.items():
        history = History((record for record in samples[key] if record["kind"] != "comparison"), key)
        settings = json.dumps(description["settings"], sort_keys=True)
        _reject_impossible(description, history, peaks.get(_machine(description)))
        for name in description["candidates"]:
            if name in history.failures or history.medians(Process(name)) or history.lost:
                rows[name, settings] = _row(description, name, history, peaks.get(_machine(description)))
    table = list(rows.values())
    add_verdicts(table)
    _add_unmatched(table)
    options = {option: None for description in descriptions.values() for option in description["settings"] if option not in COLUMNS}
    return one_type(pd.DataFrame(table, columns=[*COLUMNS, *options]), "latency")


def _descriptions(records: Sequence[Record]) -> dict[str, Record]:
    """The last description of each comparison, in the order in which they were last begun."""
    descriptions: dict[str, Record] = {}
    for record in records:
        if record.get("kind") == "comparison":
            descriptions.pop(record["comparison"], None)
            descriptions[record["comparison"]] = record
        elif record.get("kind") == "lost" and "comparison" in record:  # it may have been lost before it was described
            descriptions.setdefault(record["comparison"], record["described"])
    return descriptions


def _row(description: Record, name: str, history: History, peaks: Peaks | None) -> dict[str, Any]:
    preflight: Record = history.preflights.get(name) or {"detail": ""}
    failure = history.failures.get(name)
    if failure is None and not history.medians(Process(name)):
        failure = {"outcome": "lost", "detail": history.lost}
    row = {
        "sweep": description["sweep"],
        "swept": description["swept"],
        "comparison": description["comparison"],
        "attention": name,
        **description["settings"],
        "outcome": "ok" if failure is None else failure["outcome"],
        "detail": (failure or preflight)["detail"] or history.lost,
        "stop_reason": "lost" if history.lost else history.stop_reason,
        **{column: preflight[column] for column in COLUMNS if column in preflight and column not in ("outcome", "detail")},
    }
    if failure is not None:
        # No number of an attention that is wrong, or that cannot have done its work, is published.
        return row | (dict.fromkeys(MEASURED) if row["outcome"] in ("uncertified", "impossible") else {})
    speed, limit = _speed(name, history), _limit(preflight, peaks)
    if limit is not None:
        speed |= {"roofline_s": limit.seconds, "bound": limit.bound, "roofline_fraction": limit.fraction(speed["latency_s"])}
    return row | speed | _speedup(name, description["relative_to"], history)


def _limit(preflight: Record, peaks: Peaks | None) -> Roofline | None:
    """The roofline of a step; None if no peaks were measured, or nothing is known of the step."""
    flops, min_bytes = preflight["flops"], preflight["min_bytes"] or 0
    return None if peaks is None or not (flops or min_bytes) else roofline(flops, min_bytes, peaks)


def _reject_impossible(description: Record, history: History, peaks: Peaks | None) -> None:
    """Adds a failure for every candidate with an impossible number, so that no other is compared with it either."""
    tolerance = TOLERANCE[description["settings"]["device"]]
    for name in description["candidates"]:
        if history.is_active(name) and history.medians(Process(name)):
            reason = _impossible(name, history, _limit(history.preflights[name], peaks), tolerance)
            if reason:
                history.failures[name] = {"outcome": "impossible", "detail": reason}


def _impossible(name: str, history: History, limit: Roofline | None, tolerance: float) -> str | None:
    """Why a memory peak or the fastest sample cannot be true; None if both can."""
    preflight = history.preflights[name]
    if "peak_bytes" in preflight and (reason := implausible_peak(preflight["peak_bytes"], preflight["held_bytes"])):
        return reason
    fastest = min(sample for record in history.records(Process(name)) for part in record["time_slices"] for sample in part)
    return None if limit is None else impossible(fastest, limit, tolerance)


def _speed(name: str, history: History) -> dict[str, Any]:
    latency = history.latency(Process(name))
    records = history.records(Process(name))
    host_s = [record["host_s"] for record in records if "host_s" in record]
    return {
        "host_s": statistics.median(host_s) if host_s else None,
        "exposed_samples": sum(record.get("exposed_samples", 0) for record in records),
        "throttled": next((record["throttled"] for record in records if record.get("throttled")), ""),
        "latency_s": latency.value,
        "latency_low_s": latency.low,
        "latency_high_s": latency.high,
        "samples": sum(len(part) for record in records for part in record["time_slices"]),
        "rounds": len(records),
        "first_call_s": statistics.median(record["first_call_s"] for record in records),
        "tokens_per_s": records[0]["tokens"] / latency.value,
        "tokens_per_s_low": records[0]["tokens"] / latency.high,
        "tokens_per_s_high": records[0]["tokens"] / latency.low,
    }


def _speedup(name: str, relative_to: str, history: History) -> dict[str, Any]:
    reference, control = Process(relative_to), Process(relative_to, is_control=True)
    if not history.is_active(relative_to):
        return {}
    noise = history.speedup(reference, control, ONE_SIGMA)
    row: dict[str, Any] = {"relative_to": relative_to, "noise_floor": None if noise is None else noise_floor(noise)}
    if name == relative_to:  # there is nothing to estimate
        return {**row, "speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0}
    speedup = history.speedup(reference, Process(name))
    if speedup is not None:
        row |= {"speedup": speedup.value, "speedup_low": speedup.low, "speedup_high": speedup.high, "p_value": speedup.p_value}
    return row


def _peaks_by_machine(descriptions: Iterable[Record]) -> dict[tuple[Any, ...], Peaks]:
    """The highest rates that any comparison measured on each machine."""
    measured: dict[tuple[Any, ...], list[Peaks]] = defaultdict(list)
    for description in descriptions:
        if description.get("peaks"):
            measured[_machine(description)].append(Peaks.from_record(description["peaks"]))
    return {machine: merge_peaks(*peaks) for machine, peaks in measured.items()}


def _machine(description: Record) -> tuple[Any, ...]:
    settings = description["settings"]
    return (settings.get(MACHINE), *(settings[key] for key in IDENTITY))


def _add_unmatched(rows: Iterable[dict[str, Any]]) -> None:
    """Adds to every row the costs in which the attentions of its comparison differ."""
    comparisons: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if "parameter_bytes" in row:
            comparisons[row["comparison"]].append(row)
    for candidates in comparisons.values():
        costs = {row["attention"]: row for row in candidates}
        differences = "; ".join(unmatched_costs(costs, candidates[0].get("relative_to") or ""))
        for row in candidates:
            row["unmatched"] = differences


def add_verdicts(rows: Iterable[dict[str, Any]]) -> None:
    """Adds a verdict to every row with a speed-up over another attention, corrected for the number of such rows."""
    compared = [row for row in rows if "p_value" in row]
    speedups = [Speedup(row["speedup"], row["speedup_low"], row["speedup_high"], row["p_value"]) for row in compared]
    floors = [math.inf if row["noise_floor"] is None else row["noise_floor"] for row in compared]
    for row, verdict in zip(compared, verdicts(speedups, floors), strict=True):
        row["verdict"] = verdict


# --- on the terminal ------------------------------------------------------------------------------


def render(results: pd.DataFrame) -> str:
    """Renders the table in 80 columns: attentions down, the swept setting across, a block for each metric.

    Rows that differ in further settings have blocks of their own, under a line that names the settings. If only one value of the
    swept setting was measured, the metrics stand side by side. Details of rows follow.
    """
    swept = swept_column(results)
    blocks = []
    for settings, rows in split(results, swept):
        head = ", ".join(setting_phrase(name, value) for name, value in settings.items())
        blocks += [*([wrap(f"--- {head} ---")] if head else []), *_blocks(rows, swept)]
    return "\n\n".join([*blocks, "±: half of the 95 % interval", *_details(results, swept)])


def _blocks(results: pd.DataFrame, swept: str) -> list[str]:
    """A block for each metric of rows that differ in the swept setting alone."""
    values, names = swept_values(results, swept), list(dict.fromkeys(results["attention"]))
    cells = rows_by_cell(results, swept)
    reference = next(iter(results["relative_to"].dropna()), "the reference")
    # Not every sweep has a reference, and few send anything.
    metrics = [
        metric
        for metric in TABLE_METRICS
        if metric not in (SPEEDUP, SENT) or (metric.column in results and results[metric.column].notna().any())
    ]

    def column(head: str, value: Any, metric: Metric) -> list[str]:
        return [head, *(format_value(cells.get((name, value)), metric) for name in names)]

    if len(values) == 1:
        return [align_columns(["", *names], [column(metric.heading, values[0], metric) for metric in metrics])]
    return [
        f"{wrap(metric.table_title(reference))}\n"
        + align_columns([swept, *names], [column(str(value), value, metric) for value in values])
        for metric in metrics
    ]


def _details(results: pd.DataFrame, swept: str) -> list[str]:
    """The details of rows, such as why one failed."""
    details = []
    for settings, rows in split(results, swept):
        where = "".join(f", {name}={value}" for name, value in settings.items())
        for _, row in rows[rows["detail"].fillna("").astype(bool)].iterrows():
            details.append(wrap(f"{row['attention']} at {swept}={row[swept]}{where}: {row['outcome']}, {row['detail']}"))
    return details
