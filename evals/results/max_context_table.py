"""The table of longest contexts: one row per attention and search, with the longest length that fits and the next that does not."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from evals.results.formatting import align_columns, wrap
from evals.results.ledger import Record
from evals.results.schema import columns, one_type
from evals.results.settings import group_by, setting_columns, setting_phrase, varying, without_machine_settings

COLUMNS = columns("max_context")


def build(records: Sequence[Record]) -> pd.DataFrame:
    """Builds the table from all records of a ledger.

    The outcome of a row is ok if a length fits, otherwise the outcome of the shortest length that was tried. An unfinished
    search has a row with the lengths so far. Of searches with the same settings and limit the last one counts.
    """
    searches = {record["search"]: record for record in records if record.get("kind") == "search"}
    probes = [record for record in records if record.get("kind") == "probe"]
    lost = {record["search"]: record for record in records if record.get("kind") == "lost" and "search" in record}
    searches |= {key: record["described"] for key, record in lost.items() if key not in searches}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for key, search in searches.items():
        for name in search["candidates"]:
            tried = [record for record in probes if (record["search"], record["attention"]) == (key, name)]
            if not tried and key in lost:
                tried = [{"seq_len": 0, "outcome": "lost", "detail": lost[key]["detail"]}]
            if tried:
                row = {"sweep": search["sweep"], "attention": name, "limit_bytes": search["limit_bytes"]}
                cell = name, json.dumps([search["limit_bytes"], search["settings"]], sort_keys=True)
                rows.pop(cell, None)
                rows[cell] = row | search["settings"] | _result(tried)
    options = {column: None for row in rows.values() for column in row if column not in COLUMNS}
    return one_type(pd.DataFrame(list(rows.values()), columns=[*COLUMNS, *options]), "max_context")


def _result(probes: Sequence[Record]) -> dict[str, Any]:
    """Columns of the longest length that fits and of the shortest that does not."""
    by_length = sorted(probes, key=lambda probe: int(probe["seq_len"]))
    fitting = next((probe for probe in reversed(by_length) if probe["outcome"] == "ok"), None)
    failing = next((probe for probe in by_length if probe["outcome"] != "ok"), None)
    row: dict[str, Any] = {"outcome": "ok" if fitting else failing["outcome"] if failing else "ok", "detail": ""}
    if fitting:
        row |= {"max_context": fitting["seq_len"], "peak_bytes": fitting["peak_bytes"]}
    if failing:
        row["detail"] = failing["detail"]
        if failing["seq_len"]:  # 0: a failure before any length was tried
            row |= {"next_seq_len": failing["seq_len"], "next_outcome": failing["outcome"]}
    return row


def render(table: pd.DataFrame) -> str:
    """Writes the table as text, the attention with the longest context first; further settings have blocks of their own."""
    groups = split_searches(table)
    return "\n\n".join(_block(rows, ", ".join(setting_phrase(*setting) for setting in group.items())) for group, rows in groups)


def split_searches(table: pd.DataFrame) -> "Iterator[tuple[dict[str, Any], pd.DataFrame]]":
    """Splits a table into groups of rows that differ in the attention alone, each with its other settings."""
    names = without_machine_settings(table, varying(table, setting_columns(table, "max_context")))
    for values, rows in group_by(table, names, sort=False):
        yield dict(zip(names, values, strict=True)), rows


def _block(table: pd.DataFrame, head: str) -> str:
    ordered = table.sort_values("max_context", ascending=False)
    tokens = [f"{length:.0f}" if length > 0 else "none" for length in ordered["max_context"]]
    peaks = [f"{peak / 2**20:.1f}" if peak > 0 else "" for peak in ordered["peak_bytes"]]
    text = align_columns(["longest context", *ordered["attention"]], [["tokens", *tokens], ["peak MiB", *peaks]])
    reasons = [
        wrap(f"{row['attention']} at the next length: {row['detail']}")
        for _, row in ordered.fillna({"detail": ""}).iterrows()
        if row["detail"]
    ]
    return "\n\n".join([*([wrap(f"--- {head} ---")] if head else []), text, *(["\n".join(reasons)] if reasons else [])])
