"""Per-target loss of a decoder on a batch, and its gradient, in parts and across processes."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bsbr.model import CausalLM
from evals.config import Device
from evals.training.tasks.base import IGNORED, Batch


class TargetScores(NamedTuple):
    """Scores of a batch's targets, in order of example and position: losses in nats; correct where it is the likeliest token."""

    losses: Tensor
    correct: Tensor


class PerTargetLoss(nn.Module):
    """Per-target cross-entropy and top-1 correctness of a decoder on a batch. Computes logits at targets only."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> TargetScores:
        """Scores the targets; `inputs` and `targets` are [batch, time], and positions whose target is IGNORED do not count."""
        mask = targets != IGNORED
        logits = self.model.logits(self.model.model(inputs)[mask]).float()
        return TargetScores(F.cross_entropy(logits, targets[mask], reduction="none"), logits.argmax(dim=-1) == targets[mask])


def accumulate_gradients(per_target_loss: nn.Module, batch: Batch, device: Device, num_parts: int) -> float:
    """Adds the gradient of the mean loss over all targets of a batch to the parameters.

    Under torch.distributed, the processes share the parts. The gradient is that of the whole batch, up to rounding.

    Args:
        per_target_loss: a `PerTargetLoss`, or one within DistributedDataParallel.
        batch: all examples of the step, on the CPU; the same in every process.
        device: where the parts are computed.
        num_parts: parts per process, computed one after the other.

    Returns:
        The mean loss over all targets of the batch, in nats.
    """
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    parts = batch.split(num_parts * world_size)[rank::world_size]
    num_targets = int(batch.target_mask.sum())
    total = torch.zeros((), device=device.kind)
    for index, part in enumerate(parts):
        # Processes exchange gradients once a step, with the last part.
        postponed = isinstance(per_target_loss, DistributedDataParallel) and index + 1 < len(parts)
        with per_target_loss.no_sync() if postponed else nullcontext():  # type: ignore[operator]
            with autocast(device):
                scores = per_target_loss(part.inputs.to(device.kind), part.targets.to(device.kind))
            loss = scores.losses.sum() / num_targets
            (loss * world_size).backward()  # DistributedDataParallel takes the mean over processes
        total += loss.detach()
    if world_size > 1:
        dist.all_reduce(total)
    return float(total)


def autocast(device: Device) -> AbstractContextManager[object]:
    """Context in which matrix products are in bfloat16, if the device is CUDA in bfloat16; parameters stay in float32."""
    lower = device.kind == "cuda" and device.dtype == "bfloat16"
    return torch.autocast("cuda", torch.bfloat16) if lower else nullcontext()
