"""`python -m evals.claim "bsbr 2x faster than standard at seq_len 4096"`: supported, refuted or undecided, with the evidence.

    <a> [<factor>x|<percent>%] faster|slower than <b>
    <a> uses [<factor>x|<percent>%] less|more memory than <b>
    <a> scales as n^<p> [in latency|memory]
    <a> overtakes <b> before|after seq_len <n>

each with, at its end, [at <setting> <value> [and <setting> <value> ...]]; without, it must hold at every measured setting.
Exit code: 0 supported, 1 refuted, 3 undecided, 2 for what cannot be read or was not measured, in one sentence.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.errors import UsageError
from evals.results.claims import CODES, EXAMPLE, GLOBS, decide, parse


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.claim", description=str(__doc__).partition("\n")[0])
    parser.add_argument("claim", help=f"such as {EXAMPLE!r}")
    parser.add_argument(
        "results", nargs="*", type=Path, help="folders with a results.csv (default: results/*, else results/paper/*)"
    )
    options = parser.parse_args(arguments)
    try:
        claim = parse(options.claim)
        choices = [options.results] if options.results else [sorted(p.parent for p in Path("results").glob(g)) for g in GLOBS]
        for index, folders in enumerate(choices):
            try:
                verdict, why = decide(claim, folders)
                break
            except UsageError:
                if index == len(choices) - 1:
                    raise
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(why)
    return CODES[verdict]


if __name__ == "__main__":
    sys.exit(main())
