"""Tests distillation: what it changes, how it continues after an interruption, its tables, and the command."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bsbr.convert import convert_to_bsbr
from evals.conversion.distill import DistillationStep, distill
from evals.conversion.evaluation import evaluate
from evals.conversion.tables import build
from evals.conversion.teachers import draw_windows
from evals.distill import main
from evals.training.optimizer import OptimizerSettings, minimize

CHUNK, CONTEXT, VOCABULARY = 4, 16, 11
FAMILIES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT, "attn_pdrop": 0.0},
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
ALIGN, DISTIL = OptimizerSettings(30, 1e-2), OptimizerSettings(30, 3e-3)


def batches(step: int) -> Tensor:
    """Rows whose second half repeats the first, which a chunk alone cannot predict."""
    half = torch.randint(VOCABULARY, (8, CONTEXT // 2), generator=torch.Generator().manual_seed(step))
    return torch.cat([half, half], dim=1)


def original(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def distilled(
    model: PreTrainedModel, folder: Path, rank: int = 2, align: OptimizerSettings = ALIGN, distil: OptimizerSettings = DISTIL
) -> tuple[PreTrainedModel, list[DistillationStep]]:
    converted = convert_to_bsbr(model, CHUNK)
    torch.manual_seed(0)
    steps = distill(model, converted, batches, align=align, distil=distil, rank=rank, checkpoint_folder=folder)
    return converted, list(steps)


def changed_tensors(model: PreTrainedModel, before: PreTrainedModel) -> set[str]:
    """Names of the parameters and buffers of `model` that differ from those of `before`."""
    state, expected = model.state_dict(), before.state_dict()
    return {name for name, tensor in state.items() if not tensor.equal(expected[name])}


@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_approaches_the_original_and_changes_layers_only(family: str, tmp_path: Path) -> None:
    model = original(family)
    before = convert_to_bsbr(model, CHUNK)
    after, steps = distilled(model, tmp_path)
    assert [stage for stage, _, _ in steps] == ["align"] * 30 + ["distil"] * 30
    test = [batches(-1 - i) for i in range(4)]
    far, near, self = evaluate(model, {"far": before, "near": after, "self": model}, test, CHUNK).values()
    assert near["kl"] < 0.9 * far["kl"]
    assert near["cosine"] > far["cosine"]
    assert self["kl"] == pytest.approx(0, abs=1e-6)
    assert (self["top_1"], self["top_10"]) == (1, 1)
    assert len(near["chunk_nats"]) == 4
    state, expected = after.state_dict(), before.state_dict()
    assert state.keys() == expected.keys()  # low-rank updates are merged
    changed = changed_tensors(after, before)
    assert changed
    assert all(state[name].dim() >= 2 or ".retrieval." in name for name in changed)
    assert not any(part in name for name in changed for part in ("wte", "wpe", "embed", "lm_head", "norm", "ln_"))


def test_distillation_of_rank_0_changes_retrieval_only(tmp_path: Path) -> None:
    model = original("llama")
    after, _ = distilled(model, tmp_path, rank=0)
    assert changed_tensors(after, convert_to_bsbr(model, CHUNK)) == {name for name in after.state_dict() if ".retrieval." in name}


def test_distillation_without_retrieval_leaves_its_gates_at_0(tmp_path: Path) -> None:
    model = original("llama")
    converted = convert_to_bsbr(model, CHUNK)
    options = {"align": ALIGN, "distil": DISTIL, "rank": 2, "train_retrieval": False, "checkpoint_folder": tmp_path}
    list(distill(model, converted, batches, **options))
    changed = changed_tensors(converted, convert_to_bsbr(model, CHUNK))
    assert changed
    assert not any(".retrieval." in name for name in changed)


@pytest.mark.parametrize("last", [("align", 2), ("distil", 3)])
def test_an_interrupted_distillation_ends_with_the_same_model(last: tuple[str, int], tmp_path: Path) -> None:
    model, settings = original("llama"), OptimizerSettings(4, 1e-2, checkpoint_s=0)
    whole, _ = distilled(model, tmp_path / "whole", align=settings, distil=settings)
    converted = convert_to_bsbr(model, CHUNK)
    torch.manual_seed(0)
    folder = tmp_path / "parts"
    for stage, step, _ in distill(model, converted, batches, align=settings, distil=settings, rank=2, checkpoint_folder=folder):
        if (stage, step) == last:
            break
    continued, steps = distilled(model, folder, align=settings, distil=settings)
    assert steps[0][:2] == (last[0], last[1] + 1)
    assert not changed_tensors(continued, whole)


def test_a_loss_that_is_not_finite_raises(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="the loss was nan at step 1: lower the learning rate"):
        list(minimize(model, lambda _: model(torch.tensor([float("nan")])).sum(), ALIGN, tmp_path / "x.safetensors"))


SMALL = {
    "hidden": 16,
    "heads": 2,
    "chunk-size": 4,
    "chunk-overlap": 1,
    "chunks": 3,
    "batch": 2,
    "num-eval-examples": 4,
    "train-steps": 3,
    "align-steps": 2,
    "distil-steps": 2,
    "seeds": 1,
    "threads": torch.get_num_threads(),
}


def command(folder: Path, *more: str) -> int:
    return main(
        ["--results-dir", str(folder), *(word for name, value in SMALL.items() for word in (f"--{name}", str(value))), *more]
    )


def test_the_command_writes_tables_and_repeats_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path) == 0
    folder = tmp_path / "distillation"
    results = pd.read_csv(folder / "results.csv")
    assert list(results["stage"]) == ["original", "converted", "distilled"] * 2
    assert list(results["gap_closed"][:2]) == [1, 0]
    assert set(results["split"]) == {"test"}
    assert len(pd.read_csv(folder / "positions.csv")) == 2 * 3 * 3
    lines = (folder / "samples.jsonl").read_text()
    assert not list((folder / "checkpoints").glob("*/*.safetensors"))
    assert command(tmp_path) == 0
    assert (folder / "samples.jsonl").read_text() == lines
    assert "| gpt2 | 1 |" in capsys.readouterr().out
    # The validation split has its own results, and the same trained teachers.
    teachers = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()}
    assert len(teachers) == 2
    assert command(tmp_path, "--split", "validation", "--model", "llama", "--without-retrieval") == 0
    assert (folder / "samples.jsonl").read_text() == lines
    tried = pd.read_csv(tmp_path / "distillation_validation" / "results.csv")
    assert tried["perplexity"][0] != results["perplexity"][0]
    assert tried["trained_parameters"][0] < results["trained_parameters"][0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()} == teachers


def test_windows_are_consecutive_tokens_of_their_split() -> None:
    texts = {name: np.arange(100 * i, 100 * i + 50) for i, name in enumerate(("train", "validation", "test"))}
    for i, split in enumerate(texts):
        ids = draw_windows(texts, split, 64, 16, "seed", split, 0)
        assert ids.shape == (64, 16)
        assert bool((ids.diff(dim=1) == 1).all())
        assert 100 * i <= int(ids.min()) < int(ids.max()) < 100 * i + 50


def test_gap_closed_is_a_share_of_the_added_nats() -> None:
    losses = {"original": [2.0, 1.0, 1.0], "converted": [2.0, 1.4, 1.6], "distilled": [1.9, 1.1, 1.2]}
    models = {name: {"nats": sum(parts) / 3, "perplexity": 0.0, "chunk_nats": parts} for name, parts in losses.items()}
    teacher = {"model": "gpt2", "seed": 0, "context": 12}
    plan = dict.fromkeys(("chunks", "batch", "align_steps", "distil_steps", "learning_rate", "rank", "retrieval", "split"), 1)
    plan |= {"teacher": teacher, "chunk_size": 4, "chunk_overlap": 0, "num_eval_examples": 1}
    record = {"plan": plan, "models": models, "parameters": 1, "trained_parameters": 1}
    rows = build([record])["conversion"].set_index("stage")
    assert rows.loc["distilled", "gap_closed"] == pytest.approx(0.8)  # 0.8 of 1.0
    # 0.7 of 1.0: the improvement of the first chunk closes no gap.
    assert rows.loc["distilled", "gap_closed_beyond"] == pytest.approx(0.7)
    assert build([])["conversion"].empty
