"""Selects among the records of training runs."""

from collections.abc import Sequence

from evals.results.ledger import Record


def best_learning_rate(runs: Sequence[Record], learning_rates: Sequence[float]) -> float | None:
    """Learning rate whose run with seed 0 has the lowest validation loss.

    Args:
        runs: records of one candidate's training runs.
        learning_rates: the rates that count; of two with the same loss, the one that comes first.

    Returns:
        The learning rate; None if no run with seed 0 has the outcome `ok`.
    """
    losses = {run["learning_rate"]: run["validation_loss"] for run in runs if run["seed"] == 0 and run["outcome"] == "ok"}
    return min((rate for rate in learning_rates if rate in losses), key=lambda rate: losses[rate], default=None)
