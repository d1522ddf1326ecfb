"""Decoders of Hugging Face models as candidates: an original and its conversion, built from a config with random weights.

A decoder without its embeddings and head keeps the contract of `Attention`: it is a causal map of hidden states with a state.
The harness certifies and times it like an attention, including its feed-forward parts and the library's overhead. A sweep sets
model.scope to `attention`, so that no part of the harness's own model is added.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, DynamicCache, PreTrainedModel

from bsbr import reference
from bsbr.convert import Retrieval, attention_interface, convert_to_bsbr
from bsbr.convert.streaming import StreamingLayer
from bsbr.interface import Attention, State, check_hidden_states, next_position, position_counter
from evals.conversion.modules import retrievals, weight_matrices

UNPADDED = "bsbr_unpadded"
"""Name of a conversion's attention without a mask function. `Attention.forward` removes padding, so no mask is needed; and building
a mask reads data, which do not exist when `evals.benchmark.cost` counts FLOPs."""


class PretrainedDecoder(Attention):
    """The layers of a GPT-2, Llama, Mistral or Qwen, with the library's own attention: torch's SDPA.

    Args:
        hidden_dim, num_heads: as in `Attention`.
        model_type: the library's name of the architecture.
        num_layers: number of layers.
        max_length: positions of the model; longer sequences raise NotImplementedError.
        options: other options of the library's config, such as num_key_value_heads.

    Raises:
        ValueError: for a model that is not a decoder.
    """

    reference_attention = "reference_softmax"
    """Registered name of the attention that `reference` uses."""

    def __init__(
        self, hidden_dim: int, num_heads: int, *, model_type: str, num_layers: int = 2, max_length: int = 32768, **options: Any
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        # Sizes under names that all configs know. A vocabulary of one token: embeddings and head are not used.
        sizes = {"hidden_size": hidden_dim, "num_attention_heads": num_heads, "num_hidden_layers": num_layers, "vocab_size": 1}
        special = {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": max_length}
        # GPT-2 takes a feed-forward width of 4 · hidden_dim by itself, and has dropout.
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        by_type = no_dropout if model_type == "gpt2" else {"intermediate_size": 4 * hidden_dim}
        config = AutoConfig.for_model(model_type, **sizes, **special, **by_type, **options)
        self.max_length = max_length
        self.decoder = self.prepare(AutoModel.from_config(config, attn_implementation="sdpa"))
        self.out_proj = nn.Identity()

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """The decoder to measure, from one with random weights."""
        return model

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        return (hidden_states,)

    def attend(self, *tensors: Tensor) -> Tensor:
        (hidden_states,) = tensors
        self._check_length(hidden_states.shape[1])
        return cast(Tensor, self.decoder(inputs_embeds=hidden_states, use_cache=False).last_hidden_state)

    def reference(self, *tensors: Tensor) -> Tensor:
        with _attention_implementation(self.decoder, self.reference_attention):
            return self.attend(*tensors)

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_hidden_states(hidden_states, self.hidden_dim)
        position = next_position(state)
        self._check_length(position + hidden_states.shape[1])
        cache = DynamicCache(config=self.decoder.config)
        if state is not None:
            self.load_cache(cache, state)
        output = self.decoder(inputs_embeds=hidden_states, cache=cache, use_cache=True).last_hidden_state
        return output, {**self.cache_tensors(cache), "position": position_counter(position + hidden_states.shape[1])}

    def load_cache(self, cache: DynamicCache, state: State) -> None:
        """Fills an empty cache with the tensors of a state."""
        for index, layer in enumerate(cache.layers):
            keys, values = state[f"{index}.keys"], state[f"{index}.values"]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values

    def cache_tensors(self, cache: DynamicCache) -> State:
        """Tensors of a cache, as a state without a position."""
        return {f"{i}.{name}": getattr(layer, name) for i, layer in enumerate(cache.layers) for name in ("keys", "values")}

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """FLOPs of all layers: every weight matrix once per token, and the attentions."""
        dense = 2 * seq_len * sum(weight.numel() for _, weight in weight_matrices(self.decoder))
        return batch_size * (dense + self.num_layers * self.attention_flops(seq_len))

    def attention_flops(self, seq_len: int) -> int:
        """FLOPs of one layer's attention for one sequence."""
        return 4 * self.num_heads * self.head_dim * (seq_len * (seq_len + 1) // 2)

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        return batch_size * self.num_layers * self.dtype.itemsize * 2 * self.num_kv_heads * seq_len * self.head_dim

    @property
    def num_layers(self) -> int:
        return int(self.decoder.config.num_hidden_layers)

    @property
    def num_kv_heads(self) -> int:
        return int(getattr(self.decoder.config, "num_key_value_heads", None) or self.num_heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.decoder.config, "head_dim", None) or self.hidden_dim // self.num_heads)

    def implementation(self, *tensors: Tensor) -> str:
        return str(self.decoder.config._attn_implementation)

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise NotImplementedError(f"its positions end at max_length={self.max_length}, got {length} tokens: raise it")


class ConvertedDecoder(PretrainedDecoder):
    """`PretrainedDecoder` of the same seed, converted by `convert_to_bsbr`, its gates at 1 as if distillation had opened them.

    Args:
        hidden_dim, num_heads, options: as in `PretrainedDecoder`.
        chunk_size, chunk_overlap, retrieval_top_k, compression_factor: as in `convert_to_bsbr`.
    """

    reference_attention = "reference_bsbr"

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        chunk_size: int = 128,
        chunk_overlap: int = 0,
        retrieval_top_k: int | None = None,
        compression_factor: int = 1,
        **options: Any,
    ) -> None:
        self.conversion = {
            "chunk_size": chunk_size,
            "chunk_overlap": chunk_overlap,
            "retrieval_top_k": retrieval_top_k,
            "compression_factor": compression_factor,
        }
        super().__init__(hidden_dim, num_heads, **options)

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        converted = convert_to_bsbr(model, **self.conversion)  # type: ignore[arg-type]  # of whole numbers and None
        for retrieval in retrievals(converted):
            nn.init.ones_(retrieval.gate)
        converted.config._attn_implementation = UNPADDED
        return converted

    @property
    def block_length(self) -> int:
        return int(cast(int, self.conversion["chunk_size"]))

    def load_cache(self, cache: DynamicCache, state: State) -> None:
        for index in range(self.num_layers):
            layer = StreamingLayer()
            prefix = f"{index}."
            layer.state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            layer.num_tokens, layer.is_initialized = next_position(state), True
            cache.layers[index] = layer

    def cache_tensors(self, cache: DynamicCache) -> State:
        state: State = {}
        for index, (layer, retrieval) in enumerate(zip(cache.layers, retrievals(self.decoder), strict=True)):
            layer.summarize_prompt(retrieval)
            state |= {f"{index}.{name}": tensor for name, tensor in layer.state.items()}
        return state

    def attention_flops(self, seq_len: int) -> int:
        return retrievals(self.decoder)[0].flops(seq_len)

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        elements = retrievals(self.decoder)[0].state_elements(seq_len)
        return batch_size * self.num_layers * self.dtype.itemsize * elements

    def implementation(self, *tensors: Tensor) -> str:
        return f"bsbr, {retrievals(self.decoder)[0].implementation()}"


