"""BSBR: Block Sparse attention with Block Retrieval. Torch only."""

from bsbr.attention import BSBRAttention, bsbr_attention
from bsbr.interface import Attention, MultiHeadAttention, State
from bsbr.model import BSBRLayer, BSBRModel, CausalLM, TransformerLayer, TransformerModel

__all__ = [
    "Attention",
    "BSBRAttention",
    "BSBRLayer",
    "BSBRModel",
    "CausalLM",
    "MultiHeadAttention",
    "State",
    "TransformerLayer",
    "TransformerModel",
    "bsbr_attention",
]
