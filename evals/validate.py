"""`python -m evals.validate aa slowdown clock`: is the instrument right, on this machine, today?

    aa        compares attentions with themselves: how often does an interval hold 1, how often is anything called faster or slower
    slowdown  makes one of two equal attentions slower on purpose: how often is it found
    clock     holds latencies against torch.utils.benchmark
    kills     kills a sweep at random moments and starts it again: is anything lost, or there twice

Exit code 1 if one of them finds less than it should.
"""

import argparse
import sys
from collections.abc import Callable

from evals.cli.self_test import aa, clock_agrees, kills, slowdown
from evals.errors import UsageError


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m evals.validate", description=__doc__, formatter_class=raw)
    parser.add_argument("checks", nargs="+", choices=("aa", "slowdown", "clock", "kills"))
    parser.add_argument("--count", type=int, help="of comparisons, or kills (default: 200 for aa, 10 for slowdown, 100 for kills)")
    parser.add_argument("--first", type=int, default=0, help="number of the first comparison, to make a part of them at a time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config, as device.threads=1")
    options = parser.parse_args(arguments)

    def numbers(count: int) -> range:
        return range(options.first, options.first + (options.count or count))

    checks: dict[str, Callable[[], bool]] = {
        "aa": lambda: aa(numbers(200), *options.set),
        "slowdown": lambda: slowdown(numbers(10), *options.set),
        "clock": lambda: clock_agrees(*options.set),
        "kills": lambda: kills(options.count or 100),
    }
    try:
        passed = [checks[name]() for name in options.checks]
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(passed) else 1


if __name__ == "__main__":
    # What a child is to call must be of a module with a name: of the imported one.
    from evals.validate import main as command

    sys.exit(command())
