"""The trainer: its steps, its results, and that a killed run continues with the same numbers."""

import json
import math
import signal
import time
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from evals.benchmark.modules import build_module
from evals.cli.jobs import read_job
from evals.config import Comparison
from evals.isolation.forkserver import launch
from evals.paths import CONF
from evals.training import checkpoint, trainer
from evals.training.loss import PerTargetLoss, accumulate_gradients
from evals.training.optimizer import learning_rate_at
from evals.training.tasks.base import IGNORED, generator
from evals.training.tasks.build import build_task

pytestmark = pytest.mark.xdist_group("train")
SMALL = (
    *("task=mqar", "task.vocabulary=32", "task.num_pairs=3", "attention=[bsbr]", "attention.bsbr.chunk_size=4"),
    *("shape.seq_len=16", "shape.batch_size=6", "model.scope=model", "model.hidden_dim=16", "model.num_heads=2"),
    *("model.ff_dim=32", "model.conv_size=3", "device.threads=1"),
    *("training.steps=40", "training.num_eval_examples=20", "training.eval_length_multiples=[1,4]", "training.checkpoint_s=0"),
)


@cache
def compose_comparison(*overrides: str) -> Comparison:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return read_job(compose("config", [*SMALL, *overrides]))


def run(comparison: Comparison, checkpoint_path: Path) -> dict[str, Any]:
    """Trains in this process; returns the last event, the fields of the run's record."""
    *_, last = trainer.train(comparison, comparison.candidates[0], build_task(comparison), 1e-2, 0, checkpoint_path)
    assert isinstance(last, dict)
    return last


def numbers(run: dict[str, Any]) -> dict[str, Any]:
    """All fields that must not depend on interruptions."""
    return json.loads(json.dumps({key: value for key, value in run.items() if key != "train_s"}))  # type: ignore[no-any-return]


# --- a step -------------------------------------------------------------------------------------


def test_the_learning_rate_rises_linearly_and_falls_by_a_cosine_to_zero() -> None:
    rates = [learning_rate_at(step, 110, 2.0, 1 / 11) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == 2.0
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.001
    assert learning_rate_at(0, 5, 1.0, 0.0) == 1.0


def test_only_matrices_have_weight_decay() -> None:
    comparison = compose_comparison()
    model = build_module(comparison, comparison.candidates[0])
    decayed, free = (group["params"] for group in trainer.parameter_groups(model, 0.1))
    assert {parameter.dim() for parameter in free} == {1}
    assert len(decayed) + len(free) == len(list(model.parameters()))


@pytest.mark.parametrize("num_parts", [2, 3, 6])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(num_parts: int) -> None:
    comparison = compose_comparison("device.dtype=float64")
    torch.manual_seed(0)
    per_target_loss = PerTargetLoss(build_module(comparison, comparison.candidates[0]).double())  # type: ignore[arg-type]
    batch = build_task(comparison).batch(6, generator("batch"))
    found = []
    for count in (1, num_parts):
        per_target_loss.zero_grad()
        loss = accumulate_gradients(per_target_loss, batch, comparison.device, count)
        found.append([torch.tensor(loss), *(p.grad for p in per_target_loss.parameters() if p.grad is not None)])
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-6, atol=1e-9)


def test_the_loss_is_that_of_the_targets_that_count() -> None:
    comparison = compose_comparison()
    model = build_module(comparison, comparison.candidates[0])
    batch = build_task(comparison).batch(6, generator("batch"))
    losses, right = PerTargetLoss(model)(batch.inputs, batch.targets)  # type: ignore[arg-type]
    logits = model(batch.inputs)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    torch.testing.assert_close(losses.mean(), expected)
    assert len(losses) == len(right) == 6 * 3


# --- a run --------------------------------------------------------------------------------------


def test_fields_of_a_run_s_record(tmp_path: Path) -> None:
    comparison = compose_comparison()
    made = run(comparison, tmp_path / "run.safetensors")
    assert made["outcome"] == "ok"
    assert made["tokens"] == 40 * 6 * 16
    assert made["parameters"] == sum(
        parameter.numel() for parameter in build_module(comparison, comparison.candidates[0]).parameters()
    )
    assert [step for step, _ in made["curve"]] == list(range(1, 41))
    assert [one["seq_len"] for one in made["evaluations"]] == [16, 64]
    assert [one["targets"] for one in made["evaluations"]] == [[60.0], [60.0]]
    assert all(0 <= one["right"][0] <= 60 for one in made["evaluations"])
    short, long = (one["state_bytes"] for one in made["evaluations"])
    assert 0 < short < long


