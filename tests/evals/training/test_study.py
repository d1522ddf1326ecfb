"""Training as a user runs it: every task is learned, every run is a row, and killed runs continue."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from evals import run
from evals.benchmark.certificates import Certificates
from evals.cli.jobs import read_job
from evals.config import Comparison, Training
from evals.paths import CONF, ROOT
from evals.results import accuracy_table
from evals.results.ledger import Ledger
from evals.results.training_runs import best_learning_rate
from evals.training.study import Study, next_run
from evals.training.tasks.build import build_task
from evals.training.tasks.corpus import load_corpus
from evals.training.trainer import train
from tests.evals.commands import call

pytestmark = pytest.mark.xdist_group("study")
TINY = (
    *("model.scope=model", "model.hidden_dim=32", "model.num_heads=1", "model.ff_dim=64", "model.conv_size=3", "device.threads=1"),
    *("shape.batch_size=32", "attention=[standard]", "training.num_eval_examples=200"),
)

# --- every task is learned ----------------------------------------------------------------------


def compose_comparison(*overrides: str) -> Comparison:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return read_job(compose("config", [*TINY, *overrides]))


def train_and_evaluate(checkpoint_path: Path, *overrides: str) -> dict[str, Any]:
    """Trains one candidate; returns its evaluation at the first length."""
    comparison = compose_comparison(*overrides)
    *_, run = train(comparison, comparison.candidates[0], build_task(comparison), 1e-2, 0, checkpoint_path)
    assert isinstance(run, dict)
    assert run["outcome"] == "ok"
    first: dict[str, Any] = run["evaluations"][0]
    return first


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("mqar", ("task.num_pairs=3", "task.vocabulary=32", "shape.seq_len=24", "training.steps=200")),
        ("copy", ("task.symbols=8", "shape.seq_len=16", "training.steps=200")),
        ("copy", ("task.symbols=8", "shape.seq_len=16", "training.steps=300", "attention=[bsbr]", "attention.bsbr.chunk_size=4")),
        ("selective_copy", ("task.items=4", "task.symbols=8", "shape.seq_len=12", "training.steps=350")),
        ("induction", ("task.symbols=8", "shape.seq_len=16", "training.steps=120")),
        ("needle", ("task.num_pairs=2", "task.symbols=8", "task.depths=3", "shape.seq_len=16", "training.steps=200")),
    ],
)
def test_a_task_is_learned_far_beyond_chance(task: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    evaluation = train_and_evaluate(tmp_path / "run.safetensors", f"task={task}", *overrides)
    chance = build_task(compose_comparison(f"task={task}", *overrides)).chance
    accuracy = np.divide(evaluation["right"], evaluation["targets"])
    # In every group: a needle is found at every depth.
    assert accuracy.min() > chance + 0.7 * (1 - chance)


def test_bytes_are_learned_beyond_their_frequencies(tmp_path: Path) -> None:
    evaluation = train_and_evaluate(
        tmp_path / "run.safetensors", "task=language_modeling", "shape.seq_len=64", "training.steps=250"
    )
    text = load_corpus().splits["test"]
    frequencies = np.bincount(text, minlength=256) / len(text)
    entropy = -sum(p * np.log(p) for p in frequencies if p)  # no model of single bytes can go below it
    loss = sum(evaluation["loss"]) / sum(evaluation["targets"])
    assert loss < 0.85 * entropy
    assert sum(evaluation["targets"]) == 200 * 64
    # Context helps: the first byte has none.
    assert evaluation["loss"][0] / evaluation["targets"][0] > 1.2 * loss


# --- the plan of runs ---------------------------------------------------------------------------


def record_of(rate: float, seed: int, loss: float, outcome: str = "ok") -> dict[str, Any]:
    return {"learning_rate": rate, "seed": seed, "outcome": outcome, "validation_loss": loss}


def test_every_learning_rate_has_one_run_and_the_best_has_all_seeds() -> None:
    training = Training(1, (0.1, 0.2, 0.3), 3, 0, 0, 1, 1, 1, (1,), (1,), 0)
    losses = {0.1: 3.0, 0.2: 1.0, 0.3: 2.0}
    runs: list[dict[str, Any]] = []
    while (planned := next_run(runs, training)) is not None:
        # The losses of later seeds do not change which rate is best.
        runs.append(record_of(*planned, losses[planned[0]] if planned[1] == 0 else 9.0))
    assert [(one["learning_rate"], one["seed"]) for one in runs] == [(0.1, 0), (0.2, 0), (0.3, 0), (0.2, 1), (0.2, 2)]
    assert best_learning_rate(runs, training.learning_rates) == 0.2


def test_a_learning_rate_that_diverged_is_not_the_best() -> None:
    training = Training(1, (0.1, 0.2), 2, 0, 0, 1, 1, 1, (1,), (1,), 0)
    failed = record_of(0.2, 0, 0.0, "diverged")
    assert next_run([record_of(0.1, 0, 5.0), failed], training) == (0.1, 1)
    assert next_run([record_of(0.1, 0, 0.0, "oom"), failed], training) is None


# --- the command --------------------------------------------------------------------------------

OVERRIDES = (
    *("sweep=recall", "block=8", "model.hidden_dim=32", "model.num_heads=1", "model.ff_dim=64", "device.threads=1"),
    *("attention=[standard,linear]", "task.vocabulary=32", "task.num_pairs=2,4", "shape.seq_len=16", "shape.batch_size=16"),
    *("training.steps=60", "training.num_eval_examples=50", "training.seeds=2", "training.learning_rates=[1e-3,1e-2]"),
    "training.eval_length_multiples=[1,2]",
)


def arguments_for(folder: Path, *arguments: str) -> list[str]:
    return [f"results_dir={folder / 'results'}", f"plots_dir={folder / 'plots'}", *OVERRIDES, *arguments]


def table(folder: Path, name: str = "results") -> pd.DataFrame:
    return pd.read_csv(folder / "results" / "recall" / f"{name}.csv")


def runs(folder: Path) -> list[dict[str, Any]]:
    return [one for one in Ledger(folder / "results" / "recall" / "samples.jsonl").read()[0] if one["kind"] == "run"]


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("study")
    completed = call(run.main, *arguments_for(folder))
    assert (completed.returncode, completed.stderr) == (0, "")
    return folder, completed.stdout


def test_every_learning_rate_is_a_row_and_the_best_has_an_interval_over_seeds(finished_sweep: tuple[Path, str]) -> None:
    folder, _ = finished_sweep
    rows = table(folder)
    assert (rows["outcome"] == "ok").all()
    assert len(rows) == 2 * 2 * 2 * 2  # attentions, numbers of pairs, learning rates, lengths
    for _, own in rows.groupby(["attention", "num_pairs", "eval_seq_len"]):
        best, other = own[own["best"]], own[~own["best"]]
        assert (len(best), len(other)) == (1, 1)
        assert (best["seeds"].item(), other["seeds"].item()) == (2, 1)
        assert best["accuracy_low"].item() <= best["accuracy"].item() <= best["accuracy_high"].item()
        assert other["accuracy_low"].isna().all()
    # The interval is Student's t over the two seeds.
    row = rows[rows["best"] & (rows["attention"] == "linear") & (rows["num_pairs"] == 4) & (rows["eval_seq_len"] == 16)].iloc[0]
    seeds = [
        sum(one["evaluations"][0]["loss"]) / sum(one["evaluations"][0]["targets"])
        for one in runs(folder)
        if one["attention"] == "linear"
        and one["learning_rate"] == row["learning_rate"]
        and one["evaluations"][0]["targets"] == [200.0]
    ]
    assert len(seeds) == 2
    assert row["loss_nats"] == pytest.approx(np.mean(seeds))
    assert row["loss_high_nats"] - row["loss_nats"] == pytest.approx(12.706 * abs(seeds[0] - seeds[1]) / 2, rel=1e-3)


def test_all_candidates_have_the_same_data_and_numbers_of_parameters(finished_sweep: tuple[Path, str]) -> None:
    rows = table(finished_sweep[0])
    assert rows["parameters"].max() <= 1.01 * rows["parameters"].min()
    assert (rows["tokens"] == 60 * 16 * 16).all()
    assert rows.groupby("num_pairs")["chance"].first().tolist() == [1 / 2, 1 / 4]
    state = rows.set_index(["attention", "eval_seq_len"])["state_bytes"]
    assert state["standard", 32].iloc[0] == 2 * state["standard", 16].iloc[0] == 2 * 2 * 4 * 2 * 16 * 32
    curves = table(finished_sweep[0], "curves")
    assert len(curves) == 2 * 2 * 3 * 60
    first = curves[(curves["step"] == 1) & (curves["seed"] == 0) & (curves["num_pairs"] == 2)]
    assert first.groupby("attention")["loss_nats"].nunique().tolist() == [1, 1]  # no step has been taken yet


def test_it_prints_the_results_and_draws_them(finished_sweep: tuple[Path, str]) -> None:
    folder, output = finished_sweep
    assert len(re.findall(r"^  (standard|linear) +rate \S+, seed \d +accuracy ", output, flags=re.MULTILINE)) == 2 * 2 * 3
    assert "accuracy, higher is better, by num_pairs" in output
    assert {path.stem for path in (folder / "plots" / "recall").iterdir()} == {"accuracy", "by_length", "recall_front", "loss"}
    assert accuracy_table.render(table(folder)) in output


def test_a_killed_command_continues_to_the_same_table(finished_sweep: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    certificates = (finished_sweep[0] / "results" / "certificates.jsonl").read_text()
    (tmp_path / "results" / "certificates.jsonl").write_text(certificates)
    checkpoints = tmp_path / "results" / "recall" / "checkpoints"
    with subprocess.Popen(
        [sys.executable, "-m", "evals.run", *arguments_for(tmp_path, "training.checkpoint_s=0")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        while not (len(runs(tmp_path)) >= 2 and list(checkpoints.glob("*.safetensors"))):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    kept = runs(tmp_path)
    assert 2 <= len(kept) < 12
    assert len(list(checkpoints.glob("*.safetensors"))) == 1
    assert call(run.main, *arguments_for(tmp_path)).returncode == 0
    assert runs(tmp_path)[: len(kept)] == kept
    assert list(checkpoints.iterdir()) == []
    whole, resumed = (table(folder).drop(columns="train_s") for folder in (finished_sweep[0], tmp_path))
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)
    pd.testing.assert_frame_equal(*(table(folder, "curves") for folder in (finished_sweep[0], tmp_path)), check_exact=True)


def test_finished_runs_are_not_made_again_and_leave_no_checkpoint(finished_sweep: tuple[Path, str]) -> None:
    folder, _ = finished_sweep
    with initialize_config_dir(str(CONF), version_base="1.3"):
        comparison = read_job(compose("config", [word.replace("=2,4", "=4") for word in OVERRIDES]))
    results = folder / "results"
    study = Study(comparison, Ledger(results / "recall" / "samples.jsonl"), Certificates(results / "certificates.jsonl"))
    before = runs(folder)
    left = [
        study.checkpoint_path(one, run["learning_rate"], run["seed"]) for one in comparison.candidates for run in study.runs(one)
    ]
    assert len(left) == 2 * 3
    for path in left:  # as a command leaves it that was killed right after it wrote the record
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert [record["kind"] for record in study.run(lambda message, share: None)] == ["study"]
    assert runs(folder) == before
    assert not any(path.exists() for path in left)


def test_a_study_without_runs_hides_no_row_of_an_earlier_one() -> None:
    records, _ = Ledger(CONF.parent / "results" / "paper" / "recall_512" / "samples.jsonl").read()
    study = next(record for record in reversed(records) if record["kind"] == "study")
    changed = study | {"study": "of other code", "runs": {name: f"{name} by it" for name in study["runs"]}}
    before = accuracy_table.build(records)
    pd.testing.assert_frame_equal(accuracy_table.build([*records, changed]), before)
    run = next(record for record in reversed(records) if record["kind"] == "run" and record["attention"] == "bsbr")
    table = accuracy_table.build([*records, changed, run | {"run": "bsbr by it", "validation_loss": 7.0}])
    assert set(table["attention"]) == set(before["attention"])
    assert table.loc[table["attention"] == "bsbr", "validation_loss_nats"].tolist() == [7.0]


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["task=nope"], "unknown task 'nope'; known are copy, induction, language_modeling, mqar, needle, selective_copy"),
        (["task.num_pairs=99"], "task evals.training.tasks.mqar.MQAR cannot be made: .*num_pairs must be at most seq_len / 4 = 4"),
        (
            ["task._target_=collections.Counter"],
            "task collections.Counter is Counter, not a subclass of evals.training.tasks.base.Task",
        ),
        (["+task.nope=1"], "task evals.training.tasks.mqar.MQAR cannot be made: .*unexpected keyword argument 'nope'"),
        (["model.scope=layer"], "a task is learned by a whole model: it needs model.scope=model, got layer"),
        (["device.dtype=bfloat16"], "training takes device.dtype=float32, or bfloat16 on cuda or float64 on cpu, got bfloat16"),
        (["search=max_context"], "a comparison has a task or a search, not both"),
        (["training.steps=0"], "training.steps must be a positive integer, got 0"),
        (["training.learning_rates=[]"], "training.learning_rates must be a list of numbers above 0, got []"),
        (["training.learning_rates=[fast]"], "training.learning_rates must be a list of numbers above 0, got ['fast']"),
        (
            ["training.eval_length_multiples=[0.5]"],
            "training.eval_length_multiples must be a list of whole numbers above 0, got [0.5]",
        ),
        (["training.warmup_fraction=2"], "training.warmup_fraction must be a part of the steps, from 0 to 1, got 2"),
        (["training.grad_accumulation_steps=17"], "training.grad_accumulation_steps must be at most shape.batch_size = 16, got 17"),
        (["training.grad_clip_norm=0"], "training.grad_clip_norm must be a number of at least 1e-09, got 0"),
        (["model.conv_size=0"], "model.conv_size must be a positive integer, got 0"),
        (["model.positions=rope"], "model.positions must be one of sinusoidal, rotary, none, got 'rope'"),
        (["block=0"], "block must be a positive integer, got 0"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {one.partition("=")[0] for one in arguments}
    others = [word.replace("=2,4", "=2") for word in arguments_for(tmp_path) if word.partition("=")[0] not in given]
    monkeypatch.setattr(sys, "argv", ["run.py", *others, *arguments])
    assert run.main() == 2
    out, message = capfd.readouterr()
    assert (out, message.count("\n")) == ("", 1)
    pattern = sentence if ".*" in sentence else re.escape(sentence)
    assert re.match(f"error: .*{pattern}", message)
