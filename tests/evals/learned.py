"""Tables as a study writes them, in which every number is known, and beside every best rate is one that must not be shown."""

import itertools
import math

import numpy as np
import pandas as pd

NAMES = ("standard", "bsbr", "linear")


def recalled(grouped_by: str | None = None, places: tuple[int, ...] = (4, 8, 16), lengths: tuple[int, ...] = (64,)) -> pd.DataFrame:
    """Results in which no number is like another; beside every best rate one that must not be shown."""
    groups = {None: (math.nan,), "depth": (math.nan, 0.0, 0.5, 1.0), "position": (math.nan, 1.0, 2.0, 4.0)}[grouped_by]
    cells = itertools.product(NAMES, places, lengths, groups, (True, False))
    rows = pd.DataFrame(cells, columns=["attention", "num_pairs", "eval_seq_len", "group", "best"])
    value = np.where(rows["best"], (np.arange(len(rows)) % 97 + 1) / 100, 0.999)
    bits = 8 * value if grouped_by == "position" else math.nan
    return rows.drop(columns="group").assign(
        **{name: rows["group"] if name == grouped_by else math.nan for name in ("depth", "position")},
        swept="task.num_pairs",
        outcome="ok",
        task="MQAR",
        seq_len=64,
        learning_rate=0.01,
        seeds=2,
        chance=0.1,
        state_bytes=1000.0 * rows["attention"].map({name: index for index, name in enumerate(NAMES, 1)}),
        accuracy=value,
        accuracy_low=value - 0.01,
        accuracy_high=value + 0.01,
        bits_per_byte=bits,
        bits_per_byte_low=bits,
        bits_per_byte_high=bits,
    )


def losses() -> pd.DataFrame:
    cells = itertools.product(NAMES, (4, 16), (True, False), (0, 1), range(1, 21))
    points = pd.DataFrame(cells, columns=["attention", "num_pairs", "best", "seed", "step"])
    return points.assign(loss_nats=np.where(points["best"], 5.0 / points["step"], 1e6))


def sized(rows: pd.DataFrame) -> pd.DataFrame:
    """The same as if the models' width had been swept, and the state grew with it."""
    rows = rows.rename(columns={"num_pairs": "hidden_dim"}).assign(swept="model.hidden_dim")
    return rows.assign(state_bytes=rows["state_bytes"] * rows["hidden_dim"])
