"""Tables of distillations, from the records of `python -m evals.distill`: `conversion`, `positions`, and a summary to print."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from evals.results.formatting import format_mean_share
from evals.results.ledger import Record
from evals.results.markup import Table
from evals.results.schema import columns

STAGES = ("original", "converted", "distilled")

SETTINGS = (
    *("chunk_size", "chunk_overlap", "chunks", "batch", "align_steps", "distil_steps", "learning_rate", "rank", "retrieval"),
    *("split", "num_eval_examples"),
)
"""Settings of a distillation that are columns of `conversion`."""


def build(records: Sequence[Record]) -> dict[str, pd.DataFrame]:
    """Builds the tables of a ledger.

    Returns:
        `conversion`, a row per run and model: its measures, and the part of the loss added by the conversion that it recovers
        (gap_closed). gap_closed_beyond is the same without the first chunk, in which a conversion equals its original.
        `positions`, the perplexity of each chunk of the context.
    """
    rows: list[dict[str, Any]] = []
    positions: list[dict[str, Any]] = []
    for record in records:
        plan, models = record["plan"], record["models"]
        teacher = plan["teacher"]
        run = {"model": teacher["model"], "seed": teacher["seed"], "context": teacher["context"]}
        run |= {name: plan[name] for name in SETTINGS}
        run |= {name: record[name] for name in ("parameters", "trained_parameters")}
        for stage, measures in models.items():
            gaps = {
                "gap_closed": _gap_closed(models, stage, lambda model: model["nats"]),
                "gap_closed_beyond": _gap_closed(models, stage, lambda model: sum(model["chunk_nats"][1:])),
            }
            rows.append({**run, "stage": stage, **measures, **gaps})
            positions += [
                {**run, "stage": stage, "position": chunk * plan["chunk_size"], "perplexity": math.exp(loss)}
                for chunk, loss in enumerate(measures["chunk_nats"])
            ]
    tables = {"conversion": rows, "positions": positions}
    return {kind: pd.DataFrame(table, columns=list(columns(kind))) for kind, table in tables.items()}


def _gap_closed(models: Record, stage: str, loss: Callable[[Record], float]) -> float:
    """Part of the loss added by the conversion that a stage recovers; NaN if none was added, as in a context of one chunk."""
    original, converted, recovered = (loss(models[name]) for name in ("original", "converted", stage))
    return (converted - recovered) / (converted - original) if converted != original else math.nan


def summarize(results: pd.DataFrame, split: str) -> Table:
    """Summarizes `conversion` for the terminal: a row per model and setting, with means over seeds.

    The gaps closed have half of their 95 % interval.
    """
    varied = [name for name in SETTINGS if name in results and results[name].nunique() > 1]
    rows = [["model", *varied, "seeds", *STAGES, "gap closed", "beyond the first chunk"]]
    for key, group in results.groupby(["model", *varied], sort=False):
        by_stage = group.groupby("stage")
        perplexities = [math.exp(by_stage.get_group(stage)["nats"].mean()) for stage in STAGES]
        distilled = by_stage.get_group("distilled")
        gaps = [format_mean_share(distilled[column]) for column in ("gap_closed", "gap_closed_beyond")]
        rows.append([*map(str, key), str(len(distilled)), *(f"{value:.3f}" for value in perplexities), *gaps])
    return Table(f"Perplexity, and how much of the loss that converting costs is recovered; windows of the {split} split", rows)
