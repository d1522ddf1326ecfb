"""One training run: a decoder over one attention learns one task, and is asked at every length. Plain: it serves a comparison.

All randomness follows from the run's seed and the number of the step: whatever the attention and the learning rate, the
batches are the same and come in the same order, and a run goes on from its checkpoint as if it had never stopped.
"""

import math
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bsbr.interface import Attention
from bsbr.model import CausalLM
from evals.benchmark.workloads import build_module
from evals.config import Candidate, Comparison, Device
from evals.measure.clock import Stopwatch
from evals.training import checkpoint
from evals.training.optimizer import learning_rate_at, take_step
from evals.training.tasks.base import IGNORED, Batch, Split, Task, generator

LOSS_CURVE_POINTS = 200
"""Of a loss curve: each is the mean since the one before. Checkpoints are made at points."""


class TrainingProgress(NamedTuple):
    """What a run tells while it lasts. `loss`: nats a target, since the last point; left_s: an estimate."""

    step: int
    loss: float
    left_s: float


class PerTargetLoss(nn.Module):
    """Of every target of a batch: its loss in nats, and whether it was the likeliest token. Logits are of targets alone."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """inputs, targets: [batch, time]. Returns two of [targets that are not IGNORED], in float32 and bool."""
        asked = targets != IGNORED
        logits = self.model.head(self.model.model(inputs)[asked]).float()
        wanted = targets[asked]
        return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(dim=-1) == wanted


def train(
    comparison: Comparison, candidate: Candidate, task: Task, learning_rate: float, seed: int, saved: Path
) -> Generator[TrainingProgress | dict[str, Any], None, None]:
    """Yields `Progress` about once a second, and at last what the run came to, as the ledger keeps it.

    saved: the checkpoint, from which it goes on where there is one. Under torch.distributed a batch is shared by the
    ranks; each then has the same parameters, and yields the same.
    """
    training, device = comparison.training, comparison.device
    torch.set_num_threads(device.threads)
    torch.manual_seed(seed)
    model = build_module(comparison, candidate)
    assert isinstance(model, CausalLM)
    model = model.to(device.kind, torch.float64 if device.dtype == "float64" else torch.float32)
    answers = PerTargetLoss(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, training.weight_decay), lr=learning_rate)
    progress = checkpoint.load(saved, model, optimizer) or {"step": 0, "curve": [], "train_s": 0.0}
    shared: nn.Module = DistributedDataParallel(answers, find_unused_parameters=True) if dist.is_initialized() else answers

    watch, before_s, kept_s, told_s = Stopwatch(), progress["train_s"], 0.0, -math.inf
    every = max(1, training.steps // LOSS_CURVE_POINTS)
    sum_, since, began = 0.0, 0, progress["step"]
    for step in range(began, training.steps):
        divisor = training.divisor(step)
        batch = task.part(divisor).batch(divisor * comparison.shape.batch_size, generator("train", seed, step))
        sum_ += accumulate_gradients(shared, batch, device, training.grad_accumulation_steps)
        since += 1
        step_rate = learning_rate_at(step, training.steps, learning_rate, training.warmup_fraction)
        take_step(optimizer, list(model.parameters()), step_rate, training.grad_clip_norm)
        now_s = watch.seconds()
        if since == every or step + 1 == training.steps:
            loss, sum_, since = sum_ / since, 0.0, 0
            progress = {"step": step + 1, "curve": [*progress["curve"], [step + 1, loss]], "train_s": before_s + now_s}
            if not math.isfinite(loss):
                yield {"outcome": "diverged", "detail": f"the loss was {loss} at step {step + 1}", "curve": progress["curve"][:-1]}
                return
            if now_s - kept_s > training.checkpoint_s and is_first_rank():
                checkpoint.save(saved, model, optimizer, progress)
                kept_s = now_s
        if now_s - told_s > 1:
            told_s = now_s
            lately = sum_ / since if since else progress["curve"][-1][1]
            yield TrainingProgress(step + 1, lately, now_s / (step + 1 - began) * (training.steps - step - 1))
    answers.eval()
    validation = yield from evaluate(answers, task, comparison, "validation", progress)
    evaluations = []
    for times in training.eval_length_multiples:
        longer = replace(task, seq_len=times * task.seq_len)
        evaluations.append((yield from evaluate(answers, longer, comparison, "test", progress)))
    if not all(math.isfinite(loss) for one in (validation, *evaluations) for loss in one["loss"]):
        yield {"outcome": "diverged", "detail": "the loss after the last step is no number", "curve": progress["curve"]}
        return
    yield {
        "outcome": "ok",
        "detail": "",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": training.steps * comparison.shape.batch_size * task.seq_len,
        **progress,
        "validation_loss": sum(validation["loss"]) / sum(validation["targets"]),
        "evaluations": evaluations,
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, gains and norms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [one for one in parameters if one.dim() >= 2], "weight_decay": weight_decay},
        {"params": [one for one in parameters if one.dim() < 2], "weight_decay": 0.0},
    ]


def accumulate_gradients(answers: nn.Module, batch: Batch, device: Device, accumulate: int) -> float:
    """Adds the gradient of the mean loss over all targets of the batch, in `accumulate` pieces on every rank; returns that loss.

    The gradient is that of the whole batch, however it is cut.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    pieces = list(_pieces(batch, accumulate * ranks))[rank::ranks]
    targets = int((batch.targets != IGNORED).sum())
    total = torch.zeros((), device=device.kind)
    for index, piece in enumerate(pieces):
        # Ranks wait for each other once a step.
        alone = isinstance(answers, DistributedDataParallel) and index + 1 < len(pieces)
        with answers.no_sync() if alone else nullcontext():  # type: ignore[operator]
            with _autocast(device):
                losses, _ = answers(piece.inputs.to(device.kind), piece.targets.to(device.kind))
            loss = losses.sum() / targets
            (loss * ranks).backward()  # DistributedDataParallel takes the mean over ranks
        total += loss.detach()
    if ranks > 1:
        dist.all_reduce(total)
    return float(total)


