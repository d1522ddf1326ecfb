"""The longest context of each attention within a memory limit."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from evals.plots.layout import name_rows, new_figure, scale_log
from evals.plots.style import GREY, style_of
from evals.results.formatting import format_estimate, format_setting
from evals.results.metrics import BYTES
from evals.results.settings import conditions


def max_context_plot(rows: pd.DataFrame) -> Figure:
    """Draws a point for each row, an attention of a max_context table, with the outcome at the next length; longest first."""
    rows = rows.sort_values("max_context", ascending=False, kind="stable", na_position="last")
    names, lengths = [str(name) for name in rows["attention"]], rows["max_context"].fillna(0).to_numpy(float)
    limits = rows["limit_bytes"].dropna().unique()
    limit = BYTES.format(float(limits[0])) if len(limits) == 1 else "the memory limit"
    note = f"everything counted: parameters, inputs, what the workload prepares, and its peak; at most {limit}"
    title = f"Longest context within {limit}, longer is better"
    figure = new_figure(title, [conditions(rows, "seq_len"), note], 0.6 + 0.24 * len(names))
    axes = figure.subplots()
    known = lengths[lengths > 0]
    least, most = (known.min(), known.max()) if len(known) else (1.0, 2.0)
    axes.set_xlim(least / 2, most * (2 * most / least) ** 0.35)  # leaves room for the words behind the points
    scale_log(axes.xaxis, 2, format_setting)
    styles = style_of(names)
    name_rows(axes, names, styles)
    for row, (name, length, (_, result)) in enumerate(zip(names, lengths, rows.iterrows(), strict=True)):
        if length > 0:
            axes.plot([length], [row], gid=name, **styles[name].line(discrete=True))
        text: dict[str, Any] = {"size": 6.5, "color": GREY, "va": "center", "textcoords": "offset points"}
        axes.annotate(_describe(result), (length or axes.get_xlim()[0], row), (7, 0), **text)
    axes.set_xlabel("tokens (1k = 1024)")
    return figure


def _describe(row: "pd.Series[Any]") -> str:
    """The longest context and the outcome at the next length, or the outcome if nothing fits."""
    if not row["max_context"] > 0:
        return f"none ({row['outcome']})"
    after = f"; {row['next_outcome']} at {format_estimate(float(row['next_seq_len']))}" if row["next_seq_len"] > 0 else ""
    return format_estimate(float(row["max_context"])) + after
