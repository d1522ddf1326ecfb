"""The table of training curves: one row per point of the loss curve of one training run."""

from collections.abc import Sequence

import pandas as pd

from evals.results.ledger import Record
from evals.results.schema import column_of, columns, one_type
from evals.results.training_runs import trained_attentions

COLUMNS = columns("curves")


def build(records: Sequence[Record]) -> pd.DataFrame:
    """Builds the table from all records of a ledger.

    A point is the mean loss of the steps since the point before. The varied settings are the last columns.
    """
    rows = []
    swept: dict[str, None] = {}
    for trained in trained_attentions(records):
        study, settings = trained.study, trained.study["settings"]
        varied = study.get("varied", [] if study["swept"] is None else [column_of(study["swept"], settings)])
        option = {column: settings[column] for column in varied}
        swept |= dict.fromkeys(option)
        for run in trained.runs:
            row = {"sweep": study["sweep"], "swept": study["swept"], "attention": trained.name, "seed": run["seed"], **option}
            row |= {"learning_rate": run["learning_rate"], "best": run["learning_rate"] == trained.best_learning_rate}
            for step, loss in run.get("curve", []):
                rows.append(row | {"step": step, "tokens": step * settings["batch_size"] * settings["seq_len"], "loss_nats": loss})
    return one_type(pd.DataFrame(rows, columns=[*COLUMNS, *swept]), "curves")
