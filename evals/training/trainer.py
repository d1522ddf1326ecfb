"""One training run: a decoder over one attention learns one task, and is then evaluated at every length.

All randomness follows from the run's seed and the number of the step. So the batches are the same, in the same order, for
every attention and learning rate, and a run that continues from its checkpoint gives the same numbers as one that was not stopped.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bsbr.interface import Attention
from bsbr.model import CausalLM
from evals.benchmark.modules import build_module
from evals.config import Candidate, Comparison
from evals.measure.clock import Stopwatch
from evals.results.ledger import Record
from evals.training import checkpoint
from evals.training.loss import PerTargetLoss, accumulate_gradients, autocast
from evals.training.optimizer import learning_rate_at, take_step
from evals.training.tasks.base import Split, Task, generator

LOSS_CURVE_POINTS = 200
PROGRESS_S = 1.0
"""Least seconds between two reports of a run's progress."""


class Diverged(ArithmeticError):
    """A loss is not finite."""


class TrainingProgress(NamedTuple):
    """Steps taken, mean training loss in nats since the last point of the loss curve, and estimated seconds until the last step."""

    step: int
    loss: float
    remaining_s: float


def train(
    comparison: Comparison, candidate: Candidate, task: Task, learning_rate: float, seed: int, checkpoint_path: Path
) -> Generator[TrainingProgress | Record, None, None]:
    """Trains a candidate on a task and evaluates it.

    Under torch.distributed the processes share every batch; all have the same parameters and yield the same.

    Args:
        comparison: the model, shape, device and training settings.
        candidate: the attention.
        task: what is learned, at the length of training.
        learning_rate: the highest of the schedule.
        seed: of the parameters, the dropout and the batches.
        checkpoint_path: where the run continues from, if the file exists. The caller deletes it.

    Yields:
        TrainingProgress about once a second; last of all the fields of the run's record, with outcome `ok` or `diverged`.
    """
    run = TrainingRun(comparison, candidate, task, learning_rate, seed, checkpoint_path)
    try:
        yield from run.optimize()
        validation = yield from run.evaluate(task, "validation")
        evaluations = []
        for multiple in comparison.training.eval_length_multiples:
            longer = replace(task, seq_len=multiple * task.seq_len)
            evaluation = yield from run.evaluate(longer, "test")
            evaluations.append(evaluation)
    except Diverged as error:
        yield {"outcome": "diverged", "detail": str(error), "curve": run.curve.points}
        return
    yield {
        "outcome": "ok",
        "detail": "",
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "tokens": comparison.training.steps * comparison.shape.batch_size * task.seq_len,
        **run.state(),
        "validation_loss": sum(validation["loss"]) / sum(validation["targets"]),
        "evaluations": evaluations,
    }


