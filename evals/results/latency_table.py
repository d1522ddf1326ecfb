"""From the ledger to results.csv and to the screen: every figure is computed here from raw samples, at read time."""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evals.benchmark.cost import differing
from evals.measure.machine import IDENTITY
from evals.results.formatting import QUANTITIES, Quantity, align_columns, format_value, wrap
from evals.results.frames import swept_column
from evals.results.history import History, Process
from evals.results.ledger import Record
from evals.results.schema import columns, conform, schema
from evals.stats.intervals import Speedup
from evals.stats.roofline import TOLERANCE, Peaks, Roofline, implausible_peak, impossible, merge_peaks, roofline
from evals.stats.verdicts import ONE_SIGMA, noise_floor, verdicts

SETTINGS = (
    *("workload", "scope", "device", "dtype", "threads", "batch_size", "seq_len"),
    *("hidden_dim", "num_heads", "ff_dim", "num_layers", "vocab_size", "processor", "torch"),
)
COLUMNS = columns("latency")


def build(records: Sequence[Record]) -> pd.DataFrame:
    """One row an attention and setting, from all of a ledger's records; of comparisons that say the same, the last counts."""
    described: dict[str, Record] = {}
    of: dict[str, list[Record]] = {}
    for record in records:
        if record.get("kind") == "comparison":
            described.pop(record["comparison"], None)  # so that the order is that of the last time
            described[record["comparison"]] = record
        elif "comparison" in record:
            of.setdefault(record["comparison"], []).append(record)
            if record["kind"] == "lost":  # perhaps before it could say what it is
                described.setdefault(record["comparison"], record["described"])

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    ceilings = _ceilings(described.values())
    for key, description in described.items():
        history = History(of.get(key, []), key)
        for name in description["candidates"]:
            if name in history.failures or history.medians(Process(name)) or history.lost:
                rows[name, json.dumps(description["settings"], sort_keys=True)] = _row(
                    description, name, history, ceilings.get(_machine(description))
                )
    add_verdicts(list(rows.values()))
    _name_unmatched(list(rows.values()))
    options = {option: None for description in described.values() for option in description["settings"] if option not in COLUMNS}
    return pd.DataFrame(list(rows.values()), columns=[*COLUMNS, *options])


def _row(description: Record, name: str, history: History, ceilings: Peaks | None) -> dict[str, Any]:
    trial: Record = history.preflights.get(name) or {"detail": ""}
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
        "detail": (failure or trial)["detail"] or history.lost,
        "stop_reason": "lost" if history.lost else history.stop_reason,
        **{column: trial[column] for column in COLUMNS if column in trial and column not in ("outcome", "detail")},
    }
    if failure is not None:
        return row
    speed, least = _speed(name, history), None
    if ceilings is not None:
        least = roofline(trial["flops"], trial["min_bytes"], ceilings)
        speed |= {"roofline_s": least.seconds, "bound": least.bound, "roofline_fraction": least.fraction(speed["latency_s"])}
    wrong = _impossible(name, history, least, TOLERANCE[description["settings"]["device"]])
    if wrong:  # a number that cannot be is no number
        return {**row, "outcome": "impossible", "detail": wrong, "peak_bytes": None, "process_peak_bytes": None}
    return row | speed | _speedup(name, description["relative_to"], history)


def _impossible(name: str, history: History, least: Roofline | None, tolerance: float) -> str | None:
    trial = history.preflights[name]
    if "peak_bytes" in trial and (words := implausible_peak(trial["peak_bytes"], trial["held_bytes"])):
        return words
    records = [history.record(Process(name), number) for number in history.medians(Process(name))]
    fastest = min(sample for record in records for turn in record["time_slices"] for sample in turn)
    return None if least is None else impossible(fastest, least, tolerance)


def _speed(name: str, history: History) -> dict[str, Any]:
    rounds = history.medians(Process(name))
    latency = history.latency(Process(name))
    records = [history.record(Process(name), number) for number in rounds]
    host_s = [record["host_s"] for record in records if "host_s" in record]
    return {
        "host_s": statistics.median(host_s) if host_s else None,
        "exposed_samples": sum(record.get("exposed_samples", 0) for record in records),
        "throttled": next((record["throttled"] for record in records if record.get("throttled")), ""),
        "latency_s": latency.value,
        "latency_low_s": latency.low,
        "latency_high_s": latency.high,
        "samples": sum(len(turn) for record in records for turn in record["time_slices"]),
        "rounds": len(rounds),
        "first_call_s": statistics.median(record["first_call_s"] for record in records),
        "tokens_per_s": records[0]["tokens"] / latency.value,
        "tokens_per_s_low": records[0]["tokens"] / latency.high,
        "tokens_per_s_high": records[0]["tokens"] / latency.low,
    }


