"""`python -m evals.tables results/<sweep> …`: the tables of a folder made again from its samples, without measuring anything.

Every figure is computed from raw samples: where the code that does it has changed, or the schema of a table, so have the tables.
Exit code: 0, or 2 for what cannot be read, in one sentence on standard error.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from evals.benchmark import max_context
from evals.conversion import study
from evals.errors import UsageError
from evals.results import accuracy_table, latency_table
from evals.results.ledger import Ledger, Record
from evals.results.scaling_table import build


def made(records: Sequence[Record]) -> dict[str, pd.DataFrame]:
    """Every table that a ledger gives, by the name of its schema."""
    kinds = {record.get("kind") for record in records}
    if "conversion" in kinds:
        return study.tables(records)
    if "study" in kinds:
        return {"accuracy": accuracy_table.build(records), "curves": accuracy_table.build_curves(records)}
    if "search" in kinds:
        return {"max_context": max_context.results(records)}
    measured = latency_table.build(records)
    return {"latency": measured, **build(measured, records)} if len(measured) else {}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.tables", description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="folders with a samples.jsonl, such as results/seq_len")
    options = parser.parse_args(arguments)
    try:
        for folder in options.results:
            tables = made(Ledger(folder / "samples.jsonl").intact())
            if not tables:
                raise UsageError(
                    f"{folder} holds no samples.jsonl of a sweep: give a folder that evals.run wrote, such as results/seq_len"
                )
            for kind, rows in tables.items():
                print(f"{latency_table.write(rows, folder, kind)}: {len(rows)} rows")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
