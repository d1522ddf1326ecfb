"""The table of accuracies: one row per attention, setting, learning rate, evaluation length and group of targets."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from evals.results.formatting import align_columns, format_setting, format_value, wrap
from evals.results.frames import rows_by_cell, split, swept_column, swept_values
from evals.results.ledger import Record
from evals.results.metrics import ACCURACY, BITS_PER_BYTE, Metric
from evals.results.schema import columns, one_type
from evals.results.settings import setting_phrase
from evals.results.training_runs import TrainedAttention, trained_attentions
from evals.stats.intervals import mean_interval

COLUMNS = columns("accuracy")


# --- from the ledger ------------------------------------------------------------------------------


def build(records: Sequence[Record]) -> pd.DataFrame:
    """Builds the table from all records of a ledger.

    Numbers are means over seeds with the interval over them. If a seed failed there is no number, and outcome and detail
    say why. Of studies with the same settings the last one counts. Rows over all targets have no group.
    """
    rows = [row for trained in trained_attentions(records) for row in _rows(trained)]
    options = {column: None for row in rows for column in row if column not in COLUMNS}
    return one_type(pd.DataFrame(rows, columns=[*COLUMNS, *options]), "accuracy")


def _rows(trained: TrainedAttention) -> Iterator[dict[str, Any]]:
    """The rows of one attention by learning rate: one if a seed failed, else one per evaluation and group of targets."""
    study, name, runs = trained
    for rate in dict.fromkeys(run["learning_rate"] for run in runs):
        seeds = [run for run in runs if run["learning_rate"] == rate]
        row = {
            **{column: study[column] for column in ("sweep", "swept", "study", "chance")},
            "attention": name,
            **study["settings"],
            "ff_dim": study["candidates"][name]["ff_dim"] or study["settings"].get("ff_dim"),
            "learning_rate": rate,
            "best": rate == trained.best_learning_rate,
            "seeds": len(seeds),
            "outcome": "ok",
            "detail": "",
        }
        failed = next((run for run in seeds if run["outcome"] != "ok"), None)
        if failed is not None:
            seed = "" if rate is None else f"seed {failed['seed']}: "
            yield row | {"outcome": failed["outcome"], "detail": seed + failed["detail"]}
            continue
        row |= {
            "validation_loss_nats": mean_interval([run["validation_loss"] for run in seeds]).value,
            "train_s": mean_interval([run["train_s"] for run in seeds]).value,
            **{column: seeds[0][column] for column in ("parameters", "tokens")},
        }
        for evaluations in zip(*(run["evaluations"] for run in seeds), strict=True):
            yield from (row | scores for scores in _evaluation_rows(evaluations, study))


def _evaluation_rows(evaluations: Sequence[Record], study: Record) -> Iterator[dict[str, Any]]:
    """Scores at one length: over all targets, then over each group that has targets. `evaluations` has one record a seed."""
    first = evaluations[0]
    row = {"eval_seq_len": first["seq_len"], "state_bytes": first["state_bytes"]}
    groups = range(len(first["groups"]))
    yield row | _scores(evaluations, groups, study["unit"])
    if study["grouped_by"] is not None:
        for group in groups:
            if first["targets"][group]:
                yield row | {study["grouped_by"]: first["groups"][group]} | _scores(evaluations, [group], study["unit"])


def _scores(evaluations: Sequence[Record], groups: Sequence[int], unit: str) -> dict[str, Any]:
    """Accuracy and loss over the targets of some groups, with intervals over the seeds."""
    totals = [
        {column: math.fsum(evaluation[column][group] for group in groups) for column in ("targets", "right", "loss")}
        for evaluation in evaluations
    ]
    accuracy = mean_interval([total["right"] / total["targets"] for total in totals])
    loss = mean_interval([total["loss"] / total["targets"] for total in totals])
    scores = {
        "targets": int(totals[0]["targets"]),
        "accuracy": accuracy.value,
        "accuracy_low": max(accuracy.low, 0.0),
        "accuracy_high": min(accuracy.high, 1.0),
        "loss_nats": loss.value,
        "loss_low_nats": loss.low,
        "loss_high_nats": loss.high,
    }
    if unit == "byte":
        scores |= {
            "bits_per_byte": loss.value / math.log(2),
            "bits_per_byte_low": loss.low / math.log(2),
            "bits_per_byte_high": loss.high / math.log(2),
        }
    return scores


# --- selections -----------------------------------------------------------------------------------


def over_all_targets(table: pd.DataFrame) -> pd.DataFrame:
    """The rows over all targets, without those of a single group."""
    return table[table["depth"].isna() & table["position"].isna()]


def score_metric(rows: pd.DataFrame) -> Metric:
    """The metric by which a task is judged: bits per byte for text, accuracy otherwise."""
    return BITS_PER_BYTE if rows["bits_per_byte"].notna().any() else ACCURACY


# --- on the terminal ------------------------------------------------------------------------------


def render(table: pd.DataFrame) -> str:
    """Renders the scores at the best learning rates over all targets, in 80 columns.

    Attentions stand down, and the swept setting across, evaluated at the length of training. If only the evaluation length
    varies, that stands across. Rows that differ in further settings have blocks of their own. Failures follow.
    """
    whole = over_all_targets(table)
    swept = swept_column(whole)
    blocks, failures = [], []
    for settings, rows in split(whole, swept, "accuracy"):
        head = ", ".join(setting_phrase(name, value) for name, value in settings.items())
        best = rows[rows["best"] & (rows["outcome"] == "ok")]
        scores = _score_blocks(best, swept, list(dict.fromkeys(rows["attention"]))) if len(best) else []
        blocks += [*([wrap(f"--- {head} ---")] if head and scores else []), *scores]
        where = "".join(f", {name}={value}" for name, value in settings.items())
        for _, row in rows[rows["outcome"] != "ok"].iterrows():
            rate = "" if pd.isna(row["learning_rate"]) else f" at learning rate {row['learning_rate']:g}"
            failures.append(wrap(f"{row['attention']} at {swept}={row[swept]}{where}{rate}: {row['outcome']}, {row['detail']}"))
    return "\n\n".join([*blocks, *failures])


def _score_blocks(best: pd.DataFrame, swept: str, names: Sequence[str]) -> list[str]:
    across = swept if best[swept].nunique() > 1 or best["eval_seq_len"].nunique() == 1 else "eval_seq_len"
    if across == swept:
        best = best[best["eval_seq_len"] == best.groupby(swept)["eval_seq_len"].transform("min")]
    metric, cells = score_metric(best), rows_by_cell(best, across)
    columns = [
        [format_setting(value), *(format_value(cells.get((name, value)), metric) or "–" for name in names)]
        for value in swept_values(best, across)
    ]
    rates = {name: rows["learning_rate"].unique() for name, rows in best.groupby("attention")}
    columns.append(["rate", *(",".join(f"{rate:g}" for rate in rates.get(name, ())) or "–" for name in names)])
    chance = ", ".join(f"{value:.3g}" for value in best["chance"].unique())
    return [
        f"{metric.table_title()}, by {across}\n" + align_columns([across, *names], columns),
        f"chance: {chance}; ±: half of the interval over seeds",
    ]
