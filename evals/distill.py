"""`python -m evals.distill`: distills models into their conversions, and measures the loss by converting and its recovery.

For each model and seed: trains a small model on the bytes of Python's standard library, converts it, distills the original into the
conversion, and evaluates all three on the same held-out text. Each run is a line of results/distillation/samples.jsonl; an
interrupted one continues from its checkpoint. `--pretrained gpt2` takes a model of the hub, or a folder, instead.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from evals.cli.command import RESUME, command
from evals.conversion import tables
from evals.conversion.study import FOLDERS, add_arguments, plans, run_all
from evals.errors import OK
from evals.results.markup import markdown
from evals.results.schema import write_table


@command(ValueError, FloatingPointError, interrupted=RESUME)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.distill", description=str(__doc__).partition(": ")[2])
    add_arguments(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    folder = options.results_dir / FOLDERS[options.split]
    with tqdm(disable=None, leave=False, bar_format="{desc}") as progress:
        records = run_all(plans(options), options.results_dir, folder, progress.set_description_str)
    built = tables.build(records)
    print(markdown(tables.summarize(built["conversion"], options.split)))
    for kind, rows in built.items():
        print(f"\n{write_table(rows, folder, kind)}: {len(rows)} rows")
    return OK


if __name__ == "__main__":
    sys.exit(main())
