"""Findings on the conversion of pretrained models: what distilling gives back, and the speed of a conversion."""

from pathlib import Path

from evals.paper.findings.data import describe_optional, required_source
from evals.paper.findings.text import interval, markdown_table, write_number, write_percent
from evals.paper.sources import Source
from evals.plots.conversion import STAGES
from evals.results.settings import conditions
from evals.stats.intervals import mean_interval

GOAL = 0.8
"""The part of what converting loses that distilling is to give back."""


def conversion(results: Path) -> str:
    """Tables perplexity and agreement before and after distilling, and counts the conversions that reach the goal."""
    table = required_source(results, "distillation").table
    rows, reached = [], []
    for (model, overlap), own in table.groupby(["model", "chunk_overlap"]):
        stages = {str(stage): found for stage, found in own.groupby("stage")}
        closed = mean_interval(list(stages["distilled"]["gap_closed"]))
        reached.append(closed.value >= GOAL)
        half = f" ± {write_percent((closed.high - closed.low) / 2)}" if closed.high > closed.low else ""
        perplexities = [f"{stages[stage]['perplexity'].mean():.2f}" for stage in STAGES]
        agreed = [write_percent(stages[stage]["top_1"].mean()) for stage in ("converted", "distilled")]
        name = f"{model}, {overlap} tokens of overlap"
        rows.append([name, *perplexities, write_percent(closed.value) + half, *agreed, f"{own['seed'].nunique()}"])
    heads = ["", "original", "converted", "distilled", "came back", "top 1, converted", "top 1, distilled", "seeds"]
    goal = f"The goal, that {write_percent(GOAL)} of what converting lost comes back, is met by {sum(reached)} of {len(reached)}."
    return f"{markdown_table(heads, rows)}\n\n{goal}"


def conversion_speed(results: Path) -> str:
    """Tables the speed-up of a conversion over its original by length."""

    def describe(source: Source) -> str:
        sweep = source.first
        rows = [
            [
                f"`{name}`",
                *(
                    write_number(cell["speedup"]) + interval(cell["speedup_low"], cell["speedup_high"], write_number)
                    if cell["outcome"] == "ok"
                    else cell["outcome"]
                    for _, cell in cells.iterrows()
                ),
            ]
            for name, cells in sweep.by_attention.items()
            if name != sweep.reference
        ]
        table = markdown_table([f"speed-up over `{sweep.reference}` at", *sweep.ticks], rows)
        return f"{conditions(sweep.rows, sweep.column)}:\n\n{table}"

    return describe_optional(results, "conversion", describe)