def _speedup(name: str, relative_to: str, history: History) -> dict[str, Any]:
    reference, twin = Process(relative_to), Process(relative_to, is_control=True)
    if not history.is_active(relative_to):
        return {}
    itself = history.speedup(reference, twin, ONE_SIGMA)
    row: dict[str, Any] = {"relative_to": relative_to, "noise_floor": None if itself is None else noise_floor(itself)}
    if name == relative_to:  # there is nothing to estimate
        return {**row, "speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0}
    speedup = history.speedup(reference, Process(name))
    if speedup is not None:
        row |= {"speedup": speedup.value, "speedup_low": speedup.low, "speedup_high": speedup.high, "p_value": speedup.p_value}
    return row


def _ceilings(descriptions: Iterable[Record]) -> dict[tuple[Any, ...], Peaks]:
    """By machine, the highest rates of any comparison: the more often it was measured, the surer they are."""
    measured: dict[tuple[Any, ...], list[Peaks]] = {}
    for description in descriptions:
        if description.get("peaks"):
            measured.setdefault(_machine(description), []).append(Peaks.from_record(description["peaks"]))
    return {key: merge_peaks(*found) for key, found in measured.items()}


def _machine(description: Record) -> tuple[Any, ...]:
    return tuple(description["settings"][key] for key in IDENTITY)


def _name_unmatched(rows: list[dict[str, Any]]) -> None:
    """Tells every row in what the attentions of its comparison differ by more than 1 %."""
    compared: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "parameter_bytes" in row:
            compared.setdefault(row["comparison"], []).append(row)
    for candidates in compared.values():
        words = "; ".join(differing({row["attention"]: row for row in candidates}, candidates[0].get("relative_to") or ""))
        for row in candidates:
            row["unmatched"] = words


def add_verdicts(rows: list[dict[str, Any]]) -> None:
    """Gives every row with a speed-up over another attention its verdict, corrected for how many they are."""
    judged = [row for row in rows if "p_value" in row]
    speedups = [Speedup(row["speedup"], row["speedup_low"], row["speedup_high"], row["p_value"]) for row in judged]
    floors = [math.inf if row["noise_floor"] is None else row["noise_floor"] for row in judged]
    for row, verdict in zip(judged, verdicts(speedups, floors), strict=True):
        row["verdict"] = verdict


def write(table: pd.DataFrame, folder: Path, kind: str) -> Path:
    """The table as CSV and as Parquet, each in place of what was there only once it is whole; returns the first.

    kind: the schema that it is of, which says how the files are named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, table = schema(kind)["file"], conform(table, kind)
    formats: dict[str, Callable[[Path], object]] = {
        "csv": lambda path: table.to_csv(path, index=False),
        "parquet": lambda path: table.to_parquet(path, index=False),
    }
    for suffix, save in formats.items():
        unfinished = folder / f".{name}.{suffix}.{os.getpid()}"
        try:
            save(unfinished)
            unfinished.replace(folder / f"{name}.{suffix}")
        finally:
            unfinished.unlink(missing_ok=True)
    return folder / f"{name}.csv"


# --- on the screen ------------------------------------------------------------------------------


def render(results: pd.DataFrame) -> str:
    """One sweep as text of at most 80 columns: attentions down, and across the swept setting, one table a quantity."""
    swept = swept_column(results)
    places = sorted(results[swept].unique())
    names = list(dict.fromkeys(results["attention"]))
    cells = {(row["attention"], row[swept]): row for _, row in results.iterrows()}
    reference = next(iter(results["relative_to"].dropna()), None)
    # Not every sweep has a reference, and few send anything.
    missing = {"speedup", "sent_bytes"} - {column for column in results if results[column].notna().any()}
    quantities = [quantity for quantity in QUANTITIES if quantity.column not in missing]

    def column(head: str, place: Any, quantity: Quantity) -> list[str]:
        return [head, *(format_value(cells.get((name, place)), quantity) for name in names)]

    if len(places) == 1:
        blocks = [align_columns(["", *names], [column(quantity.name, places[0], quantity) for quantity in quantities])]
    else:
        blocks = [
            f"{wrap(quantity.title.format(reference=reference))}\n"
            + align_columns([swept, *names], [column(str(place), place, quantity) for place in places])
            for quantity in quantities
        ]
    blocks.append("±: half of the 95 % interval")
    for (name, place), row in cells.items():
        if row["detail"]:
            blocks.append(wrap(f"{name} at {swept}={place}: {row['outcome']}, {row['detail']}"))
    return "\n\n".join(blocks)
