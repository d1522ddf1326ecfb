"""Draws the study: finds the data of each figure, draws the figure, and writes it with its caption."""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from evals.paper.captions import caption, typed_path
from evals.paper.figures import FIGURES, StudyFigure
from evals.paper.recipe import command_of
from evals.paper.sources import Source, find_sources
from evals.plots.distribution import raw_samples
from evals.plots.save import FORMS, save
from evals.plots.style import render

STUDY = Path("results/paper")


class Drawing(NamedTuple):
    """A drawn figure: the name of its files, the picture, its description, and the folders of its data."""

    name: str
    picture: Figure
    description: str
    sources: tuple[Source, ...]


def draw_study(results: Path, plots: Path) -> list[Path]:
    """Draws the CPU half of the study, and the GPU half (`results`/cuda into `plots`/cuda) if it was measured.

    Prints on stderr which figures lack their data. Returns the paths of all files written.

    Raises:
        ValueError: if a file is not a results table, or there are no data at all.
    """
    paths = []
    for half in (".", "cuda"):
        if (results / half).is_dir() or half == ".":
            paths += draw_half(results / half, plots / half)
            print(*missing_data(results / half).values(), sep="\n", file=sys.stderr)
    return paths


def draw_half(results: Path, plots: Path, figures: Sequence[StudyFigure] = FIGURES) -> list[Path]:
    """Writes every figure that has data in `results`, each with its caption, and deletes figures of earlier runs.

    Returns the paths of all files written.

    Raises:
        ValueError: if a file is not a results table, or there are no data at all.
    """
    plots.mkdir(parents=True, exist_ok=True)
    paths = []
    for drawing in drawings(results, figures):
        paths += [save(drawing.picture, plots / f"{drawing.name}.{form}") for form in FORMS]
        paths.append(plots / f"{drawing.name}.md")
        paths[-1].write_text(caption(drawing.name, drawing.description, drawing.sources, results), encoding="utf-8")
    if not paths:
        raise ValueError(f"{typed_path(results)} holds no data of the study: `python -m evals.paper` measures it")
    for path in {path for form in (*FORMS, "md") for path in plots.glob(f"*.{form}")} - {*paths}:
        path.unlink()
    return paths


def missing_data(results: Path, figures: Sequence[StudyFigure] = FIGURES) -> dict[str, str]:
    """Explains, for each figure that lacks data, which folder is missing and which command makes it."""
    explanations = {}
    for figure in figures:
        absent = [data for data in figure.data if not find_sources(results, data)]
        if absent:
            folder = typed_path(results)
            explanations[figure.name] = (
                f"{figure.name} is not drawn, for there is no {folder}/{absent[0]}: `{command_of(absent[0], folder)}` makes it"
            )
    return explanations


def drawings(results: Path, figures: Sequence[StudyFigure] = FIGURES) -> Iterator[Drawing]:
    """Draws every figure that has data in `results`. Raises ValueError for a file that is not a results table."""
    find = cache(partial(find_sources, results))  # reads the tables of a folder once for all figures
    for figure in figures:
        if all(map(find, figure.data)):
            for name, sources, arguments in _draw_arguments(figure, find):
                picture = render(figure.draw, *arguments)
                if picture is not None:
                    yield Drawing(name, picture, figure.description, sources)


def _draw_arguments(
    figure: StudyFigure, find: Callable[[str], Sequence[Source]]
) -> Iterator[tuple[str, tuple[Source, ...], list[object]]]:
    """The name, sources and arguments of each picture: one for each data set of one folder, or one for several folders."""
    if len(figure.data) == 1 and not figure.optional:
        for source in find(figure.data[0]):
            folder = f"-{source.folder.name}" if "*" in figure.data[0] else ""
            samples = [raw_samples(source.records)] if figure.samples else []
            for suffix, data in source.sets.items():
                yield f"{figure.name}{folder}{suffix}", (source,), [data, *samples]
    else:
        sources = [next(iter(find(data)), None) for data in (*figure.data, *figure.optional)]
        yield figure.name, tuple(filter(None, sources)), [source.first if source else None for source in sources]
