"""Which charts a report has, as data: the page's script draws whatever is described here."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evals.plots.style import Style, style_of
from evals.report.sources import CONTEXT, LEARNED, Part
from evals.results.settings import AXIS_LABELS, SETTINGS, is_number


@dataclass(frozen=True)
class Chart:
    """One quantity over the swept setting. unit: s, B, ×, %, or none; `ok` rows without it are left out."""

    id: str
    title: str
    y: str
    low: str = ""
    high: str = ""
    unit: str = ""
    x: str = ""  # empty: the swept setting
    log: bool = True
    only: dict[str, Any] | None = None
    """Columns that must have this value in a row; null: must be empty."""


TIMED = (
    Chart("latency", "Latency, lower is better", "latency_s", "latency_low_s", "latency_high_s", "s"),
    Chart("speedup", "Speed-up over {reference}, higher is better", "speedup", "speedup_low", "speedup_high", "×"),
    Chart("peak_memory", "Peak memory above inputs and parameters, lower is better", "peak_bytes", unit="B"),
    Chart("throughput", "Tokens per second, higher is better", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"),
    Chart("ceiling", "Part of what this machine could do, higher is better", "roofline_fraction", unit="%", log=False),
    Chart("state", "State to decode from, lower is better", "state_bytes", unit="B"),
    Chart("sent", "Sent by a rank in one call, lower is better", "sent_bytes", unit="B"),
)
WHOLE = {"depth": None, "position": None, "best": True}
TRAINED = (
    Chart("accuracy", "Accuracy, higher is better", "accuracy", "accuracy_low", "accuracy_high", log=False, only=WHOLE),
    Chart(
        "bits", "Bits per byte, lower is better", "bits_per_byte", "bits_per_byte_low", "bits_per_byte_high", log=False, only=WHOLE
    ),
    Chart("loss", "Loss in nats a target, lower is better", "loss_nats", "loss_low_nats", "loss_high_nats", only=WHOLE),
    Chart("state", "State to decode from, lower is better", "state_bytes", unit="B", only=WHOLE),
)
FITTING = (Chart("max_context", "Longest context that fits, in tokens, higher is better", "max_context"),)


def charts(part: Part) -> list[dict[str, Any]]:
    """Those that have something to show, with their axes named."""
    table = part.table
    kinds: Sequence[Chart] = {CONTEXT: FITTING, LEARNED: TRAINED}.get(part.kind, TIMED)
    references = list(table["relative_to"].dropna().unique()) if "relative_to" in table else []
    reference = str(references[0]) if len(references) == 1 else f"each set's own reference ({', '.join(references)})"
    found = []
    for chart in kinds:
        if chart.y not in table or not table[chart.y].notna().any():
            continue
        x = part.swept
        if part.kind == LEARNED and table["eval_seq_len"].nunique() > 1 and table[x].nunique() == 1:
            x = "eval_seq_len"
        described = asdict(chart) | {
            "x": x,
            "xTitle": AXIS_LABELS.get("seq_len" if x == "eval_seq_len" else x, x.replace("_", " ")),
            "place": placed(x),
            "title": chart.title.format(reference=reference),
            "ordered": is_number(table[x]) and table[x].nunique() > 1,
            "logX": is_number(table[x]) and bool((table[x] > 0).all()),
            "log": chart.log and bool((table[chart.y].dropna() > 0).all()),
        }
        if part.kind == LEARNED and x != "eval_seq_len":  # asked where it was trained
            described["same"] = ["seq_len", "eval_seq_len"]
        found.append(described)
    return found


def placed(column: str) -> str:
    """How a value of the swept setting is said: {} tokens."""
    return SETTINGS.get("seq_len" if column == "eval_seq_len" else column, f"{named(column)} {{}}")


def named(column: str) -> str:
    """A setting in words: num_pairs is number of pairs."""
    spoken = {"seq_len": "sequence length", "eval_seq_len": "sequence length", "dtype": "precision"}
    return spoken.get(column, column.replace("num_", "number of ").replace("_", " "))


# --- how attentions look --------------------------------------------------------------------------

SHAPES = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "<": "triangle-left",
    ">": "triangle-right",
}
OTHER_SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right")
DARK = "#15181d"
"""What a dark page is drawn on."""


def styles(attentions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each attention the colour on a light and on a dark page, marker, dashes and width: those of the figures."""
    chosen: dict[str, Style] = style_of(attentions)
    return {
        name: {
            "light": chosen[name].colour,
            "dark": on_dark(chosen[name].colour),
            "shape": SHAPES.get(chosen[name].marker) or OTHER_SHAPES[index % len(OTHER_SHAPES)],
            "dashes": [1.5 * length for length in chosen[name].dashes] or [1, 0],
            "width": chosen[name].width + 0.4,
        }
        for index, name in enumerate(attentions)
    }


def on_dark(colour: str) -> str:
    """The colour, mixed with as little white as makes it stand out from the dark page: a contrast of 4.5 or more."""
    channels = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    for part in range(0, 101, 5):
        mixed = [round(channel + (255 - channel) * part / 100) for channel in channels]
        if contrast(mixed, [int(DARK[start : start + 2], 16) for start in (1, 3, 5)]) >= 4.5:
            break
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def contrast(first: Sequence[int], second: Sequence[int]) -> float:
    """The ratio of two colours' luminances, as WCAG 2.2 defines it: 1 to 21."""
    least, most = sorted(map(_luminance, (first, second)))
    return (most + 0.05) / (least + 0.05)


def _luminance(colour: Sequence[int]) -> float:
    linear = [one / 255 / 12.92 if one / 255 <= 0.04045 else math.pow((one / 255 + 0.055) / 1.055, 2.4) for one in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
