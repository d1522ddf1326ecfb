"""`python -m evals.claim "bsbr 2x faster than standard at seq_len 4096"`: decides a claim and prints the evidence.

    <a> [<factor>x|<percent>%] faster|slower than <b>
    <a> uses [<factor>x|<percent>%] less|more memory than <b>
    <a> scales as n^<p> [in latency|memory]
    <a> overtakes <b> before|after seq_len <n>

A claim may end in `at <setting> <value> [and <setting> <value> ...]`. Without that it must hold at every measured setting.
Exit code: 0 supported, 1 refuted, 3 undecided; 2 with one sentence if the claim cannot be read or was not measured.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.cli.command import command
from evals.errors import UsageError
from evals.results.claim_grammar import EXAMPLE, GRAMMAR, parse
from evals.results.claims import decide
from evals.results.schema import kind_of

EXIT_CODES = {"supported": 0, "refuted": 1, "undecided": 3}
DEFAULT_FOLDERS = ("*/results.csv", "paper/*/results.csv")
"""Patterns below results/, in the order of search: the user's sweeps, then those of the study."""


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.claim",
        description=str(__doc__).partition("\n")[0],
        epilog="\n  ".join(["a claim reads", *GRAMMAR]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("claim", help=f"such as {EXAMPLE!r}")
    parser.add_argument(
        "results", nargs="*", type=Path, help="folders with a results.csv (default: results/*, else results/paper/*)"
    )
    options = parser.parse_args(arguments)
    claim = parse(options.claim)
    tables = [sorted(Path("results").glob(pattern)) for pattern in DEFAULT_FOLDERS]
    default = [[path.parent for path in paths if kind_of(path) == "latency"] for paths in tables]
    first, *rest = [options.results] if options.results else default
    try:
        decision = decide(claim, first)
    except UsageError:
        if not rest:
            raise
        decision = decide(claim, rest[0])
    print(decision.text)
    return EXIT_CODES[decision.verdict]


if __name__ == "__main__":
    sys.exit(main())
