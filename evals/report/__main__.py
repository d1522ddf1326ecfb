"""`python -m evals.report results/<sweep> …`: writes one HTML report; of several folders, with what changed between them.

The report of one folder goes to report.html in it; of several, to ./report.html, or to the file that --to names.
Exit code: 0, or 2 with one sentence on standard error if a folder cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.cli.command import command
from evals.errors import OK
from evals.report import write


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.report", description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="folders of evals.run; the others are compared with the first")
    parser.add_argument("--to", type=Path, help="the file (default: report.html in the folder; of several, ./report.html)")
    options = parser.parse_args(arguments)
    path = options.to or (options.results[0] if len(options.results) == 1 else Path()) / "report.html"
    write(options.results, path)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return OK


if __name__ == "__main__":
    sys.exit(main())
