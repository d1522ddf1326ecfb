"""BSBR: Block Sparse attention with Block Retrieval. Needs torch alone.

`bsbr_attention` is the attention as a function of tensors, `BSBRAttention` the module with its projections, and `BSBRModel` a
decoder made of it; `CausalLM` adds a language-model head to any decoder. `Attention` and `MultiHeadAttention` are the contract
that every attention of a comparison implements, and `TransformerLayer` and `TransformerModel` take any of them.

    attention = BSBRAttention(hidden_dim=256, num_heads=4, chunk_size=64)
    output = attention(hidden_states)                    # [batch, time, 256]
    output, state = attention.extend(hidden_states)      # the same, and a state that further tokens continue

Elsewhere: `bsbr.context_parallel` runs one sequence across processes, `bsbr.reference` is the slow definition that tests compare
with, `bsbr.backends` holds the implementations, and `bsbr.convert` converts pretrained Hugging Face models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bsbr.attention import BSBRAttention, bsbr_attention
    from bsbr.inputs import BSBRInputs, BSBROptions
    from bsbr.interface import Attention, MultiHeadAttention, State
    from bsbr.model import BSBRLayer, BSBRModel, CausalLM, TransformerLayer, TransformerModel
    from bsbr.token_retrieval.attention import TokenRetrievalAttention

__all__ = [
    "Attention",
    "BSBRAttention",
    "BSBRInputs",
    "BSBRLayer",
    "BSBRModel",
    "BSBROptions",
    "CausalLM",
    "MultiHeadAttention",
    "State",
    "TokenRetrievalAttention",
    "TransformerLayer",
    "TransformerModel",
    "bsbr_attention",
]


# Modules are imported at the first use of a name: torch takes seconds, and `bsbr --help` and shell completion need none of them.
_HOMES = {
    "attention": ("BSBRAttention", "bsbr_attention"),
    "inputs": ("BSBRInputs", "BSBROptions"),
    "interface": ("Attention", "MultiHeadAttention", "State"),
    "model": ("BSBRLayer", "BSBRModel", "CausalLM", "TransformerLayer", "TransformerModel"),
    "token_retrieval.attention": ("TokenRetrievalAttention",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"bsbr.{module}"), name)
    raise AttributeError(f"module 'bsbr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
