"""Modules of original and converted models that the harness looks up: weight matrices, attentions and their retrieval."""

from torch import nn
from transformers import PreTrainedModel

from bsbr.convert import Retrieval


def weight_matrices(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Parameter]]:
    """Modules with a weight matrix, and their weights, without embeddings and the head."""
    outside = {id(model.get_output_embeddings()), *(id(part) for part in model.modules() if isinstance(part, nn.Embedding))}
    weights = ((part, getattr(part, "weight", None)) for part in model.modules() if id(part) not in outside)
    return [(part, weight) for part, weight in weights if isinstance(weight, nn.Parameter) and weight.dim() == 2]


def converted_attention_names(converted: nn.Module) -> list[str]:
    """Names of the converted attention modules; the original model has its attentions under the same names."""
    return [name.removesuffix(".retrieval") for name, part in converted.named_modules() if isinstance(part, Retrieval)]


def retrievals(converted: nn.Module) -> list[Retrieval]:
    """The `Retrieval` of every converted attention, in order."""
    return [part for part in converted.modules() if isinstance(part, Retrieval)]
