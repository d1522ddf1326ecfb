"""`python -m evals.figures results/<sweep> …`: draws figures from tables, without measuring; `paper` draws those of the study.

Figures are PNG and SVG, at the width of a paper. The same tables and the same matplotlib give the same bytes on any machine.
Exit code: 0, or 2 with one sentence on standard error if a folder cannot be drawn.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.cli.command import command
from evals.errors import OK
from evals.paper.draw import STUDY, draw_study
from evals.plots.registry import draw_folder


@command(ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.figures", description="Draws figures from results, without measuring.")
    parser.add_argument(
        "results", nargs="+", type=Path, help="folders that hold a results.csv, such as results/seq_len; or paper: the study"
    )
    parser.add_argument("--plots", type=Path, default=Path("plots"), help="folder for the folders of figures (default: plots)")
    options = parser.parse_args(arguments)
    for folder in options.results:
        if folder == Path("paper"):
            folder, paths = STUDY, draw_study(STUDY, options.plots / STUDY.name)
        else:
            paths = draw_folder(folder, options.plots / folder.resolve().name)
        print(f"{folder}: {len(paths)} files in {paths[0].parent}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
