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

from bsbr.attention import BSBRAttention, bsbr_attention
from bsbr.inputs import BSBRInputs, BSBROptions
from bsbr.interface import Attention, MultiHeadAttention, State
from bsbr.model import BSBRLayer, BSBRModel, CausalLM, TransformerLayer, TransformerModel

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
    "TransformerLayer",
    "TransformerModel",
    "bsbr_attention",
]
