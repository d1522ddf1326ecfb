"""The settings of a measurement and how they are written: in a caption ("8k tokens, batch 4"), on an axis, in prose."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from evals.results.formatting import format_setting
from evals.results.machines import MACHINE
from evals.results.schema import column_of, columns

SETTINGS = {
    "workload": "{}",
    "scope": "one {}",
    "num_layers": "{} layers",
    "batch_size": "batch {}",
    "seq_len": "{} tokens",
    "hidden_dim": "hidden {}",
    "num_heads": "{} heads",
    "dtype": "{}",
    "device": "{}",
    "threads": "{} threads",
    "processor": "{}",
    "torch": "torch {}",
}
"""Settings of a timing and the phrase that a caption writes for each, in its order."""

TRAINING_SETTINGS = {
    "task": "{}",
    "seq_len": "trained at {} tokens",
    "num_pairs": "{} pairs",
    "items": "{} items",
    "symbols": "{} symbols",
    "vocabulary": "{} tokens in the vocabulary",
    "steps": "{} steps",
    "batch_size": "batch {}",
    "num_layers": "{} layers",
    "hidden_dim": "hidden {}",
    "num_heads": "{} heads",
    "conv_size": "convolution of {}",
    "positions": "positions: {}",
    "match": "matched: {}",
    "device": "{}",
    "dtype": "{}",
    "processor": "{}",
}
"""Settings of a training run and the phrase that a caption writes for each, in its order."""

TRAINING_DETAILS = (
    *("threads", "ff_dim", "vocab_size", "warmup_fraction", "weight_decay", "grad_clip_norm", "grad_accumulation_steps"),
    *("num_eval_examples", "curriculum"),
)
"""Settings of a training run that captions leave out."""

COMPARISON_SETTINGS = (
    *("workload", "scope", "device", "dtype", "threads", "batch_size", "seq_len"),
    *("hidden_dim", "num_heads", "ff_dim", "num_layers", "vocab_size", MACHINE, "processor", "torch"),
)
"""All settings under which a timing can be compared with another; a sweep may vary further ones."""

AXIS_LABELS = {
    "seq_len": "sequence length in tokens (1k = 1024)",
    "eval_seq_len": "sequence length in tokens (1k = 1024)",
    "batch_size": "batch size",
    "hidden_dim": "hidden size",
    "head_dim": "head size",
    "num_heads": "heads",
    "num_layers": "layers",
    "chunk_size": "chunk size in tokens (1k = 1024)",
}


def setting_columns(table: pd.DataFrame, kind: str = "latency") -> list[str]:
    """The columns of all settings under which rows are compared: those in the registries above, then options that were varied.

    With match=params the feed-forward width differs between candidates, and is a setting only if it is swept.
    """
    known = (*TRAINING_SETTINGS, *TRAINING_DETAILS) if kind == "accuracy" else (*COMPARISON_SETTINGS, "limit_bytes")
    options = [str(name) for name in table if name not in columns(kind)]
    swept = {column_of(str(key), table.columns) for key in table.get("swept", pd.Series(dtype=str)).dropna()}
    matched = table.get("match", pd.Series(dtype=str)).notna().any()
    unshared = {"ff_dim"} - swept if matched else set()
    return [name for name in dict.fromkeys((*known, *swept, *options)) if name in table and name not in unshared]


def setting_name(setting: str) -> str:
    """Name of a setting in prose: num_pairs -> pairs, hidden_dim -> hidden dim, attention.a.size -> size of a."""
    *_, owner, name = ("", "", *setting.split("."))
    words = name.replace("num_", "").replace("_", " ")
    return f"{words} of {owner}" if owner else words


def setting_phrase(setting: str, value: Any) -> str:
    """A setting of a timing in words: 8k tokens, batch 4, chunk size = 64."""
    if pd.isna(value):
        return f"no {setting_name(setting)}"
    return SETTINGS.get(setting, f"{setting_name(setting)} = {{}}").format(format_setting(value))


def axis_label(setting: str) -> str:
    return AXIS_LABELS.get(setting, setting_name(setting))


def is_number(values: "pd.Series[Any]") -> bool:
    """Whether the values are numbers; booleans are not."""
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def conditions(rows: pd.DataFrame, swept: str) -> str:
    """Caption of a timing: every setting but the swept one, with a range if rows differ in it."""
    phrases = SETTINGS | {MACHINE: "on {}"}  # which merged results alone have
    present = {name: rows[name].dropna() for name in phrases if name != swept and name in rows}
    return ", ".join(phrases[name].format(format_range(values)) for name, values in present.items() if not values.empty)


def training_conditions(rows: pd.DataFrame) -> str:
    """Caption of a training: every setting that all rows share."""
    return ", ".join(
        TRAINING_SETTINGS[name].format(format_setting(rows[name].iloc[0]))
        for name in TRAINING_SETTINGS
        if name in rows and rows[name].dropna().nunique() == 1
    )


def training_phrase(setting: str, value: str) -> str:
    """A setting of a training in words, e.g. '64 pairs'; name and value if it has no phrase."""
    return TRAINING_SETTINGS.get(setting, f"{setting} {{}}").format(value)


def format_range(values: "pd.Series[Any]") -> str:
    """The value of a setting, or 'low to high' if numbers differ: the hidden size may grow with the swept head size."""
    ends = (values.min(), values.max()) if is_number(values) else (values.iloc[0],)
    return " to ".join(dict.fromkeys(map(format_setting, ends)))


def varying(rows: pd.DataFrame, settings: Iterable[str]) -> list[str]:
    """The `settings` that are columns with more than one value."""
    return [name for name in settings if name in rows and rows[name].nunique(dropna=False) > 1]


def without_machine_settings(rows: pd.DataFrame, settings: Iterable[str]) -> list[str]:
    """The `settings` without those that follow from the machine, such as its processor, where rows name their machine."""
    names = list(settings)
    if MACHINE not in names:
        return names
    machines = rows.groupby(MACHINE, dropna=False)
    return [name for name in names if name == MACHINE or machines[name].nunique(dropna=False).gt(1).any()]


def group_by(rows: pd.DataFrame, settings: list[str], *, sort: bool = True) -> "Iterable[tuple[tuple[Any, ...], pd.DataFrame]]":
    """Groups rows by the values of some settings; without settings there is one group with an empty key."""
    return rows.groupby(settings, dropna=False, sort=sort) if settings else [((), rows)]
