"""`python -m evals.merge DIR DIR … --to DIR`: merges the results of several nodes or machines into one folder.

    python -m evals.merge results/a/seq_len results/b/seq_len --to results/both
    python -m evals.merge results/node_1 results/node_2 --to results/cluster --machine cluster

Each machine keeps its own rows, with its name in the column `machine`: the model and cores of its processor, and its host. What
several folders hold is there once. Rounds of one comparison on one machine are pooled; nothing is pooled over machines. What was
measured twice, and differently, is named. The sources stay as they are, and --to may be an earlier merge, which grows.
Exit code: 0, or 2 with one sentence on standard error if the folders cannot be merged.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.cli.command import command
from evals.cli.outputs import build_tables
from evals.errors import OK, UsageError
from evals.results.formatting import wrap
from evals.results.machines import MACHINE, doubtful_names
from evals.results.merge import merge
from evals.results.merged_folder import read_source, read_target, write_ledgers
from evals.results.schema import write_table


@command(ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m evals.merge", description=__doc__, formatter_class=raw)
    parser.add_argument("results", nargs="+", type=Path, help="folders that evals.run or evals.merge wrote")
    parser.add_argument("--to", required=True, type=Path, help="the folder of the merged results")
    parser.add_argument("--prefer", metavar="DIR", type=Path, help="the folder that counts in a conflict (default: the newest)")
    parser.add_argument(
        "--machine", metavar="[DIR=]NAME", action="append", default=[], help="name of the machine of a folder, or of all"
    )
    options = parser.parse_args(arguments)
    folders = list(dict.fromkeys(options.results))
    if options.prefer is not None and options.prefer not in folders:
        raise UsageError(f"--prefer must be one of {', '.join(map(str, folders))}, got {options.prefer}")
    names = _read_names(options.machine, folders)
    sources = [read_source(folder, names.get(folder)) for folder in folders]
    target = read_target(options.to, sources)
    merged = merge([*sources, *target], options.prefer)
    tables = build_tables(merged.records)
    write_ledgers(options.to, merged)
    for doubt in doubtful_names(merged.records):
        print(wrap(f"warning: {doubt}"), file=sys.stderr)
    for conflict in merged.conflicts:
        print(wrap(f"conflict: {conflict}"))
    for kind, rows in tables.items():
        of = f" of {', '.join(sorted(rows[MACHINE].unique()))}" if MACHINE in rows else ""
        print(wrap(f"{write_table(rows, options.to, kind)}: {len(rows)} rows{of}"))
    if merged.superseded:
        print(wrap(f"{options.to / 'superseded.jsonl'}: {len(merged.superseded)} records that do not count"))
    return OK


def _read_names(words: Sequence[str], folders: Sequence[Path]) -> dict[Path, str]:
    """The given name of the machine of each folder. Raises UsageError for a name that a folder cannot have."""
    names: dict[Path, str] = {}
    for word in words:
        folder, _, name = word.rpartition("=")
        if not re.fullmatch(r"[\w.-]+", name) or (folder and Path(folder) not in folders):
            raise UsageError(f"--machine must be NAME, of letters, digits and ._-, or DIR=NAME with a given folder, got {word}")
        names |= {Path(folder): name} if folder else {one: name for one in folders if one not in names}
    return names


if __name__ == "__main__":
    sys.exit(main())
