"""Selects among the records of training runs: the runs that count, and the learning rate that is reported."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from evals.results.ledger import Record


class TrainedAttention(NamedTuple):
    """One attention under the settings of one study, and its training runs in the order of the ledger."""

    study: Record
    name: str
    runs: list[Record]

    @property
    def best_learning_rate(self) -> float | None:
        return best_learning_rate(self.runs, self.study["learning_rates"])


def trained_attentions(records: Sequence[Record]) -> list[TrainedAttention]:
    """Selects, from all records of a ledger, the last study that trained each attention under each setting, or was lost.

    Returns:
        The attentions that have a run, in the order in which their studies were last begun. If a study was lost before any
        run, the only run of its attentions has the outcome `lost`.
    """
    runs: dict[str, list[Record]] = defaultdict(list)
    losses: dict[str, str] = {}
    for record in records:
        if record.get("kind") == "run":
            runs[record["run"]].append(record)
        elif record.get("kind") == "lost" and "study" in record:
            losses[record["study"]] = record["detail"]
    last: dict[tuple[str, str], Record] = {}
    for study in _studies(records):
        for name in study["candidates"]:
            cell = name, json.dumps(study["settings"], sort_keys=True)
            if cell not in last or study["runs"][name] in runs or study["study"] in losses:
                last.pop(cell, None)
                last[cell] = study
    trained = []
    for (name, _), study in last.items():
        attempts = runs.get(study["runs"][name], [])
        # A run without a learning rate did not train; an attention that was uncertified then may be certified since.
        counting = [run for run in attempts if run["learning_rate"] is not None] or attempts
        if not counting and study["study"] in losses:
            counting = [{"learning_rate": None, "seed": 0, "outcome": "lost", "detail": losses[study["study"]]}]
        if counting:
            trained.append(TrainedAttention(study, name, counting))
    return trained


def _studies(records: Sequence[Record]) -> Iterator[Record]:
    """The descriptions of studies; a study may have been lost before it was described."""
    for record in records:
        described = record["described"] if record.get("kind") == "lost" and "study" in record else record
        if described.get("kind") == "study":
            yield described


def best_learning_rate(runs: Sequence[Record], learning_rates: Sequence[float]) -> float | None:
    """The learning rate with the lowest validation loss of seed 0; None if no run of one candidate with seed 0 is `ok`.

    Of two rates with the same loss, the first in `learning_rates` counts.
    """
    losses = {run["learning_rate"]: run["validation_loss"] for run in runs if run["seed"] == 0 and run["outcome"] == "ok"}
    return min((rate for rate in learning_rates if rate in losses), key=lambda rate: losses[rate], default=None)
