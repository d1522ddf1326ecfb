"""The false-alarm rate of the guard: `evals.compare --base HEAD` of unchanged code, again and again."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from evals.errors import UsageError

RUNS = Path("results/validate/guard.csv")
"""The cells of all runs, with the number of the run, the exit code of the guard and the load of the machine."""

SMALL = ("--rounds=6", "attention=[standard,bsbr]", "shape.seq_len=256", "model.hidden_dim=64", "sampling.time_slices=6")
"""The smallest sweep of two attentions, of a few seconds; settings of the user come behind it."""

MOST_ALARMS = 0.04
"""Largest share of runs of unchanged code that may end with a regression: 2 of 50."""


def guard(numbers: range, overrides: Sequence[str]) -> bool:
    """Runs the guard on unchanged code: at most `MOST_ALARMS` of the runs end with a regression.

    The rows of each run are added to `RUNS`, so that the runs can be made in parts; all that it holds are counted.

    Args:
        numbers: one run each.
        overrides: settings of the config, such as `device.threads=1`.

    Raises:
        UsageError: if the code is not that of the last commit, or a run could not be made.
    """
    if subprocess.run(["git", "diff", "--quiet", "HEAD"], check=False).returncode:
        raise UsageError("the working tree differs from its last commit: commit the changes, so that unchanged code is measured")
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    rows_of_run = RUNS.with_name("guard_run.csv")
    for number in tqdm(numbers, desc="guard", disable=None):
        command = [sys.executable, "-m", "evals.compare", "--base", "HEAD", "--csv", str(rows_of_run), *SMALL, *overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise UsageError(f"run {number} could not be made: {done.stderr.strip().splitlines()[-1]}")
        rows = pd.read_csv(rows_of_run).assign(run=number, exit_code=done.returncode, load_1m=os.getloadavg()[0])
        rows.to_csv(RUNS, mode="a", index=False, header=not RUNS.exists())
        changes = ", ".join(f"{row['attention']} {1 / row['ratio'] - 1:+.1%} {row['verdict']}" for _, row in rows.iterrows())
        tqdm.write(f"guard {number}: {changes}{'; false alarm' * done.returncode}")
    rows_of_run.unlink(missing_ok=True)
    cells = pd.read_csv(RUNS)
    count, alarms = cells["run"].nunique(), cells.loc[cells["exit_code"] == 1, "run"].nunique()
    called = cells.loc[cells["verdict"].isin(["faster", "slower"]), "run"].nunique()
    print(f"guard: {alarms} of {count} runs of unchanged code end with a regression (at most {MOST_ALARMS * count:.0f})")
    print(f"guard: in {called} of {count} a cell is called faster or slower")
    return alarms <= MOST_ALARMS * count
