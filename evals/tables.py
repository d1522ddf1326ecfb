"""`python -m evals.tables results/<sweep> …`: makes the tables of a folder again from its raw samples, without measuring.

Use it after the code that computes the tables, or their schema, has changed.
Exit code: 0, or 2 with one sentence on standard error if a folder cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.cli.command import command
from evals.cli.outputs import build_tables
from evals.errors import OK, UsageError
from evals.results.ledger import Ledger
from evals.results.schema import write_table


@command(ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.tables", description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="folders with a samples.jsonl, such as results/seq_len")
    options = parser.parse_args(arguments)
    for folder in options.results:
        tables = build_tables(Ledger(folder / "samples.jsonl").intact())
        if not tables:
            raise UsageError(
                f"{folder} holds no samples.jsonl with a result: give a folder that evals.run wrote, such as results/seq_len"
            )
        for kind, rows in tables.items():
            print(f"{write_table(rows, folder, kind)}: {len(rows)} rows")
    return OK


if __name__ == "__main__":
    sys.exit(main())
