"""Writes figures as PNG and SVG; unchanged data give unchanged bytes."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure

from evals.plots.style import RC

FORMS = ("png", "svg")


def save_all(figures: Iterable[tuple[str, Figure]], folder: Path, kinds: Iterable[str]) -> list[Path]:
    """Writes figures, by their names without suffix, into a folder; returns the paths.

    Deletes earlier figures with names that begin with one of `kinds`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stale = {path for kind in kinds for form in FORMS for path in folder.glob(f"{kind}*.{form}")}
    paths = [save(figure, folder / f"{name}.{form}") for name, figure in figures for form in FORMS]
    for path in stale - {*paths}:
        path.unlink()
    return paths


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure in the format of the path's suffix; returns the path."""
    with style.context(["default", RC]):
        # No date: unchanged data must give unchanged bytes.
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
