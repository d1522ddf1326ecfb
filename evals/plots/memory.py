"""The parts of memory: parameters, activations and decoding state of each attention, stacked."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from evals.plots.descriptions import subtitle
from evals.plots.layout import BESIDE, name_rows, new_figure
from evals.plots.style import FAILURES, GREY, PARTS, style_of
from evals.results.frames import Sweep
from evals.results.metrics import BYTES

COLUMNS = {"parameters": "parameter_bytes", "activations": "peak_bytes", "state": "state_bytes"}


def representatives(sweep: Sweep) -> list[int]:
    """The indices of up to three settings: the least, the middle and the greatest; the first three without an order."""
    last = len(sweep.values) - 1
    return sorted({0, last // 2 if last % 2 == 0 else (last + 1) // 2, last}) if sweep.ordered else list(range(min(last + 1, 3)))


def memory_split(sweep: Sweep) -> Figure | None:
    """Draws stacked bars of parameters, activations and state at up to three settings.

    Returns:
        None if a part is unknown in all rows.
    """
    if any(not sweep.rows[column].gt(0).any() for column in COLUMNS.values()):
        return None
    names, settings = list(sweep.by_attention), representatives(sweep)
    decodes = set(sweep.rows["workload"]) == {"decode"}
    note = "" if decodes else "activations: the peak above inputs and parameters; state: what decoding would keep, not held here"
    scale = "each panel has a scale of its own" if len(settings) > 1 else ""
    figure = new_figure(
        "Parts of memory, lower is better", subtitle(sweep, "; ".join(filter(None, (note, scale)))), 0.75 + 0.2 * len(names)
    )
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for axes, at in zip(panels, settings, strict=True):
        cells = pd.DataFrame({name: sweep.by_attention[name].iloc[at] for name in names}).T
        parts = cells[list(COLUMNS.values())].astype(float).set_axis(list(COLUMNS), axis=1)
        unit, suffix = max((step for step in BYTES.steps if step[0] <= parts.sum(axis=1).max()), default=BYTES.steps[0])
        bars = (parts / unit).plot.barh
        bars(stacked=True, ax=axes, color=list(PARTS.values()), edgecolor=GREY, linewidth=0.4, width=0.7, legend=False)
        for row, (_, cell) in enumerate(cells.iterrows()):
            end = (parts.iloc[row].sum() / unit, row)
            axes.annotate(_describe_unknown(cell), end, (4, 0), textcoords="offset points", size=6.5, color=GREY, va="center")
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.grid(visible=False, axis="y")
        axes.set(title=sweep.at(at), xlabel=f"memory in{suffix}")
    name_rows(panels[0], names, style_of(names))
    keys = [Patch(facecolor=colour, edgecolor=GREY, linewidth=0.4, label=part) for part, colour in PARTS.items()]
    panels[-1].legend(handles=keys, **BESIDE)
    return figure


def _describe_unknown(cell: "pd.Series[Any]") -> str:
    """Explains why a bar is not complete: the outcome, or the parts that were not measured."""
    missing = [part for part, column in COLUMNS.items() if pd.isna(cell[column])]
    if cell["outcome"] in FAILURES:
        return str(cell["outcome"])
    return "not measured" if len(missing) == len(COLUMNS) else f"{', '.join(missing)}: unknown" if missing else ""
