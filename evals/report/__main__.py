"""`python -m evals.report results/<sweep> …`: one HTML file; of several folders, one that shows what changed.

A report of one folder is written to report.html in it; of several, to the file that --to names. Exit code: 0, or 2 for what
cannot be read, in one sentence on standard error.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.errors import UsageError
from evals.report import write


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.report", description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "results", nargs="+", type=Path, help="folders that evals.run wrote; the first is what others are compared with"
    )
    parser.add_argument("--to", type=Path, help="the file (default: report.html in the folder; of several, ./report.html)")
    options = parser.parse_args(arguments)
    path = options.to or (options.results[0] if len(options.results) == 1 else Path()) / "report.html"
    try:
        write(options.results, path)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or path} cannot be used: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
