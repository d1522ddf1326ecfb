"""Minimises a loss over a model's parameters, from its last checkpoint on."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evals.measure.clock import Stopwatch
from evals.training import checkpoint
from evals.training.trainer import rate


class Optimisation(NamedTuple):
    """`warmup`: part of the steps in which the rate rises. A checkpoint is made every `checkpoint_s` seconds, at least."""

    steps: int
    learning_rate: float
    warmup_fraction: float = 0.1
    grad_clip_norm: float = 1.0
    checkpoint_s: float = 10.0


def optimise(
    model: nn.Module, loss_of: Callable[[int], Tensor], plan: Optimisation, saved: Path, weight_decay: float = 0.0
) -> Iterator[tuple[int, float]]:
    """Minimises loss_of(step) over the parameters that want gradients; yields every step with its loss.

    saved: the checkpoint that it goes on from where there is one. It stays, for whoever comes after to remove.
    Raises FloatingPointError if the loss is no number.
    """
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=plan.learning_rate, weight_decay=weight_decay)
    progress = checkpoint.load(saved, model, optimizer) or {"step": 0}
    watch, kept_s = Stopwatch(), 0.0
    for step in range(progress["step"], plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(plan.learning_rate, step, plan.steps, plan.warmup_fraction)
        loss = loss_of(step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss was {value} at step {step + 1}: lower the learning rate")
        loss.backward()
        nn.utils.clip_grad_norm_(moving, plan.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if watch.seconds() - kept_s > plan.checkpoint_s or step + 1 == plan.steps:
            checkpoint.save(saved, model, optimizer, {"step": step + 1})
            kept_s = watch.seconds()
        yield step + 1, value
