"""`python -m evals.compare A B`: compares two folders of results, and prints what became significantly faster or slower.

    python -m evals.compare results/before results/after           two commits, or two machines
    python -m evals.compare --base main sweep=seq_len              another commit of this repository, interleaved with this one

`--base REV` takes the arguments of `python -m evals.run`. A relative path in them, as in --config-dir, is looked up in either tree.
`--markdown` prints a table for a pull request; docs/user-guide/guard.md says how to run it on each one.
Exit code: 0; 1 if something got worse: slower with significance and by more than the threshold, more memory than the
threshold allows, or a failure in place of a number; 2 with one sentence if the two cannot be compared.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from evals.benchmark.interleave import measure
from evals.cli.command import command
from evals.errors import OK, UsageError
from evals.results.cells import read_cells
from evals.results.compare import compare_cells
from evals.results.compare_table import regressions, render, render_markdown
from evals.results.formatting import WIDTH, parse_fraction

REGRESSION = 1
INTERRUPTED = "interrupted; rounds that both sides completed can be compared where they stand"


@command(argparse.ArgumentError, interrupted=INTERRUPTED)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--base", metavar="REV", help="measure this commit, and then the working tree as B")
    parser.add_argument("--rounds", type=int, default=10, help="with --base: rounds of each (default: 10)")
    parser.add_argument("--threshold", default="5%", help="what may get worse without exit code 1 (default: 5%%)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown, for a pull request")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    options, rest = parser.parse_known_args(arguments)
    threshold = parse_fraction(options.threshold, "--threshold")
    if options.base is None and (len(rest) != 2 or any(word.startswith("-") for word in rest)):
        raise UsageError(f"two folders of results are compared, got {' '.join(rest) or 'none'}; or give --base REV")
    folders = map(Path, rest) if options.base is None else measure(options.base, rest, options.rounds)
    a, b = (read_cells(folder) for folder in folders)
    rows = compare_cells(a, b)
    if options.csv:
        rows.to_csv(options.csv, index=False)
    worse = regressions(rows, threshold)
    if options.markdown:
        print(render_markdown(a, b, rows, threshold))
        return REGRESSION if worse else OK
    print(render(a, b, rows))
    for line in worse:
        print(textwrap.fill(f"regression: {line}", WIDTH, subsequent_indent="   "))
    return REGRESSION if worse else OK


if __name__ == "__main__":
    sys.exit(main())
