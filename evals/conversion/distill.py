"""Distils a pretrained model into its conversion: attention outputs layer by layer, then logits. The base stays as it is.

What moves is what retrieval learns, and a low-rank addition to every matrix of the layers (LoRA, arXiv:2106.09685),
which is merged in the end: a distilled model is an ordinary one. In the first stage every attention gets
what the original's gets, so that no layer waits for the ones below it to become right; the second mends what is left.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from bsbr.convert import Retrieval
from evals.training.optimizer import OptimizerSettings, minimize

Batches = Callable[[int], Tensor]
"""The token ids [batch, time] of a step."""


class LowRank(nn.Module):
    """W + A B, A: [rows, rank], zero at first, B: [rank, columns]."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(weight.new_zeros(rows, rank))
        self.b = nn.Parameter(torch.randn(rank, columns, dtype=weight.dtype, device=weight.device) / math.sqrt(columns))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


def distill(
    original: PreTrainedModel,
    converted: PreTrainedModel,
    batches: Batches,
    *,
    align: OptimizerSettings,
    distil: OptimizerSettings,
    rank: int,
    retrieval: bool = True,
    saved: Path,
) -> Iterator[tuple[str, int, float]]:
    """Heals `converted` in place; yields the stage, the step and its loss, and has merged all when it ends.

    batches: of both stages, counted through. rank: of what is added to the weights; 0 adds nothing.
    retrieval: whether what it learns moves, too. saved: a folder for
    the checkpoints, from which it goes on. Both models are put into eval mode: dropout would be one more difference.
    """
    original.eval()
    converted.eval()
    for parameter in converted.parameters():
        parameter.requires_grad_(False)
    attentions = converted_attention_names(converted)
    for name in attentions:
        converted.get_submodule(name).retrieval.requires_grad_(retrieval)
    for part, weight in weight_matrices(converted) if rank else ():
        parametrize.register_parametrization(part, "weight", LowRank(weight, rank))

    def attention_loss(step: int) -> Tensor:
        seen = _seen(original, attentions, batches(step))
        losses = []
        for name, (args, kwargs, wanted) in seen.items():
            got = converted.get_submodule(name)(*args, **kwargs)[0]
            losses.append((got - wanted).square().mean() / wanted.var())
        return torch.stack(losses).mean()

    def logit_loss(step: int) -> Tensor:
        ids = batches(align.steps + step)
        with torch.no_grad():
            wanted = original(ids, use_cache=False).logits.log_softmax(dim=-1)
        got = converted(ids, use_cache=False).logits.log_softmax(dim=-1)
        return F.kl_div(got.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)

    # The second stage's checkpoint holds what the first came to.
    second = saved / "distil.safetensors"
    for stage, loss_of, plan in (("align", attention_loss, align), ("distil", logit_loss, distil)):
        if stage == "align" and second.exists():
            continue
        for step, loss in minimize(converted, loss_of, plan, saved / f"{stage}.safetensors"):
            yield stage, step, loss
    for part in list(converted.modules()):
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)


def weight_matrices(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Parameter]]:
    """The modules of its layers whose weight is a matrix, with that: neither embeddings nor the head."""
    outside = {id(model.get_output_embeddings()), *(id(part) for part in model.modules() if isinstance(part, nn.Embedding))}
    weights = ((part, getattr(part, "weight", None)) for part in model.modules() if id(part) not in outside)
    return [(part, weight) for part, weight in weights if isinstance(weight, nn.Parameter) and weight.dim() == 2]


def converted_attention_names(converted: nn.Module) -> list[str]:
    """The names of its converted attentions, which the original has at the same places."""
    return [name.removesuffix(".retrieval") for name, part in converted.named_modules() if isinstance(part, Retrieval)]


def count_trained_parameters(converted: nn.Module) -> int:
    """How many numbers healing changes."""
    return sum(parameter.numel() for parameter in converted.parameters() if parameter.requires_grad)


def _seen(
    original: PreTrainedModel, attentions: list[str], ids: Tensor
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """What each of the original's attentions was called with, and what came out."""
    seen = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen[name] = (args, kwargs, output[0])

        return hook

    hooks = [original.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in attentions]
    try:
        with torch.no_grad():
            original(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
