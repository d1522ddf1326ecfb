"""The study's figures: which there are, of which data, drawn by what. Nothing else lists them.

`python -m evals.figures paper` writes each to plots/paper as PNG and SVG, with a caption beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure

from evals.paper import overview
from evals.paper.captions import caption, shown
from evals.paper.crossings import crossings
from evals.paper.radar import radar
from evals.paper.recipe import command_of
from evals.paper.similarity import similarity
from evals.paper.sources import Source, found
from evals.plots import accuracy, conversion, lines
from evals.plots.heatmap import heatmap
from evals.plots.memory import memory_split
from evals.plots.needle import needle_depth
from evals.plots.pareto import pareto
from evals.plots.save import FORMS, save
from evals.plots.style import RC


@dataclass(frozen=True)
class Shown:
    """One figure of the study.

    data: folders of results/paper, of which the figure needs all; `draw` takes what is in them, in this order. A pattern, which
    stands alone, makes a figure of each folder that it fits. optional: more folders, for which `draw` may be given None.
    """

    name: str
    says: str
    data: tuple[str, ...]
    draw: Callable[..., Figure | None]
    optional: tuple[str, ...] = ()


SEQ_LEN = ("seq_len",)
FIGURES = (
    # --- speed and memory, over sequence length
    Shown(
        "dashboard",
        "The study at a glance: time, speed-up, memory, part of the ceiling, exponents, and what is recalled with how much.",
        *(SEQ_LEN, overview.dashboard, ("recall_sizes",)),
    ),
    Shown(
        "model_comparison",
        "Latency, with its interval, and peak memory of every attention at the least, a middle and the greatest length.",
        *(SEQ_LEN, overview.comparison),
    ),
    Shown("latency", "Latency over sequence length, with its interval.", SEQ_LEN, partial(lines.curve, quantity=lines.LATENCY)),
    Shown(
        "complexity",
        "Latency over sequence length on logarithmic axes, the law a + b·nᵖ that fits it, and p with its interval "
        "beside the p of the FLOPs that the attention declares.",
        *(SEQ_LEN, partial(lines.scaling, which="latency")),
    ),
    Shown(
        "speedup",
        "How many times faster each attention is than the reference, in turns with it; rings: where it crosses.",
        *(SEQ_LEN, partial(lines.curve, quantity=lines.SPEEDUP)),
    ),
    Shown(
        "inference_heatmap",
        "How many times faster each attention is than the reference, cell by cell, with what may be said of it.",
        SEQ_LEN,
        heatmap,
    ),
    Shown("crossovers", "Every pair of attentions, and the lengths at which the one or the other is faster.", SEQ_LEN, crossings),
    Shown(
        "ceiling",
        "The least time that this machine's measured compute and bandwidth allow, over the time that was measured.",
        *(SEQ_LEN, partial(lines.curve, quantity=lines.CEILING)),
    ),
    Shown(
        "memory_scaling",
        "Peak memory over sequence length on logarithmic axes, the law that fits it, and its exponent.",
        *(SEQ_LEN, partial(lines.scaling, which="memory")),
    ),
    Shown(
        "memory_split", "What memory is made of: parameters, activations, and the state that decoding keeps.", SEQ_LEN, memory_split
    ),
    Shown(
        "combined",
        "Latency, peak memory and parameters at the greatest length, and the front of those that nobody beats in the first two.",
        *(SEQ_LEN, partial(pareto, halos=True)),
    ),
    Shown(
        "radar",
        "How near each attention comes to the best of all, on axes that the figure defines.",
        *(SEQ_LEN, radar, ("recall_sizes",)),
    ),
    # --- beyond it: the kernel alone, long sequences, decoding
    Shown(
        "kernel_speedup",
        "BSBR over SDPA on the whole sequence, the attentions alone, without projections.",
        *(("cpu/attention",), partial(lines.curve, quantity=lines.SPEEDUP)),
    ),
    Shown(
        "long_latency",
        "BSBR with all earlier chunks, and with the 8 best, on long sequences.",
        *(("cpu/long",), partial(lines.scaling, which="latency")),
    ),
    Shown("decode", "The time of one token behind a context, and the state that is kept for it.", ("decode",), overview.decode),
    Shown(
        "decode_long",
        "The time of one token of BSBR behind up to a million tokens, and the state that is kept for it.",
        ("cpu/decode",),
        overview.decode,
    ),
    # --- what is remembered
    Shown(
        "recall_front",
        "Accuracy of recall against the bytes that decoding keeps, and the front of those that nobody beats in both.",
        *(("recall*",), accuracy.recall_front),
    ),
    Shown(
        "recall_latency",
        "Accuracy of recall against the time of the next token, and the front of those that nobody beats in both.",
        *(("recall_sizes", "decode_sizes"), accuracy.recall_latency),
    ),
    Shown("recall", "Accuracy of recall over the number of pairs.", ("recall",), accuracy.accuracy),
    Shown(
        "retrieval_front",
        "Accuracy of recall against the bytes that decoding keeps, for forms of BSBR's retrieval.",
        ("retrieval",),
        accuracy.recall_front,
    ),
    Shown(
        "retrieval_length",
        "Accuracy of finding one pair, at the length of training and at longer ones, for forms of BSBR's retrieval.",
        *(("retrieval_needle",), accuracy.accuracy_by_length),
    ),
    Shown(
        "length_extrapolation",
        "Accuracy at lengths that were not trained at.",
        *(("length_extrapolation",), accuracy.accuracy_by_length),
    ),
    Shown("needle", "Where a needle is found: accuracy by its depth and the length.", ("needle",), needle_depth),
    Shown(
        "language_modeling",
        "Bits per byte of text, by how many bytes of context there were.",
        *(("language_modeling",), accuracy.bits_by_position),
    ),
    Shown(
        "loss",
        "Training loss over steps, at the best learning rate.",
        *(("language_modeling",), accuracy.loss),
    ),
    # --- conversion
    Shown(
        "conversion_time",
        "Latency of a pretrained decoder and of its conversion, over sequence length.",
        *(("conversion",), partial(lines.curve, quantity=lines.LATENCY)),
    ),
    Shown(
        "conversion_throughput",
        "Tokens a second of a pretrained decoder and of its conversion, over sequence length.",
        ("conversion",),
        partial(lines.curve, quantity=lines.THROUGHPUT),
    ),
    Shown(
        "conversion_speedup",
        "How many times faster the conversion is than the original; rings: where it crosses.",
        *(("conversion",), partial(lines.curve, quantity=lines.SPEEDUP)),
    ),
    Shown(
        "conversion_scaling",
        "The law a + b·nᵖ that fits the latency of a pretrained decoder and of its conversion, with the interval of p.",
        *(("conversion",), partial(lines.scaling, which="latency")),
    ),
    Shown(
        "conversion_memory",
        "Peak memory of a pretrained decoder and of its conversion, over sequence length.",
        ("conversion",),
        partial(lines.curve, quantity=lines.MEMORY),
    ),
    Shown(
        "conversion_perplexity",
        "Perplexity in each chunk of the context: of the original, of its conversion, and of that after healing.",
        *(("distillation",), lambda tables: conversion.perplexity(*tables)),
    ),
    Shown(
        "conversion_agreement",
        "How often the original's likeliest token is among the 1, 5 and 10 likeliest of its conversion, before and after healing.",
        *(("distillation",), lambda tables: conversion.agreement(*tables)),
    ),
    Shown(
        "conversion_similarity",
        "How like the original its conversion is, before and after healing, run by run: hidden states and next tokens.",
        *(("distillation",), lambda tables: similarity(*tables)),
    ),
)
"""In the order of the study. One whose data has nothing to show in it is left out."""


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn: its file's name, its picture, and whence it comes."""

    name: str
    picture: Figure
    says: str
    sources: tuple[Source, ...]


