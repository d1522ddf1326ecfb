"""The list of the study's figures: name, description, data, and the function that draws each. Nothing else lists them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from evals.paper import overview
from evals.paper.crossings import crossings
from evals.paper.radar import radar
from evals.paper.similarity import similarity
from evals.plots import accuracy, conversion
from evals.plots.distribution import distribution
from evals.plots.heatmap import speedup_heatmap
from evals.plots.lines import line_plot, scaling_plot
from evals.plots.memory import memory_split
from evals.plots.needle import needle_depth
from evals.plots.pareto import pareto
from evals.results.metrics import LATENCY, PEAK_MEMORY, ROOFLINE, SPEEDUP, THROUGHPUT, Metric

Draw = Callable[..., Figure | None]


@dataclass(frozen=True)
class StudyFigure:
    """One figure of the study. `draw` takes the data of `data` and `optional` in this order."""

    name: str
    description: str
    data: tuple[str, ...]  # folders of results/paper, all of them required; or one pattern, for a figure of each folder
    draw: Draw
    optional: tuple[str, ...] = ()  # `draw` gets None for a folder that does not exist
    samples: bool = False  # whether `draw` also takes the raw samples


def _lines(metric: Metric) -> Draw:
    return partial(line_plot, metric=metric)


def _conversion(draw: Callable[[Any, Any], Figure]) -> Draw:
    return lambda tables: draw(*tables)


LATENCY_LAW, MEMORY_LAW = partial(scaling_plot, quantity="latency"), partial(scaling_plot, quantity="memory")
SEQ_LEN, CONVERSION, DISTILLATION = ("seq_len",), ("conversion",), ("distillation",)

TIMINGS = (
    StudyFigure(
        "dashboard",
        "The study at a glance: latency, speed-up, memory, fraction of the roofline, exponents, and accuracy against state.",
        *(SEQ_LEN, overview.dashboard, ("recall_sizes",)),
    ),
    StudyFigure(
        "model_comparison",
        "Latency with its interval, and peak memory, of every attention at the least, a middle and the greatest length.",
        *(SEQ_LEN, overview.comparison),
    ),
    StudyFigure("latency", "Latency over sequence length, with its interval.", SEQ_LEN, _lines(LATENCY)),
    StudyFigure(
        "distribution",
        "All latency samples over their median, by attention and length: outliers, and whether there is one mode or several.",
        *(SEQ_LEN, distribution),
        samples=True,
    ),
    StudyFigure(
        "complexity",
        "Latency over sequence length on logarithmic axes, the fitted power law a + b·nᵖ, and p with its interval "
        "beside the p of the FLOPs that the attention declares.",
        *(SEQ_LEN, LATENCY_LAW),
    ),
    StudyFigure(
        "speedup",
        "Speed-up of each attention over the reference, measured interleaved with it; rings: where it crosses the reference.",
        *(SEQ_LEN, _lines(SPEEDUP)),
    ),
    StudyFigure(
        "inference_heatmap",
        "Speed-up of each attention over the reference at each length, with its verdict.",
        *(SEQ_LEN, speedup_heatmap),
    ),
    StudyFigure("crossovers", "Every pair of attentions, and the lengths at which either is faster.", SEQ_LEN, crossings),
    StudyFigure(
        "roofline",
        "The least time that this machine's measured compute and memory bandwidth allow, over the measured time.",
        *(SEQ_LEN, _lines(ROOFLINE)),
    ),
    StudyFigure(
        "memory_scaling",
        "Peak memory over sequence length on logarithmic axes, the fitted power law, and its exponent.",
        *(SEQ_LEN, MEMORY_LAW),
    ),
    StudyFigure(
        "memory_split", "The parts of memory: parameters, activations, and the state that decoding keeps.", SEQ_LEN, memory_split
    ),
    StudyFigure(
        "combined",
        "Latency, peak memory and parameters at the greatest length, and the Pareto front of latency and memory.",
        *(SEQ_LEN, partial(pareto, parameters=True)),
    ),
    StudyFigure(
        "radar",
        "How near each attention comes to the best of all, on axes that the figure defines.",
        *(SEQ_LEN, radar, ("recall_sizes",)),
    ),
    StudyFigure(
        "kernel_speedup",
        "Speed-up of BSBR over SDPA on the whole sequence, the attentions alone, without projections.",
        *(("cpu/attention",), _lines(SPEEDUP)),
    ),
    StudyFigure(
        "long_latency",
        "Latency of BSBR with all earlier chunks, and with the 8 best, on long sequences.",
        *(("cpu/long",), LATENCY_LAW),
    ),
    StudyFigure(
        "decode", "Latency of one token behind a context, and the state that decoding keeps.", ("decode",), overview.decode
    ),
    StudyFigure(
        "decode_long",
        "Latency of one token of BSBR behind up to a million tokens, and the state that decoding keeps.",
        *(("cpu/decode",), overview.decode),
    ),
)
TRAINING = (
    StudyFigure(
        "recall_front",
        "Accuracy of recall against the bytes of decoding state, and the Pareto front of both.",
        *(("recall*",), accuracy.recall_front),
    ),
    StudyFigure(
        "recall_latency",
        "Accuracy of recall against the latency of the next token, and the Pareto front of both.",
        *(("recall_sizes", "decode_sizes"), accuracy.recall_latency),
    ),
    StudyFigure("recall", "Accuracy of recall over the number of pairs.", ("recall",), accuracy.accuracy),
    StudyFigure(
        "retrieval_front",
        "Accuracy of recall against the bytes of decoding state, for forms of BSBR's retrieval.",
        *(("retrieval",), accuracy.recall_front),
    ),
    StudyFigure(
        "retrieval_length",
        "Accuracy of finding one pair, at the length of training and at longer ones, for forms of BSBR's retrieval.",
        *(("retrieval_needle",), accuracy.accuracy_by_length),
    ),
    StudyFigure(
        "length_extrapolation",
        "Accuracy of recall at lengths that were not trained at.",
        *(("length_extrapolation",), accuracy.accuracy_by_length),
    ),
    StudyFigure("needle", "Accuracy of finding a needle, by its depth and the length of the text.", ("needle",), needle_depth),
    StudyFigure(
        "language_modeling",
        "Bits per byte of text, by the number of bytes of context.",
        *(("language_modeling",), accuracy.bits_by_position),
    ),
    StudyFigure("loss", "Training loss over steps, at the best learning rate.", ("language_modeling",), accuracy.loss),
)
CONVERSIONS = (
    StudyFigure(
        "conversion_time",
        "Latency of a pretrained decoder and of its conversion, over sequence length.",
        *(CONVERSION, _lines(LATENCY)),
    ),
    StudyFigure(
        "conversion_throughput",
        "Tokens per second of a pretrained decoder and of its conversion, over sequence length.",
        *(CONVERSION, _lines(THROUGHPUT)),
    ),
    StudyFigure(
        "conversion_speedup",
        "Speed-up of the conversion over the original decoder; rings: where it crosses the original.",
        *(CONVERSION, _lines(SPEEDUP)),
    ),
    StudyFigure(
        "conversion_scaling",
        "Latency of a pretrained decoder and of its conversion with the fitted power law a + b·nᵖ, and p with its interval.",
        *(CONVERSION, LATENCY_LAW),
    ),
    StudyFigure(
        "conversion_memory",
        "Peak memory of a pretrained decoder and of its conversion, over sequence length.",
        *(CONVERSION, _lines(PEAK_MEMORY)),
    ),
    StudyFigure(
        "conversion_perplexity",
        "Perplexity in each chunk of the context: of the original, its conversion, and the distilled conversion.",
        *(DISTILLATION, _conversion(conversion.perplexity)),
    ),
    StudyFigure(
        "conversion_agreement",
        "How often the original's likeliest token is among the k likeliest of its conversion, before and after distilling.",
        *(DISTILLATION, _conversion(conversion.agreement)),
    ),
    StudyFigure(
        "conversion_similarity",
        "Similarity of a conversion to its original, before and after distilling, run by run: hidden states and next tokens.",
        *(DISTILLATION, _conversion(similarity)),
    ),
)
FIGURES = (*TIMINGS, *TRAINING, *CONVERSIONS)
"""All figures, in the order of the study."""
