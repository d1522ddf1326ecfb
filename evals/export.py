"""`python -m evals.export results/<sweep> … --to markdown|latex`: tables of results, for a README or a paper.

A folder that holds no results.csv stands for all below it that do. A cell that gave no number says what happened instead, and
a footnote why. Exit code: 0, or 2 for what cannot be read, in one sentence on standard error.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.cli.command import command
from evals.errors import OK
from evals.results.export import FORMATS, exported


@command(ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.export", description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="folders with a results.csv, such as results/seq_len, or above such")
    parser.add_argument("--to", choices=FORMATS, default="markdown", help="default: markdown")
    options = parser.parse_args(arguments)
    print(exported(options.results, options.to))
    return OK


if __name__ == "__main__":
    sys.exit(main())
