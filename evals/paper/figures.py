"""The study's figures: which there are, of which data, drawn by what. Nothing else lists them.

`python -m evals.figures paper` writes each to plots/paper as PNG and SVG, with a caption beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from evals.paper import overview
from evals.paper.crossings import crossings
from evals.paper.radar import radar
from evals.paper.similarity import similarity
from evals.plots import accuracy, conversion, lines
from evals.plots.heatmap import speedup_heatmap
from evals.plots.memory import memory_split
from evals.plots.needle import needle_depth
from evals.plots.pareto import pareto


@dataclass(frozen=True)
class StudyFigure:
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
    StudyFigure(
        "dashboard",
        "The study at a glance: time, speed-up, memory, part of the ceiling, exponents, and what is recalled with how much.",
        *(SEQ_LEN, overview.dashboard, ("recall_sizes",)),
    ),
    StudyFigure(
        "model_comparison",
        "Latency, with its interval, and peak memory of every attention at the least, a middle and the greatest length.",
        *(SEQ_LEN, overview.comparison),
    ),
    StudyFigure(
        "latency", "Latency over sequence length, with its interval.", SEQ_LEN, partial(lines.line_plot, quantity=lines.LATENCY)
    ),
    StudyFigure(
        "complexity",
        "Latency over sequence length on logarithmic axes, the law a + b·nᵖ that fits it, and p with its interval "
        "beside the p of the FLOPs that the attention declares.",
        *(SEQ_LEN, partial(lines.scaling_plot, which="latency")),
    ),
    StudyFigure(
        "speedup",
        "How many times faster each attention is than the reference, in turns with it; rings: where it crosses.",
        *(SEQ_LEN, partial(lines.line_plot, quantity=lines.SPEEDUP)),
    ),
    StudyFigure(
        "inference_heatmap",
        "How many times faster each attention is than the reference, cell by cell, with what may be said of it.",
        SEQ_LEN,
        speedup_heatmap,
    ),
    StudyFigure(
        "crossovers", "Every pair of attentions, and the lengths at which the one or the other is faster.", SEQ_LEN, crossings
    ),
    StudyFigure(
        "ceiling",
        "The least time that this machine's measured compute and bandwidth allow, over the time that was measured.",
        *(SEQ_LEN, partial(lines.line_plot, quantity=lines.CEILING)),
    ),
    StudyFigure(
        "memory_scaling",
        "Peak memory over sequence length on logarithmic axes, the law that fits it, and its exponent.",
        *(SEQ_LEN, partial(lines.scaling_plot, which="memory")),
    ),
    StudyFigure(
        "memory_split", "What memory is made of: parameters, activations, and the state that decoding keeps.", SEQ_LEN, memory_split
    ),
    StudyFigure(
        "combined",
        "Latency, peak memory and parameters at the greatest length, and the front of those that nobody beats in the first two.",
        *(SEQ_LEN, partial(pareto, halos=True)),
    ),
    StudyFigure(
        "radar",
        "How near each attention comes to the best of all, on axes that the figure defines.",
        *(SEQ_LEN, radar, ("recall_sizes",)),
    ),
    # --- beyond it: the kernel alone, long sequences, decoding
    StudyFigure(
        "kernel_speedup",
        "BSBR over SDPA on the whole sequence, the attentions alone, without projections.",
        *(("cpu/attention",), partial(lines.line_plot, quantity=lines.SPEEDUP)),
    ),
    StudyFigure(
        "long_latency",
        "BSBR with all earlier chunks, and with the 8 best, on long sequences.",
        *(("cpu/long",), partial(lines.scaling_plot, which="latency")),
    ),
    StudyFigure(
        "decode", "The time of one token behind a context, and the state that is kept for it.", ("decode",), overview.decode
    ),
    StudyFigure(
        "decode_long",
        "The time of one token of BSBR behind up to a million tokens, and the state that is kept for it.",
        ("cpu/decode",),
        overview.decode,
    ),
    # --- what is remembered
    StudyFigure(
        "recall_front",
        "Accuracy of recall against the bytes that decoding keeps, and the front of those that nobody beats in both.",
        *(("recall*",), accuracy.recall_front),
    ),
    StudyFigure(
        "recall_latency",
        "Accuracy of recall against the time of the next token, and the front of those that nobody beats in both.",
        *(("recall_sizes", "decode_sizes"), accuracy.recall_latency),
    ),
    StudyFigure("recall", "Accuracy of recall over the number of pairs.", ("recall",), accuracy.accuracy),
    StudyFigure(
        "retrieval_front",
        "Accuracy of recall against the bytes that decoding keeps, for forms of BSBR's retrieval.",
        ("retrieval",),
        accuracy.recall_front,
    ),
    StudyFigure(
        "retrieval_length",
        "Accuracy of finding one pair, at the length of training and at longer ones, for forms of BSBR's retrieval.",
        *(("retrieval_needle",), accuracy.accuracy_by_length),
    ),
    StudyFigure(
        "length_extrapolation",
        "Accuracy at lengths that were not trained at.",
        *(("length_extrapolation",), accuracy.accuracy_by_length),
    ),
    StudyFigure("needle", "Where a needle is found: accuracy by its depth and the length.", ("needle",), needle_depth),
    StudyFigure(
        "language_modeling",
        "Bits per byte of text, by how many bytes of context there were.",
        *(("language_modeling",), accuracy.bits_by_position),
    ),
    StudyFigure(
        "loss",
        "Training loss over steps, at the best learning rate.",
        *(("language_modeling",), accuracy.loss),
    ),
    # --- conversion
    StudyFigure(
        "conversion_time",
        "Latency of a pretrained decoder and of its conversion, over sequence length.",
        *(("conversion",), partial(lines.line_plot, quantity=lines.LATENCY)),
    ),
    StudyFigure(
        "conversion_throughput",
        "Tokens a second of a pretrained decoder and of its conversion, over sequence length.",
        ("conversion",),
        partial(lines.line_plot, quantity=lines.THROUGHPUT),
    ),
    StudyFigure(
        "conversion_speedup",
        "How many times faster the conversion is than the original; rings: where it crosses.",
        *(("conversion",), partial(lines.line_plot, quantity=lines.SPEEDUP)),
    ),
    StudyFigure(
        "conversion_scaling",
        "The law a + b·nᵖ that fits the latency of a pretrained decoder and of its conversion, with the interval of p.",
        *(("conversion",), partial(lines.scaling_plot, which="latency")),
    ),
    StudyFigure(
        "conversion_memory",
        "Peak memory of a pretrained decoder and of its conversion, over sequence length.",
        ("conversion",),
        partial(lines.line_plot, quantity=lines.MEMORY),
    ),
    StudyFigure(
        "conversion_perplexity",
        "Perplexity in each chunk of the context: of the original, of its conversion, and of that after healing.",
        *(("distillation",), lambda tables: conversion.perplexity(*tables)),
    ),
    StudyFigure(
        "conversion_agreement",
        "How often the original's likeliest token is among the 1, 5 and 10 likeliest of its conversion, before and after healing.",
        *(("distillation",), lambda tables: conversion.agreement(*tables)),
    ),
    StudyFigure(
        "conversion_similarity",
        "How like the original its conversion is, before and after healing, run by run: hidden states and next tokens.",
        *(("distillation",), lambda tables: similarity(*tables)),
    ),
)
"""In the order of the study. One whose data has nothing to show in it is left out."""
