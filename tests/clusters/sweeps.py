"""A sweep on a cluster that loses a node on the way, for the tests of each kind of cluster."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from evals.paths import ROOT
from evals.results.ledger import Ledger, Record

LONG = pytest.mark.skipif("BSBR_CLUSTERS" not in os.environ, reason="NOT TESTED: takes minutes; `make clusters` does it")

SMALL = (
    *("sweep=seq_len", "shape.seq_len=60,129", "attention=[standard,linear]", "model.hidden_dim=32", "model.num_heads=2"),
    *("device.threads=1", "sampling=quick", "sampling.budget_s=6", "sampling.target_rel_interval=1e-6", "sampling.time_slices=3"),
)
"""Two comparisons that take some seconds each, so that there is time to lose a node in."""


@dataclass
class Sweep:
    """The command, as it runs in `folder`."""

    folder: Path
    process: "subprocess.Popen[str]"

    def records(self, kind: str) -> list[Record]:
        records, damaged = Ledger(self.folder / "results" / "seq_len" / "samples.jsonl").read()
        assert not damaged
        return [record for record in records if record["kind"] == kind]

    def wait_for(self, what: Callable[[], object], limit_s: float = 120) -> None:
        """Until `what` is true. Fails with what the command said if that ends before."""
        tick = threading.Event()
        for _ in range(int(limit_s / 0.2)):
            if what():
                return
            assert self.process.poll() is None, self.process.communicate()
            tick.wait(0.2)
        self.process.kill()
        raise AssertionError(f"did not come about in {limit_s:g} s; the command said {self.process.communicate()}")

    def end(self, code: int = 0, limit_s: float = 240) -> tuple[str, pd.DataFrame]:
        """What it said, and its table, after it ended with this code."""
        said, complaints = self.process.communicate(timeout=limit_s)
        assert self.process.returncode == code, complaints
        return said + complaints, pd.read_csv(self.folder / "results" / "seq_len" / "results.csv")


def sweep(folder: Path, environment: dict[str, str], *arguments: str) -> Sweep:
    places = (f"results_dir={folder / 'results'}", f"plots_dir={folder / 'plots'}")
    command = [sys.executable, "-m", "evals.run", *places, *SMALL, *arguments]
    pipe = subprocess.PIPE
    return Sweep(folder, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True))
