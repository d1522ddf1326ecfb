"""Draws the study: finds the data of each figure, draws the figure, and writes it with its caption."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from evals.paper.captions import caption, typed_path
from evals.paper.figures import FIGURES, StudyFigure
from evals.paper.recipe import command_of
from evals.paper.sources import Source, find_sources
from evals.plots.distribution import raw_samples
from evals.plots.save import FORMS, save
from evals.plots.style import render

STUDY = Path("results/paper")


@dataclass(frozen=True)
class Drawing:
    """A drawn figure: the name of its file, the picture, its description, and the folders that its data come from."""

    name: str
    picture: Figure
    description: str
    sources: tuple[Source, ...]


def draw_study(results: Path, plots: Path) -> list[Path]:
    """Draws the CPU half of the study, and the GPU half (`results`/cuda into `plots`/cuda) if it was measured.

    Prints on stderr which figures lack their data.

    Args:
        results: the study's folder of results, as results/paper.
        plots: the folder of its figures, as plots/paper.

    Returns:
        The paths of all files written.

    Raises:
        ValueError: if a file is no table of results, or there is no data at all.
    """
    paths = []
    for half in ("", "cuda"):
        if half == "" or (results / half).is_dir():
            paths += draw_half(results / half, plots / half)
            print(*missing_data(results / half).values(), sep="\n", file=sys.stderr)
    return paths


def draw_half(results: Path, plots: Path, figures: Sequence[StudyFigure] = FIGURES) -> list[Path]:
    """Writes every figure whose data are in `results`, each with its caption, and deletes figures of earlier runs.

    Returns:
        The paths of all files written.

    Raises:
        ValueError: if a file is no table of results, or there is no data at all.
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
            command = command_of(absent[0], typed_path(results))
            made = f": `{command}` makes it" if command else ""
            explanations[figure.name] = f"{figure.name} is not drawn, for there is no {typed_path(results)}/{absent[0]}{made}"
    return explanations


def drawings(results: Path, figures: Sequence[StudyFigure] = FIGURES) -> Iterator[Drawing]:
    """Draws every figure whose data are in `results`. Raises ValueError for a file that is no table of results."""
    known = {
        source.folder: source
        for data in {data for figure in figures for data in (*figure.data, *figure.optional)}
        for source in find_sources(results, data)
    }
    for figure in figures:
        if all(find_sources(results, data) for data in figure.data):
            for name, sources, given in _draw_arguments(figure, results, known):
                picture = render(figure.draw, *given)
                if picture is not None:
                    yield Drawing(name, picture, figure.description, sources)


def _draw_arguments(
    figure: StudyFigure, results: Path, known: dict[Path, Source]
) -> Iterator[tuple[str, tuple[Source, ...], list[object]]]:
    """The arguments of each call of `figure.draw`: every data set of one folder, or the first data set of several folders."""
    if len(figure.data) == 1 and not figure.optional:
        several = "*" in figure.data[0]
        for source in find_sources(results, figure.data[0]):
            source = known[source.folder]
            samples = [raw_samples(source.records)] if figure.samples else []
            for suffix, data in source.sets.items():
                yield f"{figure.name}{f'-{source.folder.name}' if several else ''}{suffix}", (source,), [data, *samples]
        return
    sources = [known.get(results / data) for data in (*figure.data, *figure.optional)]
    yield (
        figure.name,
        tuple(source for source in sources if source),
        [next(iter(source.sets.values())) if source else None for source in sources],
    )
