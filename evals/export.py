"""`python -m evals.export results/<sweep> … --to markdown|latex`: prints tables of results for a README or a paper.

A folder without a results.csv stands for all folders below it that have one. The cell of a failed row holds the outcome, and
a footnote gives the reason.
Exit code: 0, or 2 with one sentence on standard error if a folder cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.cli.command import command
from evals.errors import OK
from evals.results.export import export
from evals.results.markup import FORMATS


@command(ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.export", description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="folders with a results.csv, such as results/seq_len, or above such")
    parser.add_argument("--to", choices=FORMATS, default="markdown", help="default: markdown")
    options = parser.parse_args(arguments)
    print(export(options.results, options.to))
    return OK


if __name__ == "__main__":
    sys.exit(main())
