"""Evaluation of conversions on held-out text: their loss, and their similarity to the teacher."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from evals.conversion.teachers import token_losses
from evals.results.ledger import Record

TOP_K = (1, 5, 10)
"""The k of the agreement with the teacher's most likely token."""


class Outputs(NamedTuple):
    """Outputs of a model for a batch of windows."""

    logits: Tensor  # [batch, context − 1, vocabulary], for every token but the first
    hidden_states: Tensor  # [batch, context, hidden], after the last layer


@torch.no_grad()
def evaluate(
    teacher: PreTrainedModel, models: Mapping[str, PreTrainedModel], windows: Sequence[Tensor], chunk_size: int
) -> dict[str, Record]:
    """Evaluates models on the same windows.

    Args:
        teacher: the original model.
        models: the models to evaluate, by name; the teacher can be one of them.
        windows: batches of token ids, [batch, context] each, context a multiple of chunk_size.
        chunk_size: number of tokens of a chunk.

    Returns:
        By model, means over tokens: `nats`, the loss; `cosine` and `mse` of the last hidden states against the teacher's, `mse`
        over the teacher's mean square; `kl`, the divergence of the next-token distributions from the teacher's, in nats; `top_k`,
        how often the teacher's most likely token is among the model's k most likely. `perplexity` is exp(nats); `chunk_nats` is
        the mean loss in each chunk of the context.
    """
    batches: dict[str, dict[str, list[Tensor]]] = {name: {} for name in models}
    for ids in windows:
        teacher_outputs = _outputs(teacher, ids)
        for name, model in models.items():
            outputs = teacher_outputs if model is teacher else _outputs(model, ids)
            for measure, values in _measure_tokens(outputs, teacher_outputs, ids).items():
                batches[name].setdefault(measure, []).append(values)
    return {name: _means(measures, chunk_size) for name, measures in batches.items()}


def _outputs(model: PreTrainedModel, ids: Tensor) -> Outputs:
    output = model(ids, use_cache=False, output_hidden_states=True)
    return Outputs(output.logits[:, :-1], output.hidden_states[-1])


def _measure_tokens(outputs: Outputs, teacher: Outputs, ids: Tensor) -> dict[str, Tensor]:
    """Measures of every token: [batch, context] for those of hidden states, [batch, context − 1] for those of logits."""
    teacher_log_probs, log_probs = teacher.logits.log_softmax(dim=-1), outputs.logits.log_softmax(dim=-1)
    most_likely = teacher.logits.argmax(dim=-1, keepdim=True)
    squared_error = (outputs.hidden_states - teacher.hidden_states).square().mean(dim=-1)
    return {
        "nats": token_losses(outputs.logits, ids),
        "cosine": F.cosine_similarity(outputs.hidden_states, teacher.hidden_states, dim=-1),
        "mse": squared_error / teacher.hidden_states.square().mean(),
        "kl": (teacher_log_probs.exp() * (teacher_log_probs - log_probs)).sum(dim=-1),
        **{f"top_{k}": (outputs.logits.topk(k, dim=-1).indices == most_likely).any(dim=-1).float() for k in TOP_K},
    }


def _means(measures: Mapping[str, Sequence[Tensor]], chunk_size: int) -> Record:
    """Means over all tokens of all batches, and the loss of each chunk; the first chunk has no loss for its first token."""
    tokens = {measure: torch.cat(list(batches)) for measure, batches in measures.items()}
    means = {measure: float(values.mean()) for measure, values in tokens.items()}
    by_position = tokens["nats"].mean(dim=0)
    chunks = by_position.split([chunk_size - 1, *[chunk_size] * (len(by_position) // chunk_size)])
    return {**means, "perplexity": math.exp(means["nats"]), "chunk_nats": [float(chunk.mean()) for chunk in chunks]}
