"""`python -m evals.tables results/<sweep> …`: makes the tables of a folder again from its raw samples, without measuring.

    python -m evals.tables results/seq_len                      after the code that computes tables, or their schema, has changed
    python -m evals.tables --check results/my-machine-8-cores   before results are committed; checks all folders below

`--check` changes nothing. It computes every table again, and prints a sentence for each row that does not follow its schema or its
samples, is impossible, or lacks a certificate, and for each folder without its command, machine and commit.
Exit code: 0; 1 if --check finds something; 2 with one sentence on standard error if a folder cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.cli.command import command
from evals.cli.outputs import build_tables
from evals.cli.result_checks import findings, folders_below
from evals.errors import OK, UsageError
from evals.results.ledger import Ledger
from evals.results.schema import write_table

FOUND = 1


@command(ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m evals.tables", description=__doc__, formatter_class=raw)
    parser.add_argument("results", nargs="*", type=Path, help="folders with a samples.jsonl, such as results/seq_len")
    parser.add_argument("--check", action="store_true", help="check these folders and all below (default: results)")
    options = parser.parse_args(arguments)
    if options.check:
        return _check(options.results or [Path("results")])
    if not options.results:
        raise UsageError("give a folder that evals.run wrote, such as results/seq_len")
    for folder in options.results:
        tables = build_tables(Ledger(folder / "samples.jsonl").intact())
        if not tables:
            raise UsageError(
                f"{folder} holds no samples.jsonl with a result: give a folder that evals.run wrote, such as results/seq_len"
            )
        for kind, rows in tables.items():
            print(f"{write_table(rows, folder, kind)}: {len(rows)} rows")
    return OK


def _check(roots: Sequence[Path]) -> int:
    folders = [folder for root in roots for folder in folders_below(root)]
    if not folders:
        raise UsageError(f"{', '.join(map(str, roots))} holds no results: give a folder that evals.run wrote, or one above such")
    count = 0
    for finding in findings(folders):
        count += 1
        print(finding, flush=True)
    print(f"{len(folders)} folder{'s' * (len(folders) > 1)} checked: {count or 'no'} finding{'s' * (count != 1)}")
    return FOUND if count else OK


if __name__ == "__main__":
    sys.exit(main())
