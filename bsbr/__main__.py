"""The console command `bsbr`, also `python -m bsbr`: starts a command of the harness.

It lies in this package, and not in evals, because other distributions have an `evals` as well.
"""

import importlib
import sys

from bsbr.import_path import prefer_ours


def main() -> int:
    """Runs the command that sys.argv names; returns its exit code."""
    for note in prefer_ours():
        print(f"note: {note}", file=sys.stderr)
    try:
        commands = importlib.import_module("evals.cli.commands")
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(commands.main())


if __name__ == "__main__":
    sys.exit(main())
