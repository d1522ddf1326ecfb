"""Distributed training: two processes train the same run as one, into the same ledger."""

import subprocess
import sys
from pathlib import Path

import pytest

from evals import run, train_distributed
from evals.paths import ROOT
from evals.results.ledger import Ledger, Record
from tests.evals.commands import call

pytestmark = pytest.mark.xdist_group("train_ranks")
SMALL = (
    *("task=mqar", "task.vocabulary=32", "task.num_pairs=3", "attention=[standard]", "shape.seq_len=16", "shape.batch_size=6"),
    *("model.scope=model", "model.hidden_dim=16", "model.num_heads=2", "model.ff_dim=32", "device.threads=1"),
    *(
        "training.steps=20",
        "training.num_eval_examples=20",
        "training.seeds=1",
        "training.learning_rates=[1e-3]",
        "training.grad_accumulation_steps=2",
    ),
)


def arguments(folder: Path) -> list[str]:
    return [f"results_dir={folder / 'results'}", f"plots_dir={folder / 'plots'}", *SMALL]


def trained_run(folder: Path, done: subprocess.CompletedProcess[str]) -> Record:
    assert done.returncode == 0, done.stderr
    (run,) = [record for record in Ledger(folder / "results" / "single" / "samples.jsonl").read()[0] if record["kind"] == "run"]
    return run


def test_two_processes_train_the_same_run_as_one(tmp_path: Path) -> None:
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "evals.train_distributed")
    command = [sys.executable, "-m", *torchrun, *arguments(tmp_path / "shared")]
    shared = trained_run(tmp_path / "shared", subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False))
    alone = trained_run(tmp_path / "alone", call(run.main, *arguments(tmp_path / "alone")))
    assert (shared["outcome"], shared["ranks"]) == ("ok", 2)
    assert shared["run"] == alone["run"]
    for (step, loss), (other, same) in zip(shared["curve"], alone["curve"], strict=True):
        assert step == other
        assert loss == pytest.approx(same, rel=1e-4)
    assert shared["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-4)
    # evals.run makes the table of both, and has nothing left to train.
    assert trained_run(tmp_path / "shared", call(run.main, *arguments(tmp_path / "shared"))) == shared


def test_without_torchrun_it_says_how_to_start_it() -> None:
    done = call(train_distributed.main)
    assert done.returncode == 2
    assert done.stderr.startswith("start it with torchrun")
    assert done.stderr.count("\n") == 1