def test_batches_are_the_same_for_every_learning_rate_and_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[int]]] = []
    original = accumulate_gradients

    def record_batch(per_target_loss: Any, batch: Any, *rest: Any) -> float:
        seen[-1].append(batch.inputs.flatten().tolist())
        return original(per_target_loss, batch, *rest)

    monkeypatch.setattr(trainer, "accumulate_gradients", record_batch)
    other = compose_comparison("+attention.bsbr.compression_factor=2")
    for index, (comparison, rate, seed) in enumerate(
        [(compose_comparison(), 1e-2, 0), (other, 1e-3, 0), (compose_comparison(), 1e-2, 1)]
    ):
        seen.append([])
        list(
            trainer.train(
                comparison, comparison.candidates[0], build_task(comparison), rate, seed, tmp_path / f"{index}.safetensors"
            )
        )
    assert seen[0] == seen[1] != seen[2]
    assert len({str(batch) for batch in seen[0]}) == 40


def test_a_curriculum_grows_to_the_whole_length_in_equal_parts_of_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[tuple[int, int], int]] = []
    original = accumulate_gradients

    def record_batch(per_target_loss: Any, batch: Any, *rest: Any) -> float:
        seen.append((tuple(batch.inputs.shape), int((batch.targets != IGNORED).sum())))
        return original(per_target_loss, batch, *rest)

    monkeypatch.setattr(trainer, "accumulate_gradients", record_batch)
    made = run(
        compose_comparison("training.curriculum=[4,2,1]", "task.num_pairs=4", "training.steps=6"), tmp_path / "run.safetensors"
    )
    # As many tokens in every step, and as many targets, for the pairs grow with the length.
    assert seen == [((24, 4), 24), ((24, 4), 24), ((12, 8), 24), ((12, 8), 24), ((6, 16), 24), ((6, 16), 24)]
    assert made["tokens"] == 6 * 6 * 16
    assert [one["seq_len"] for one in made["evaluations"]] == [16, 64]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[2]", r"training.curriculum must end with 1, the whole shape.seq_len, got \[2\]"),
        ("[3,1]", "training.curriculum must divide seq_len = 16, which 3 does not"),
        ("[8,1]", "num_pairs must be at most seq_len / 4 = 0, so that each key can be queried, got 1"),
        ("[0,1]", r"training.curriculum must be a list of whole numbers above 0, got \[0, 1\]"),
    ],
)
def test_an_impossible_curriculum_is_one_sentence(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_comparison(f"training.curriculum={given}")


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "accumulate_gradients", lambda *_: math.nan)
    made = run(compose_comparison(), tmp_path / "run.safetensors")
    assert (made["outcome"], made["detail"]) == ("diverged", "the loss was nan at step 1")


# --- continuing ---------------------------------------------------------------------------------


def send_numbers(connection: Connection, checkpoint_path: Path, overrides: tuple[str, ...]) -> None:
    connection.send(numbers(run(compose_comparison(*overrides), checkpoint_path)))


def test_a_killed_run_continues_to_the_same_numbers_bit_for_bit(tmp_path: Path) -> None:
    """Each run has its own process, and dropout, which draws from the global random state."""
    dropout = ("+attention.bsbr.dropout=0.2", "training.steps=60")
    process, connection = launch(send_numbers, tmp_path / "whole.safetensors", dropout)
    whole = connection.recv()
    process.join()

    saved = tmp_path / "killed.safetensors"
    process, _ = launch(send_numbers, saved, dropout)
    while process.is_alive() and step_of(saved) < 10:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 10 <= step_of(saved) < 60
    process, connection = launch(send_numbers, saved, dropout)
    assert connection.recv() == whole
    process.join()
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["killed.safetensors", "whole.safetensors"]


def step_of(checkpoint_path: Path) -> int:
    from safetensors import safe_open

    if not checkpoint_path.exists():
        return 0
    with safe_open(checkpoint_path, framework="pt") as file:
        return int(json.loads(file.metadata()["progress"])["step"])


def test_a_checkpoint_restores_everything_and_a_failed_one_leaves_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "deep" / "run.safetensors"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert checkpoint.load(saved, model, optimizer) is None
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    checkpoint.save(saved, model, optimizer, {"step": 7})
    drawn = torch.rand(3)
    other = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    another = torch.optim.AdamW(other.parameters(), lr=0.1)
    assert checkpoint.load(saved, other, another) == {"step": 7}
    assert torch.equal(torch.rand(3), drawn)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    for one, same in zip(optimizer.state_dict()["state"].values(), another.state_dict()["state"].values(), strict=True):
        assert one.keys() == same.keys()
        assert all(torch.equal(one[key], same[key]) for key in one)

    before = saved.read_bytes()
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(saved, model, optimizer, {"step": 8})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_last_step_that_makes_parameters_nan_ends_as_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = accumulate_gradients

    def spoil_last(per_target_loss: Any, batch: Any, *rest: Any) -> float:
        loss = original(per_target_loss, batch, *rest)
        if batch.inputs.equal(build_task(compose_comparison()).batch(6, generator("train", 0, 39)).inputs):
            next(per_target_loss.parameters()).grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(trainer, "accumulate_gradients", spoil_last)
    made = run(compose_comparison(), tmp_path / "run.safetensors")
    assert (made["outcome"], made["detail"]) == ("diverged", "the loss after the last step is no number")
