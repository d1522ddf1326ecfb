"""Distillation of a pretrained model into its conversion: attention outputs layer by layer, then logits.

Distillation trains the parameters of retrieval and a low-rank update of every weight matrix of the layers (LoRA,
arXiv:2106.09685), which is merged at the end: a distilled model has the modules of an undistilled one. In the first stage every
attention gets the inputs of the teacher's attention, so that all layers learn at once. The second stage corrects the rest.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from evals.conversion.modules import converted_attention_names, weight_matrices
from evals.training.optimizer import OptimizerSettings, minimize

Batches = Callable[[int], Tensor]
"""Token ids [batch, time] of a step."""


class DistillationStep(NamedTuple):
    """Progress of a distillation. stage: "align" (attention outputs) or "distil" (logits); step: counted from 1."""

    stage: str
    step: int
    loss: float


class LowRankUpdate(nn.Module):
    """Parametrization W + A B of a weight W [rows, columns], with A [rows, rank], zero at first, and B [rank, columns]."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(weight.new_zeros(rows, rank))
        self.b = nn.Parameter(torch.randn(rank, columns, dtype=weight.dtype, device=weight.device) / math.sqrt(columns))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


def distill(
    teacher: PreTrainedModel,
    converted: PreTrainedModel,
    batches: Batches,
    *,
    align: OptimizerSettings,
    distil: OptimizerSettings,
    rank: int,
    train_retrieval: bool = True,
    checkpoint_folder: Path,
) -> Iterator[DistillationStep]:
    """Distills a teacher into its conversion, in place; the low-rank updates are merged when the iterator ends.

    Both models are put into eval mode, because dropout would make them differ.

    Args:
        teacher: the original model.
        converted: its conversion, which is changed.
        batches: token ids of a step; the steps of both stages are counted through.
        align: settings of the first stage, on attention outputs.
        distil: settings of the second stage, on logits.
        rank: of the low-rank updates; 0 for none.
        train_retrieval: whether the parameters of retrieval are trained too.
        checkpoint_folder: contains the checkpoints that the distillation saves and continues from.

    Yields:
        Every step with its loss.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    teacher.eval()
    converted.eval()
    _select_trained_parameters(converted, rank, train_retrieval)
    attentions = converted_attention_names(converted)
    distil_checkpoint = checkpoint_folder / "distil.safetensors"
    if not distil_checkpoint.exists():  # the checkpoint of the second stage holds the result of the first
        steps = minimize(
            converted,
            lambda step: _attention_loss(teacher, converted, attentions, batches(step)),
            align,
            checkpoint_folder / "align.safetensors",
        )
        yield from (DistillationStep("align", step, loss) for step, loss in steps)
    steps = minimize(
        converted, lambda step: _logit_loss(teacher, converted, batches(align.steps + step)), distil, distil_checkpoint
    )
    yield from (DistillationStep("distil", step, loss) for step, loss in steps)
    for module in list(converted.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def count_trained_parameters(converted: nn.Module) -> int:
    """Number of parameters that a distillation trains; it is known after the first step."""
    return sum(parameter.numel() for parameter in converted.parameters() if parameter.requires_grad)


def _select_trained_parameters(converted: PreTrainedModel, rank: int, train_retrieval: bool) -> None:
    """Freezes all parameters, or all but those of retrieval, and adds low-rank updates unless the rank is 0."""
    for parameter in converted.parameters():
        parameter.requires_grad_(False)
    for name in converted_attention_names(converted):
        converted.get_submodule(name).retrieval.requires_grad_(train_retrieval)
    for module, weight in weight_matrices(converted) if rank else ():
        parametrize.register_parametrization(module, "weight", LowRankUpdate(weight, rank))


# --- losses -------------------------------------------------------------------------------------


def _attention_loss(teacher: PreTrainedModel, converted: PreTrainedModel, attentions: list[str], ids: Tensor) -> Tensor:
    """Mean square error of every attention's output over the variance of the teacher's, mean over attentions."""
    losses = []
    for name, call in _record_attention_calls(teacher, attentions, ids).items():
        output = converted.get_submodule(name)(*call.args, **call.kwargs)[0]
        losses.append((output - call.output).square().mean() / call.output.var())
    return torch.stack(losses).mean()


def _logit_loss(teacher: PreTrainedModel, converted: PreTrainedModel, ids: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the next-token distributions from the teacher's, in nats per token."""
    with torch.no_grad():
        teacher_log_probs = teacher(ids, use_cache=False).logits.log_softmax(dim=-1)
    log_probs = converted(ids, use_cache=False).logits.log_softmax(dim=-1)
    return F.kl_div(log_probs.flatten(0, 1), teacher_log_probs.flatten(0, 1), reduction="batchmean", log_target=True)


class AttentionCall(NamedTuple):
    """Arguments and output of one call of an attention module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def _record_attention_calls(teacher: PreTrainedModel, attentions: list[str], ids: Tensor) -> dict[str, AttentionCall]:
    """Runs the teacher on token ids, and returns the call of each of its attentions by name."""
    calls: dict[str, AttentionCall] = {}

    def record(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[name] = AttentionCall(args, kwargs, output[0])

    hooks = [teacher.get_submodule(name).register_forward_hook(partial(record, name), with_kwargs=True) for name in attentions]
    try:
        with torch.no_grad():
            teacher(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