def missing(results: Path, figures: Sequence[Shown] = FIGURES) -> dict[str, str]:
    """By figure, in one sentence, what is not there of its data, and the command that makes it."""
    told = {}
    for one in figures:
        absent = [data for data in one.data if not found(results, data)]
        if absent:
            command = command_of(absent[0], shown(results))
            made = f": `{command}` makes it" if command else ""
            told[one.name] = f"{one.name} is not drawn, for there is no {shown(results)}/{absent[0]}{made}"
    return told


def drawings(results: Path, figures: Sequence[Shown] = FIGURES) -> Iterator[Drawing]:
    """Every figure whose data is there. Raises ValueError, in one sentence, for data that is no table of results."""
    known = {
        source.folder: source
        for data in {data for one in figures for data in (*one.data, *one.optional)}
        for source in found(results, data)
    }
    for one in figures:
        if all(found(results, data) for data in one.data):
            for name, sources, given in _sets(one, results, known):
                with style.context(["default", RC]):
                    picture = one.draw(*given)
                if picture is not None:
                    yield Drawing(name, picture, one.says, sources)


def _sets(one: Shown, results: Path, known: dict[Path, Source]) -> Iterator[tuple[str, tuple[Source, ...], list[object]]]:
    """What `draw` is called with: of one folder each set in it, of several the first set of each."""
    if len(one.data) == 1 and not one.optional:
        several = "*" in one.data[0]
        for source in found(results, one.data[0]):
            source = known[source.folder]
            for suffix, data in source.sets.items():
                yield f"{one.name}{f'-{source.folder.name}' if several else ''}{suffix}", (source,), [data]
        return
    sources = [known.get(results / data) for data in (*one.data, *one.optional)]
    yield (
        one.name,
        tuple(source for source in sources if source),
        [next(iter(source.sets.values())) if source else None for source in sources],
    )


def draw(results: Path, plots: Path, figures: Sequence[Shown] = FIGURES) -> list[Path]:
    """Writes all figures, in place of whatever was there, each with its caption; returns the paths.

    Raises ValueError, in one sentence, for data that is no table of results, and where there is none at all.
    """
    plots.mkdir(parents=True, exist_ok=True)
    paths = []
    for drawing in drawings(results, figures):
        paths += [save(drawing.picture, plots / f"{drawing.name}.{form}") for form in FORMS]
        paths.append(plots / f"{drawing.name}.md")
        paths[-1].write_text(caption(drawing.name, drawing.says, drawing.sources, results), encoding="utf-8")
    if not paths:
        raise ValueError(f"{shown(results)} holds no data of the study: `python -m evals.paper` measures it")
    for path in {path for form in (*FORMS, "md") for path in plots.glob(f"*.{form}")} - {*paths}:
        path.unlink()
    return paths