def evaluate(
    answers: nn.Module, task: Task, comparison: Comparison, split: Split, progress: dict[str, Any]
) -> Generator[TrainingProgress, None, dict[str, Any]]:
    """How many targets there are in each group, how many were right, and their losses summed; and the bytes to decode with.

    The examples are the same for every run. As many tokens go through at once as in training, or one example.
    """
    training, device = comparison.training, comparison.device
    size = max(1, comparison.shape.batch_size * comparison.shape.seq_len // task.seq_len)
    sums = torch.zeros(3, len(task.groups), dtype=torch.float64)
    for start in range(0, training.num_eval_examples, size):
        batch = task.batch(min(size, training.num_eval_examples - start), generator(split, task.seq_len, start), split)
        with torch.inference_mode(), _autocast(device):
            losses, right = answers(batch.inputs.to(device.kind), batch.targets.to(device.kind))
        group = batch.groups[batch.targets != IGNORED]
        for row, values in enumerate((torch.ones_like(right), right, losses)):
            sums[row].index_add_(0, group, values.cpu().double())
        step, loss = progress["curve"][-1]
        yield TrainingProgress(step, loss, left_s=0.0)
    attentions = [part for part in answers.modules() if isinstance(part, Attention)]
    return {
        "seq_len": task.seq_len,
        "groups": task.groups,
        "state_bytes": sum(one.state_bytes(task.seq_len) for one in attentions),
        **dict(zip(("targets", "right", "loss"), sums.tolist(), strict=True)),
    }


def is_first_rank() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _pieces(batch: Batch, count: int) -> Iterator[Batch]:
    for tensors in zip(*(tensor.tensor_split(count) for tensor in batch), strict=True):
        yield Batch(*tensors)


def _autocast(device: Device) -> Any:
    """Matrix products in bfloat16 on CUDA, where that is asked for; parameters stay in float32."""
    lower = device.kind == "cuda" and device.dtype == "bfloat16"
    return torch.autocast("cuda", torch.bfloat16) if lower else nullcontext()
