"""BSBR: Block Sparse attention with Block Retrieval. Torch only."""

from bsbr.attention import BSBRAttention, bsbr_attention
from bsbr.interface import Attention, MultiHeadAttention, State

__all__ = ["Attention", "BSBRAttention", "MultiHeadAttention", "State", "bsbr_attention"]
