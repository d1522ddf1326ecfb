"""`python -m evals.validate aa slowdown clock kills`: tests the instrument itself on this machine.

    aa        compares attentions with themselves: counts intervals that hold 1, and verdicts of faster or slower
    slowdown  makes one of two equal attentions slower on purpose: counts how often it is called slower
    clock     compares latencies with torch.utils.benchmark
    kills     kills a sweep at random moments and restarts it: looks for lost and duplicate records
    guard     compares this commit with itself by evals.compare --base: counts false alarms

Exit code 1 if any of them fails.
"""

import argparse
import sys

from evals.cli.command import command
from evals.cli.self_test import SELF_TESTS
from evals.errors import OK


@command()
def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m evals.validate", description=__doc__, formatter_class=raw)
    parser.add_argument("checks", nargs="+", choices=tuple(SELF_TESTS))
    defaults = ", ".join(f"{test.default_count} for {name}" for name, test in SELF_TESTS.items() if test.default_count > 1)
    parser.add_argument("--count", type=int, help=f"of comparisons, kills or runs (default: {defaults})")
    parser.add_argument("--first", type=int, default=0, help="number of the first comparison, to run a part of them at a time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, such as device.threads=1")
    options = parser.parse_args(arguments)
    passed = [SELF_TESTS[name].run(options.first, options.count, options.set) for name in options.checks]
    return OK if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
