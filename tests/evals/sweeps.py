"""Tables as a sweep writes them, in which every number is known and none is like another, and what was drawn from them."""

import itertools
import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evals.plots.registry import FIGURES
from evals.plots.style import render
from evals.results.frames import check_table, sweeps

LENGTHS = (1, 128, 1000, 8192)
THREE = ("standard", "bsbr", "linear")
NEW = ("parameter_bytes", "state_bytes", "roofline_fraction", "bound", "verdict", "match")


def table(attentions: tuple[str, ...] = THREE, lengths: tuple[int, ...] = LENGTHS) -> pd.DataFrame:
    """All columns that a figure knows; parameters are matched."""
    cells = pd.DataFrame(itertools.product(attentions, lengths), columns=["attention", "seq_len"])
    at = cells["attention"].map({name: index for index, name in enumerate(attentions, 1)}).astype(float)
    latency, speedup = at * cells["seq_len"] ** 1.1 * 1e-6, cells["seq_len"] ** 0.3 / at
    return cells.assign(
        sweep="seq_len",
        swept="shape.seq_len",
        workload="prefill",
        scope="attention",
        num_layers=math.nan,
        processor="a processor",
        torch="2.13.0",
        device="cpu",
        dtype="float32",
        threads=2,
        batch_size=1,
        hidden_dim=512,
        num_heads=8,
        outcome="ok",
        samples=30,
        rounds=3,
        relative_to=attentions[0],
        latency_s=latency,
        latency_low_s=0.9 * latency,
        latency_high_s=1.2 * latency,
        tokens_per_s=cells["seq_len"] / latency,
        tokens_per_s_low=cells["seq_len"] / latency / 1.2,
        tokens_per_s_high=cells["seq_len"] / latency / 0.9,
        speedup=speedup,
        speedup_low=0.8 * speedup,
        speedup_high=1.1 * speedup,
        peak_bytes=1000 * at * cells["seq_len"],
        parameter_bytes=2**20,
        state_bytes=3000 * at,
        roofline_fraction=0.02 * at,
        bound=np.where(cells["seq_len"] < 1000, "memory", "compute"),
        verdict=np.where(speedup > 1.5, "faster", np.where(speedup < 0.7, "slower", "ambiguous")),
        match="",
    )


def failing(results: pd.DataFrame, attention: str, length: int, outcome: str) -> pd.DataFrame:
    """The table with one cell failed, whose numbers stay: nothing may draw them."""
    cell = (results["attention"] == attention) & (results["seq_len"] == length)
    return results.assign(outcome=results["outcome"].mask(cell, outcome))


def fitted(attentions: tuple[str, ...] = THREE) -> pd.DataFrame:
    """scaling.csv of `table(attentions)`, whose latency is at · n^1.1 µs without overhead."""
    law = {"exponent": 1.1, "exponent_low": 1.05, "exponent_high": 1.16, "overhead": 0.0, "declared_exponent": 1.0}
    rows = [
        {"attention": name, "quantity": quantity, "factor": at * unit, "note": "", "agreement": "agrees", **law}
        for at, name in enumerate(attentions, 1)
        for quantity, unit in (("latency", 1e-6), ("memory", 1000.0))
    ]
    return pd.DataFrame(rows)


def crossing(*rows: tuple[str, str, float, float, float]) -> pd.DataFrame:
    """crossovers.csv."""
    return pd.DataFrame(rows, columns=["first", "second", "at", "at_low", "at_high"]).assign(note="")


def drawn(
    results: pd.DataFrame, name: str = "latency", scaling: pd.DataFrame | None = None, crossovers: pd.DataFrame | None = None
) -> Figure:
    """One figure of a table that makes a single set of figures."""
    picture = attempted(results, name, scaling, crossovers)
    assert picture is not None, f"{name} was left out"
    return picture


def attempted(
    results: pd.DataFrame, name: str, scaling: pd.DataFrame | None = None, crossovers: pd.DataFrame | None = None
) -> Figure | None:
    given = {"scaling": scaling, "crossovers": crossovers}
    fits = {kind: check_table(fit, kind) for kind, fit in given.items() if fit is not None}
    ((_, sweep),) = sweeps(check_table(results), fits)
    return render(FIGURES[name], sweep)


def line(axes: Axes, gid: str) -> Line2D:
    (found,) = [line for line in axes.lines if line.get_gid() == gid]
    return found


def legend(axes: Axes) -> list[str]:
    """The texts of the legend, from top to bottom."""
    found = axes.get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def data(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = line.get_xdata(), line.get_ydata()
    return np.asarray(x, float).tolist(), np.asarray(y, float).tolist()


def words(picture: Figure) -> str:
    """All that a figure says, but for its ticks and keys."""
    titles = [axes.get_title(loc="left") for axes in picture.axes]
    texts = [text.get_text() for text in [*picture.texts, *(text for axes in picture.axes for text in axes.texts)]]
    return "\n".join([*texts, *titles])
