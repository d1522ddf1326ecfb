"""Learning-rate schedule of all training, and the plain optimization loop with checkpoints that distillation uses."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evals.measure.clock import Stopwatch
from evals.training import checkpoint


class OptimizerSettings(NamedTuple):
    """Settings of an optimization with AdamW; the learning rate rises in the first `warmup_fraction` of the steps."""

    steps: int
    learning_rate: float
    warmup_fraction: float = 0.1
    grad_clip_norm: float = 1.0
    checkpoint_s: float = 10.0


def learning_rate_at(step: int, steps: int, peak: float, warmup_fraction: float) -> float:
    """Learning rate of one step: a linear rise to the peak, then half a cosine down to 0.

    Loshchilov 2017 (arXiv:1608.03983), eq. 5, without restarts.

    Args:
        step: 0 … steps − 1.
        steps: of the whole training.
        peak: the highest learning rate.
        warmup_fraction: part of the steps in which it rises, 0 to 1.
    """
    warmup_steps = math.ceil(warmup_fraction * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def take_step(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], learning_rate: float, grad_clip_norm: float
) -> None:
    """Applies the accumulated gradients, clipped to a norm, and deletes them."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    nn.utils.clip_grad_norm_(parameters, grad_clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def minimize(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    settings: OptimizerSettings,
    checkpoint_path: Path,
    weight_decay: float = 0.0,
) -> Iterator[tuple[int, float]]:
    """Minimizes a loss over the parameters of a model that require gradients.

    Args:
        model: changed in place.
        loss_of: the loss of a step, counted from 0.
        settings: steps, learning rate, clipping, checkpoints.
        checkpoint_path: where the run continues from, if the file exists. The caller deletes it.
        weight_decay: of all parameters.

    Yields:
        The number of the step, counted from 1, and its loss.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=weight_decay)
    progress = checkpoint.load(checkpoint_path, model, optimizer) or {"step": 0}
    stopwatch, saved_s = Stopwatch(), 0.0
    for step in range(progress["step"], settings.steps):
        loss = loss_of(step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss was {value} at step {step + 1}: lower the learning rate")
        loss.backward()
        rate = learning_rate_at(step, settings.steps, settings.learning_rate, settings.warmup_fraction)
        take_step(optimizer, parameters, rate, settings.grad_clip_norm)
        if stopwatch.seconds() - saved_s > settings.checkpoint_s or step + 1 == settings.steps:
            checkpoint.save(checkpoint_path, model, optimizer, {"step": step + 1})
            saved_s = stopwatch.seconds()
        yield step + 1, value