# --- reference attentions -----------------------------------------------------------------------


@contextmanager
def _attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Runs the model with the attention registered as `name` while the context is open."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _reference_softmax(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """softmax(scaling · QKᵀ + causal) V in the precision of the inputs; the library's own eager form computes it in float32."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
    scores = (scaling * query @ key.mT).masked_fill(future, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


def _reference_bsbr(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """A converted attention by `bsbr.reference`, for whole sequences without padding."""
    retrieval = cast(Retrieval, module.retrieval)
    inputs = retrieval.project(query, key, value)

    def bsbr(values: Tensor) -> Tensor:
        return reference.bsbr_attention(
            **inputs._replace(v=values)._asdict(),
            chunk_size=retrieval.chunk_size,
            chunk_overlap=retrieval.chunk_overlap,
            top_k=retrieval.top_k,
        )

    retrieved_weight = bsbr(torch.ones_like(value)) - 1  # local tokens weigh 1
    return (bsbr(value) / (1 + retrieved_weight.abs())).transpose(1, 2), None


AttentionInterface.register(UNPADDED, attention_interface.attention)
for name, function in (
    (PretrainedDecoder.reference_attention, _reference_softmax),
    (ConvertedDecoder.reference_attention, _reference_bsbr),
):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, attention_interface.padding_mask)  # none, where there is no padding
