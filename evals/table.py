"""From the ledger to results.csv and to the screen: every figure is computed here from raw samples, at read time."""

import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evals.figures import swept_column
from evals.ledger import Record
from evals.statistics import median_interval, speedup_interval

SETTINGS = (
    *("workload", "scope", "device", "dtype", "threads", "batch_size", "seq_len"),
    *("hidden_dim", "num_heads", "ff_dim", "num_layers", "vocab_size", "processor", "torch"),
)
COLUMNS = (
    *("sweep", "swept", "attention", "outcome", "detail", *SETTINGS),
    *("latency_s", "latency_low_s", "latency_high_s", "samples", "rounds", "first_call_s"),
    *("tokens_per_s", "tokens_per_s_low", "tokens_per_s_high", "relative_to", "speedup", "speedup_low", "speedup_high"),
    *("peak_bytes", "parameter_bytes", "state_bytes", "flops", "comparison"),
)

Rounds = dict[int, list[float]]


def results(records: Sequence[Record]) -> pd.DataFrame:
    """One row an attention and setting, from all of a ledger's records; of comparisons that say the same, the last counts."""
    described: dict[str, Record] = {}
    for record in records:
        if record.get("kind") == "comparison":
            described.pop(record["comparison"], None)  # so that the order is that of the last time
            described[record["comparison"]] = record
    measured: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if "round" in record:
            measured.setdefault((record["comparison"], record["attention"]), []).append(record)

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for key, description in described.items():
        reference = timings(measured.get((key, description["relative_to"]), []))
        for name in description["contestants"]:
            if (key, name) in measured:
                row = _row(description, name, measured[key, name], reference)
                rows[name, json.dumps(description["settings"], sort_keys=True)] = row
    options = {option: None for description in described.values() for option in description["settings"] if option not in COLUMNS}
    return pd.DataFrame(list(rows.values()), columns=[*COLUMNS, *options])


def timings(records: Sequence[Record]) -> Rounds:
    """The samples of each round that has any."""
    return {record["round"]: record["samples_s"] for record in records if "samples_s" in record}


def _row(description: Record, name: str, records: Sequence[Record], reference: Rounds) -> dict[str, Any]:
    latencies = [record for record in records if record["kind"] == "latency"]
    failure = next((record for record in latencies if record["outcome"] != "ok"), None)
    row = {
        "sweep": description["sweep"],
        "swept": description["swept"],
        "comparison": description["comparison"],
        "attention": name,
        **description["settings"],
        "relative_to": description["relative_to"] if reference else None,
        "outcome": "ok" if failure is None else failure["outcome"],
        "detail": "" if failure is None else failure["detail"],
    }
    for record in records:
        row |= {column: record[column] for column in ("parameter_bytes", "state_bytes", "flops", "peak_bytes") if column in record}
        if record["kind"] == "memory" and record["outcome"] != "ok" and failure is None:
            row["detail"] = f"peak memory is unknown ({record['outcome']}): {record['detail']}"
    if failure is None and latencies:
        row |= _speed(timings(latencies), reference, latencies[0])
    return row


def _speed(rounds: Rounds, reference: Rounds, first: Record) -> dict[str, Any]:
    # The same ledger gives the same table: the bootstrap's randomness is fixed.
    latency = median_interval(list(rounds.values()), generator=np.random.default_rng(0))
    speed = {
        "latency_s": latency.value,
        "latency_low_s": latency.low,
        "latency_high_s": latency.high,
        "samples": sum(map(len, rounds.values())),
        "rounds": len(rounds),
        "first_call_s": first["first_call_s"],
        "tokens_per_s": first["tokens"] / latency.value,
        "tokens_per_s_low": first["tokens"] / latency.high,
        "tokens_per_s_high": first["tokens"] / latency.low,
    }
    both = sorted(rounds.keys() & reference.keys())
    if rounds == reference:  # itself: there is nothing to estimate
        speed |= {"speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0}
    elif both:
        pairs = [reference[number] for number in both], [rounds[number] for number in both]
        speedup = speedup_interval(*pairs, generator=np.random.default_rng(0))
        speed |= {"speedup": speedup.value, "speedup_low": speedup.low, "speedup_high": speedup.high}
    return speed


def write(table: pd.DataFrame, path: Path) -> None:
    """The table as CSV, in place of what was there only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        table.to_csv(unfinished, index=False)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


# --- on the screen ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """One quantity on the screen: its column, what it is divided by to get to its unit, and its interval's columns."""

    name: str
    title: str
    column: str
    unit: float = 1.0
    bounds: tuple[str, str] | None = None


QUANTITIES = (
    Quantity("ms", "latency in ms, lower is better", "latency_s", 1e-3, ("latency_low_s", "latency_high_s")),
    Quantity("speed-up", "speed-up over {reference}, higher is better", "speedup", 1.0, ("speedup_low", "speedup_high")),
    Quantity("peak MiB", "peak memory in MiB above inputs and parameters, lower is better", "peak_bytes", 2.0**20),
)
WIDTH = 80


def shown(results: pd.DataFrame) -> str:
    """One sweep as text of at most 80 columns: attentions down, and across the swept setting, one table a quantity."""
    swept = swept_column(results)
    places = sorted(results[swept].unique())
    names = list(dict.fromkeys(results["attention"]))
    cells = {(row["attention"], row[swept]): row for _, row in results.iterrows()}
    reference = next(iter(results["relative_to"].dropna()), None)
    quantities = [quantity for quantity in QUANTITIES if quantity.column != "speedup" or reference is not None]

    def column(head: str, place: Any, quantity: Quantity) -> list[str]:
        return [head, *(_cell(cells.get((name, place)), quantity) for name in names)]

    if len(places) == 1:
        blocks = [aligned(["", *names], [column(quantity.name, places[0], quantity) for quantity in quantities])]
    else:
        blocks = [
            f"{quantity.title.format(reference=reference)}\n"
            + aligned([swept, *names], [column(str(place), place, quantity) for place in places])
            for quantity in quantities
        ]
    blocks.append("±: half of the 95 % interval")
    for (name, place), row in cells.items():
        if row["detail"]:
            failure = f"{name} at {swept}={place}: {row['outcome']}, {row['detail']}"
            blocks.append(textwrap.fill(failure, WIDTH, subsequent_indent="  "))
    return "\n\n".join(blocks)


def _cell(row: pd.Series | None, quantity: Quantity) -> str:
    if row is None:
        return ""
    if row["outcome"] != "ok":
        return str(row["outcome"])
    value = row[quantity.column] / quantity.unit
    if math.isnan(value):
        return "?"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    text = f"{value:.{digits}f}" if value >= 0.1 else f"{value:.2g}"
    if quantity.bounds is None:
        return text
    low, high = (row[bound] for bound in quantity.bounds)
    percent = 50 * (high - low) / row[quantity.column]
    return f"{text}±{'>99' if percent > 99 else f'{percent:.0f}'}%" if high > low else text


def aligned(heads: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
    """Columns of right-aligned text beside their heads, as many in a block as 80 characters hold."""
    left = max(map(len, heads))
    blocks: list[list[str]] = []
    for column in columns:
        width = max(map(len, column)) + 1
        if not blocks or len(blocks[-1][0]) + width > WIDTH:
            blocks.append([f"{head:<{left}}" for head in heads])
        blocks[-1] = [line + f"{text:>{width}}" for line, text in zip(blocks[-1], column, strict=True)]
    return "\n\n".join("\n".join(block) for block in blocks)