class TrainingRun:
    """A model in training: takes optimizer steps from the last checkpoint on, and evaluates the model after the last step."""

    def __init__(
        self, comparison: Comparison, candidate: Candidate, task: Task, learning_rate: float, seed: int, checkpoint_path: Path
    ) -> None:
        torch.set_num_threads(comparison.device.threads)
        torch.manual_seed(seed)
        self.comparison, self.task, self.learning_rate, self.seed = comparison, task, learning_rate, seed
        training, device = comparison.training, comparison.device
        dtype = torch.float64 if device.dtype == "float64" else torch.float32
        self.model = cast(CausalLM, build_module(comparison, candidate).to(device.kind, dtype))
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, training.weight_decay), lr=learning_rate)
        self.checkpoint_path = checkpoint_path
        state = checkpoint.load(checkpoint_path, self.model, self.optimizer) or {"step": 0, "curve": [], "train_s": 0.0}
        self.first_step: int = state["step"]
        self.train_s: float = state["train_s"]
        self.curve = LossCurve(state["curve"], training.steps)
        self.per_target_loss = PerTargetLoss(self.model)
        self.shared_loss: nn.Module = self.per_target_loss
        if dist.is_initialized():
            self.shared_loss = DistributedDataParallel(self.per_target_loss, find_unused_parameters=True)

    def optimize(self) -> Iterator[TrainingProgress]:
        """Takes the remaining steps, saves checkpoints, and puts the model into eval mode. Raises Diverged."""
        training = self.comparison.training
        stopwatch, earlier_s, saved_s, reported_s = Stopwatch(), self.train_s, 0.0, -math.inf
        for step in range(self.first_step, training.steps):
            completes_point = self.curve.add(step + 1, self._take_step(step))
            elapsed_s = stopwatch.seconds()
            if completes_point:
                self.train_s = earlier_s + elapsed_s
                if elapsed_s - saved_s > training.checkpoint_s and is_first_rank():
                    checkpoint.save(self.checkpoint_path, self.model, self.optimizer, self.state())
                    saved_s = elapsed_s
            if elapsed_s - reported_s > PROGRESS_S:
                reported_s = elapsed_s
                per_step_s = elapsed_s / (step + 1 - self.first_step)
                yield TrainingProgress(step + 1, self.curve.latest, per_step_s * (training.steps - step - 1))
        self.per_target_loss.eval()

    def _take_step(self, step: int) -> float:
        """Takes one optimizer step; returns the loss of its batch."""
        training = self.comparison.training
        divisor = training.divisor(step)
        batch_size = divisor * self.comparison.shape.batch_size  # as many tokens at every length
        batch = self.task.shortened(divisor).batch(batch_size, generator("train", self.seed, step))
        loss = accumulate_gradients(self.shared_loss, batch, self.comparison.device, training.grad_accumulation_steps)
        learning_rate = learning_rate_at(step, training.steps, self.learning_rate, training.warmup_fraction)
        take_step(self.optimizer, list(self.model.parameters()), learning_rate, training.grad_clip_norm)
        return loss

    def evaluate(self, task: Task, split: Split) -> Generator[TrainingProgress, None, Record]:
        """Evaluates the model on a task's examples, which are the same for every run.

        Args:
            task: the run's task, at any length.
            split: where the examples come from.

        Yields:
            The progress of the finished training after each batch, which has as many tokens as in training, or one example.

        Returns:
            The length; per group of targets their number, the number of correct predictions and the sum of losses in nats;
            and the bytes of the model's state for decoding at that length.

        Raises:
            Diverged: if a loss is not finite.
        """
        training, device, shape = self.comparison.training, self.comparison.device, self.comparison.shape
        batch_size = max(1, shape.batch_size * shape.seq_len // task.seq_len)
        sums = {name: torch.zeros(len(task.groups), dtype=torch.float64) for name in ("targets", "right", "loss")}
        for start in range(0, training.num_eval_examples, batch_size):
            size = min(batch_size, training.num_eval_examples - start)
            batch = task.batch(size, generator(split, task.seq_len, start), split)
            with torch.inference_mode(), autocast(device):
                scores = self.per_target_loss(batch.inputs.to(device.kind), batch.targets.to(device.kind))
            values = {"targets": torch.ones_like(scores.losses), "right": scores.correct, "loss": scores.losses}
            for name, total in sums.items():
                total.index_add_(0, batch.groups[batch.target_mask], values[name].cpu().double())
            yield TrainingProgress(training.steps, self.curve.latest, remaining_s=0.0)
        if not sums["loss"].isfinite().all():
            raise Diverged("the loss after the last step is no number")
        attentions = [module for module in self.model.modules() if isinstance(module, Attention)]
        return {
            "seq_len": task.seq_len,
            "groups": task.groups,
            "state_bytes": sum(attention.state_bytes(task.seq_len) for attention in attentions),
            **{name: total.tolist() for name, total in sums.items()},
        }

    def state(self) -> Record:
        """What the run has come to at the last point of its loss curve; a checkpoint holds it, and so does the run's record."""
        return {"step": self.curve.points[-1][0], "curve": self.curve.points, "train_s": self.train_s}


class LossCurve:
    """Training loss over steps: at most about `LOSS_CURVE_POINTS` points [step, mean loss of the steps since the point before]."""

    def __init__(self, points: list[list[float]], steps: int) -> None:
        self.points = points
        self._steps = steps
        self._sum, self._count = 0.0, 0

    def add(self, step: int, loss: float) -> bool:
        """Adds the loss of one step, counted from 1; returns whether that completes a point. Raises Diverged."""
        self._sum += loss
        self._count += 1
        if self._count < max(1, self._steps // LOSS_CURVE_POINTS) and step < self._steps:
            return False
        if not math.isfinite(self.latest):
            raise Diverged(f"the loss was {self.latest} at step {step}")
        self.points.append([step, self.latest])
        self._sum, self._count = 0.0, 0
        return True

    @property
    def latest(self) -> float:
        """Mean loss since the last point; where no step followed it, that of the point."""
        return self._sum / self._count if self._count else self.points[-1][1]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Splits parameters into two groups for AdamW: matrices have weight decay; biases, gains and norms have none."""
    parameters = list(model.parameters())
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def is_first_rank() -> bool:
    """Whether this process is the one that writes files and prints: rank 0 of several, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0
