"""The table of longest contexts: one row per attention and search, with the longest length that fits and the next that does not."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from evals.results.formatting import align_columns, wrap
from evals.results.ledger import Record
from evals.results.schema import columns

COLUMNS = columns("max_context")


def build(records: Sequence[Record]) -> pd.DataFrame:
    """Builds the table from all records of a ledger.

    The outcome of a row is ok if a length fits, otherwise the outcome of the shortest length that was tried. An unfinished
    search has a row with the lengths so far.
    """
    searches = {record["search"]: record for record in records if record.get("kind") == "search"}
    probes = [record for record in records if record.get("kind") == "probe"]
    lost = {record["search"]: record for record in records if record.get("kind") == "lost" and "search" in record}
    searches |= {key: record["described"] for key, record in lost.items() if key not in searches}
    rows: list[dict[str, Any]] = []
    for key, search in searches.items():
        for name in search["candidates"]:
            tried = [record for record in probes if (record["search"], record["attention"]) == (key, name)]
            if not tried and key in lost:
                tried = [{"seq_len": 0, "outcome": "lost", "detail": lost[key]["detail"]}]
            if tried:
                row = {"sweep": search["sweep"], "attention": name, "limit_bytes": search["limit_bytes"]}
                rows.append(row | search["settings"] | _result(tried))
    options = {column: None for row in rows for column in row if column not in COLUMNS}
    return pd.DataFrame(rows, columns=[*COLUMNS, *options])


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
    """Writes the table as text, the attention with the longest context first."""
    ordered = table.sort_values("max_context", ascending=False)
    tokens = [f"{length:.0f}" if length > 0 else "none" for length in ordered["max_context"]]
    peaks = [f"{peak / 2**20:.1f}" if peak > 0 else "" for peak in ordered["peak_bytes"]]
    text = align_columns(["longest context", *ordered["attention"]], [["tokens", *tokens], ["peak MiB", *peaks]])
    reasons = [wrap(f"{row['attention']} at the next length: {row['detail']}") for _, row in ordered.iterrows() if row["detail"]]
    return "\n\n".join([text, *(["\n".join(reasons)] if reasons else [])])
