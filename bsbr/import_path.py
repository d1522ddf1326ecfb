"""Keeps `evals` and `baselines` those beside this package: other distributions have packages of these names as well."""

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
"""The folder with bsbr, baselines and evals."""


def prefer_ours() -> list[str]:
    """Puts `HOME` before folders whose `evals` or `baselines` would be imported in place of ours, here and in child processes.

    Returns:
        One sentence for each package that was shadowed.
    """
    notes = []
    for name in ("evals", "baselines"):
        other = _other_package(name)
        if other is not None:
            notes.append(f"{other} is earlier on the path than {HOME / name}, which is used all the same")
            sys.path.insert(_position(other.parent), str(HOME))
    if notes:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])])
    return notes


def _other_package(name: str) -> Path | None:
    """The folder or file of a package of this name that is found before the one in `HOME`; None if ours is found, or none."""
    spec = PathFinder.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin).resolve()
    found = origin.parent if spec.submodule_search_locations else origin
    return None if found == HOME / name else found


def _position(folder: Path) -> int:
    """The index of a folder in sys.path."""
    return next(index for index, entry in enumerate(sys.path) if Path(entry).resolve() == folder)
