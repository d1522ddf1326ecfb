"""The false-alarm rate of the guard, `evals.compare --base`: unchanged code is compared with itself, again and again."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from evals.benchmark.interleave import measure
from evals.errors import UsageError
from evals.results.cells import read_cells
from evals.results.compare import compare_cells
from evals.results.compare_table import regressions

RUNS = Path("results/validate/guard.csv")
"""The cells of all runs, with the number of the run, its false alarms and the load of the machine."""

SMALL = ("sweep=seq_len", "attention=[standard,bsbr]", "model.hidden_dim=64", "sampling.time_slices=8")
"""The smallest comparison of two attentions, of some seconds; settings of the user come behind it."""
FIRST_LENGTH, ROUNDS, THRESHOLD = 200, 6, 0.05
PER_COMMAND = 10
"""Runs that one command measures, one after another: to start it takes longer than to measure."""

MOST_ALARMS = 0.04
"""Largest share of runs of unchanged code that may find a regression: 2 of 50."""


def guard(numbers: range, overrides: Sequence[str]) -> bool:
    """Compares this commit with itself: at most `MOST_ALARMS` of the runs find a regression.

    A run is one comparison in rounds of its own, judged as the guard judges it alone. The rows of each run are added to `RUNS`, so
    that runs can be made in parts; all that it holds are counted.

    Args:
        numbers: one run each; the number decides its sequence length.
        overrides: settings of the config, such as `device.threads=1`.

    Raises:
        UsageError: if the code is not that of the last commit.
    """
    if subprocess.run(["git", "diff", "--quiet", "HEAD"], check=False).returncode:
        raise UsageError("the working tree differs from its last commit: commit the changes, so that unchanged code is measured")
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(numbers), PER_COMMAND):
        lengths = [FIRST_LENGTH + number for number in numbers[start : start + PER_COMMAND]]
        swept = f"shape.seq_len={','.join(map(str, lengths))}"
        sides = [read_cells(folder) for folder in measure("HEAD", [*SMALL, swept, *overrides], ROUNDS)]
        for length in lengths:
            rows = compare_cells(*([cell for cell in side if cell.settings["seq_len"] == length] for side in sides))
            alarms = regressions(rows, THRESHOLD)
            rows = rows.assign(run=length - FIRST_LENGTH, false_alarms="; ".join(alarms), load_1m=os.getloadavg()[0])
            rows.to_csv(RUNS, mode="a", index=False, header=not RUNS.exists())
            changes = ", ".join(f"{row['attention']} {1 / row['ratio'] - 1:+.1%} {row['verdict']}" for _, row in rows.iterrows())
            print(f"guard {length - FIRST_LENGTH}: {'; '.join([changes, *alarms])}", flush=True)
    return _summarise(pd.read_csv(RUNS))


def _summarise(cells: pd.DataFrame) -> bool:
    """Prints how many runs found a regression; returns whether they are few enough."""
    runs, alarms = (table["run"].nunique() for table in (cells, cells[cells["false_alarms"].notna()]))
    called = cells.loc[cells["verdict"].isin(["faster", "slower"]), "run"].nunique()
    print(f"guard: {alarms} of {runs} runs of unchanged code find a regression (at most {MOST_ALARMS * runs:.0f})")
    print(f"guard: in {called} of {runs} a cell is called faster or slower")
    return bool(alarms <= MOST_ALARMS * runs)
