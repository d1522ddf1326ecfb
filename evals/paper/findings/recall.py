"""Findings on recall, retrieval, length extrapolation, needles and language modelling."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from evals.paper.findings.data import describe_optional
from evals.paper.findings.text import markdown_table, write_bytes
from evals.paper.sources import Source
from evals.plots.accuracy import AccuracySweep
from evals.plots.heatmap import format_ratio
from evals.results.formatting import format_setting
from evals.results.settings import setting_name


def recall(results: Path) -> str:
    """Tables accuracy by the number of pairs."""
    return describe_optional(results, "recall", _accuracies)


def recall_wider(results: Path) -> str:
    """Tables accuracy in longer sequences at twice the width."""
    return "\n\n".join(describe_optional(results, data, _accuracies) for data in ("recall_256", "recall_512"))


def recall_sizes(results: Path) -> str:
    """Tables accuracy by the size of the model."""
    return describe_optional(results, "recall_sizes", _accuracies)


def retrieval(results: Path) -> str:
    """Tables the accuracy of forms of BSBR's retrieval."""
    return describe_optional(results, "retrieval", _accuracies)


def retrieval_length(results: Path) -> str:
    """Tables the accuracy of forms of BSBR's retrieval by length."""
    return describe_optional(results, "retrieval_needle", lambda source: _by_length(source, "accuracy"))


def extrapolation(results: Path) -> str:
    """Tables accuracy at lengths that were not trained at."""
    return describe_optional(results, "length_extrapolation", lambda source: _by_length(source, "accuracy"))


def needle(results: Path) -> str:
    """Tables the accuracy of finding a needle by length."""
    return describe_optional(results, "needle", lambda source: _by_length(source, "accuracy"))


def language(results: Path) -> str:
    """Tables bits per byte by length."""
    return describe_optional(results, "language_modeling", lambda source: _by_length(source, "bits_per_byte"))


def _accuracies(source: Source) -> str:
    """Accuracy at each value of the swept setting, the best at the last value first, and the decoding state.

    The state has columns of its own if it is the same at all values, else it stands beside each accuracy.
    """
    sweep: AccuracySweep = source.first
    trained, swept = sweep.trained, sweep.swept
    constant = trained.groupby("attention")["state_bytes"].nunique().max() == 1
    by_value = {(row["attention"], row[swept]): row for _, row in trained.iterrows()}
    values = sorted(trained[swept].unique())
    last = sweep.at_last(trained).sort_values("accuracy", ascending=False, kind="stable").set_index("attention")
    states = last["state_bytes"]
    reference = states.get(next((name for name in ("standard", *states.index) if name in states.index), ""), math.nan)

    def describe(name: str, value: Any) -> str:
        row = by_value.get((name, value))
        if row is None:
            return ""
        return _mean(row, "accuracy") if constant else f"{_mean(row, 'accuracy')}, {write_bytes(row['state_bytes'])}"

    rows = []
    for name in last.index:
        state = [write_bytes(states[name]), format_ratio(states[name] / reference)] if constant else []
        rows.append([f"`{name}`", *(describe(name, value) for value in values), *state])
    heads = [f"{setting_name(swept)} {format_setting(value)}" for value in values] if len(values) > 1 else ["accuracy"]
    return f"{_sentence(sweep, trained)}\n\n{markdown_table(['', *heads, *(['state', 'of standard'] if constant else [])], rows)}"


def _by_length(source: Source, column: str) -> str:
    """A column at each length of evaluation, for the last value of the swept setting."""
    sweep: AccuracySweep = source.first
    evaluated = sweep.at_last(sweep.whole)
    lengths = sorted(evaluated["eval_seq_len"].unique())
    rows = []
    for name, rows_at in evaluated.groupby("attention", sort=False):
        at = {row["eval_seq_len"]: row for _, row in rows_at.iterrows()}
        rows.append([f"`{name}`", *(_mean(at[length], column) if length in at else "" for length in lengths)])
    heads = [f"{column.replace('_', ' ')} at", *map(format_setting, lengths)]
    return f"{_sentence(sweep, evaluated)}\n\n{markdown_table(heads, rows)}"


def _mean(row: "pd.Series[Any]", column: str) -> str:
    """The mean over seeds and half of its interval."""
    value, low, high = (row[name] for name in (column, f"{column}_low", f"{column}_high"))
    return f"{value:.3f}{f' ± {(high - low) / 2:.2g}' if high > low else ''}"


def _sentence(sweep: AccuracySweep, rows: pd.DataFrame) -> str:
    return f"{'; '.join(line for line in sweep.subtitle(rows) if line)}:"
