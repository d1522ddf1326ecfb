"""TODO: what lives here."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure

from evals.plots.style import RC

FORMS = ("png", "svg")


def _save(named: Iterable[tuple[str, Figure]], folder: Path, kinds: Iterable[str]) -> list[Path]:
    """Writes the pictures in place of all of these kinds that were there."""
    folder.mkdir(parents=True, exist_ok=True)
    stale = {path for kind in kinds for form in FORMS for path in folder.glob(f"{kind}*.{form}")}
    paths = []
    for name, picture in named:
        paths += [save(picture, folder / f"{name}.{form}") for form in FORMS]
    for path in stale - {*paths}:
        path.unlink()
    return paths


def save(picture: Figure, path: Path) -> Path:
    """Writes a picture in the form that the path's suffix names; returns the path."""
    with style.context(["default", RC]):
        # No date: unchanged data must give unchanged bytes.
        picture.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
