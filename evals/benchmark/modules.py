"""Modules that are timed or trained: an attention with its projections, a layer of the decoder, or the whole model."""

from torch import nn

from bsbr.interface import Attention
from bsbr.model import CausalLM, TransformerLayer, TransformerModel
from evals.config import Candidate, Comparison

Module = Attention | TransformerLayer | CausalLM


def build_module(comparison: Comparison, candidate: Candidate) -> Module:
    """Builds what the comparison's scope names: an attention with its projections, a layer of the decoder, or the whole model."""
    model = comparison.model
    if model.scope == "attention":
        return candidate.build(model)
    ff_dim = model.ff_dim if candidate.ff_dim is None else candidate.ff_dim

    def attention(**_: int) -> Attention:
        return candidate.build(model)

    if model.scope == "layer":
        return TransformerLayer(model.hidden_dim, model.num_heads, ff_dim, attention=attention, conv_size=model.conv_size)
    sizes = (model.vocab_size, model.hidden_dim, model.num_layers, model.num_heads, ff_dim)
    positions = model.positions == "sinusoidal"
    return CausalLM(TransformerModel(*sizes, attention=attention, conv_size=model.conv_size, positions=positions))


def attentions_of(module: nn.Module) -> list[Attention]:
    """All attentions in a module, itself included."""
    return [part for part in module.modules() if isinstance(part, Attention)]


def longest_block(module: Module) -> int:
    """Length of the longest block of any attention in a module; 1 if no attention overrides `block_length`."""
    return max(
        (one.block_length for one in attentions_of(module) if type(one).block_length is not Attention.block_length), default=1
    )
