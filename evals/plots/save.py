"""Writes figures as PNG and SVG; unchanged data give unchanged bytes."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure

from evals.errors import naming, one_sentence
from evals.plots.style import RC

FORMS = ("png", "svg")


Drawing = tuple[str, Callable[[], Figure | None]]
"""The name of a figure, without suffix, and a function that draws it; without data it returns None."""


class FiguresNotDrawn(ValueError):
    """Some figures of a table could not be drawn; `paths` are those that were."""

    def __init__(self, reasons: Mapping[str, Exception], paths: list[Path]) -> None:
        sentences = (f"{name}: {type(error).__name__}: {one_sentence(error)}" for name, error in reasons.items())
        super().__init__("; ".join(sentences))
        self.paths = paths


def save_all(figures: Iterable[Drawing], folder: Path, kinds: Iterable[str]) -> list[Path]:
    """Draws and writes figures into a folder, each independently of the others; returns the paths.

    Deletes earlier figures with names that begin with one of `kinds`.

    Raises:
        FiguresNotDrawn: if a figure could not be drawn or written. The others are.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stale = {path for kind in kinds for form in FORMS for path in folder.glob(f"{kind}*.{form}")}
    paths: list[Path] = []
    reasons: dict[str, Exception] = {}
    for name, draw in figures:
        try:
            figure = draw()
            paths += [save(figure, folder / f"{name}.{form}") for form in FORMS if figure is not None]
        except Exception as error:  # noqa: BLE001  matplotlib can raise anything, and one figure is not to cost the others
            reasons[name] = error
    for path in stale - {*paths}:
        if path.is_file():
            path.unlink()
    if reasons:
        raise FiguresNotDrawn(reasons, paths) from next(iter(reasons.values()))
    return paths


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure in the format of the path's suffix; returns the path."""
    with style.context(["default", RC]), naming(path):
        # No date: unchanged data must give unchanged bytes.
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
