"""The cells of a result folder: each attention under each setting, with its rounds from the ledger."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evals.errors import UsageError, one_sentence
from evals.results import schema
from evals.results.folder_kinds import check_folder
from evals.results.ledger import Ledger, Record

MACHINE = ("processor", "torch")
"""Settings that identify the machine of a cell. They do not count when cells are matched."""


@dataclass(frozen=True)
class Cell:
    """One attention under one setting in one result folder."""

    attention: str
    settings: dict[str, Any]  # without those in MACHINE
    origin: dict[str, str]  # folder, commit, host, processor and torch
    options: dict[str, Any]  # the node of the attention's config
    outcome: str
    detail: str
    noise_floor: float  # of its comparison; NaN if the reference was not measured against itself
    peak_bytes: float
    rounds: dict[int, float]  # the logarithm of each round's median latency in seconds
    times: dict[int, float]  # when each round was measured, in seconds since 1970


def read_cells(folder: Path) -> list[Cell]:
    """Reads all cells of a folder that evals.run wrote.

    Raises:
        UsageError: if the folder holds no result, or its files are corrupt.
    """
    check_folder(folder, "compare")
    if not (folder / "samples.jsonl").is_file():
        raise UsageError(f"{folder} holds no samples.jsonl; give a folder that evals.run wrote, such as results/seq_len")
    records = Ledger(folder / "samples.jsonl").intact()
    timed: dict[tuple[str, str], list[Record]] = {}
    try:
        described = {record["comparison"]: record for record in records if record.get("kind") == "comparison"}
        for record in records:
            if record.get("kind") == "latency" and record["outcome"] == "ok" and not record.get("is_control"):
                timed.setdefault((record["comparison"], record["attention"]), []).append(record)
        rows = schema.read(folder / "results.csv")
        # The noise floor of a comparison may stand in the row of the reference alone.
        floors: dict[Any, float] = rows.groupby("comparison")["noise_floor"].max().to_dict() if "noise_floor" in rows else {}
        cells = [
            _cell(folder, row, described[row["comparison"]], timed.get((row["comparison"], row["attention"]), []), floors)
            for _, row in rows.iterrows()
        ]
    except KeyError as error:
        raise UsageError(f"{folder} is corrupt: its results.csv or samples.jsonl lacks {error}") from error
    except schema.SchemaVersionError as error:
        raise UsageError(str(error)) from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{folder} is corrupt: {one_sentence(error)}") from error
    if not cells:
        raise UsageError(f"{folder} holds no results: its results.csv has no row")
    return cells


def _cell(folder: Path, row: "pd.Series[Any]", description: Record, latencies: Sequence[Record], floors: dict[Any, float]) -> Cell:
    timed = row["outcome"] == "ok" and not math.isnan(row["latency_s"])
    if timed and not latencies:
        raise ValueError(f"results.csv has a latency of {row['attention']}, but samples.jsonl no sample of {row['comparison']}")
    provenance = description.get("provenance", {})
    commit = f"{provenance.get('commit') or 'no commit'}"[:12] + (" with changes" if provenance.get("dirty") else "")
    settings = description["settings"]
    origin = {"folder": folder, "commit": commit, "host": provenance.get("host"), **{name: settings[name] for name in MACHINE}}
    return Cell(
        attention=row["attention"],
        settings={name: value for name, value in settings.items() if name not in MACHINE},
        origin={name: str(value) for name, value in origin.items()},
        options=description["candidates"][row["attention"]],
        outcome=row["outcome"],
        detail=str(row["detail"]) if isinstance(row["detail"], str) else "",
        noise_floor=floors.get(row["comparison"], math.nan),
        peak_bytes=float(row["peak_bytes"]),
        rounds={record["round"]: _log_median(record) for record in latencies if timed},
        times={record["round"]: datetime.fromisoformat(record["time"]).timestamp() for record in latencies if timed},
    )


def _log_median(record: Record) -> float:
    slices = record["time_slices"] if "time_slices" in record else [record["samples_s"]]
    samples = np.concatenate([np.asarray(part, dtype=np.float64) for part in slices])
    if not samples.size or not np.all(np.isfinite(samples) & (samples > 0)):
        raise ValueError(
            f"round {record['round']} of {record['attention']} must hold latencies above 0, got {samples.tolist()[:3]}"
        )
    return math.log(float(np.median(samples)))
