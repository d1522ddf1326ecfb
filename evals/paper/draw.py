"""TODO: what lives here."""

import sys
from pathlib import Path

STUDY = Path("results/paper")


def draw_study(results: Path, plots: Path) -> list[Path]:
    """Writes every figure of the study whose data is in `results`, says on stderr which data is not; returns the paths.

    Of the GPU half, results/cuda, they go to plots/cuda. Raises ValueError for data that is none.
    """
    from evals.paper import figures as study  # which draws by what stands here

    paths = []
    for half in ("", "cuda"):
        if half == "" or (results / half).is_dir():
            paths += study.draw(results / half, plots / half)
            print(*study.missing(results / half).values(), sep="\n", file=sys.stderr)
    return paths
