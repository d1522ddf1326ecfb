"""The decoders of Hugging Face's models as candidates: original and converted, of random weights, built from a config.

A decoder without its embeddings and head is what an `Attention` is to the harness: hidden states in, hidden states out, causal,
with a state. So it is certified, timed and bounded as attentions are, and layers, feed-forward parts and the library's own overhead
are timed with it. In a sweep, model.scope is `attention`: there is nothing of ours around it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, DynamicCache, PreTrainedModel

from bsbr import reference
from bsbr.convert import Retrieval, convert_to_bsbr
from bsbr.convert import registered as converted_attention
from bsbr.convert.streaming import StreamingLayer
from bsbr.interface import Attention, State, check_hidden_states, next_position, position_counter
from evals.conversion.distill import converted_attention_names, weight_matrices

UNPADDED = "bsbr_unpadded"
"""A conversion's attention without a mask function. Padding is taken out before (`Attention.forward`), and what the library looks
up in data to make a mask would keep `evals.benchmark.cost`, which has none, from counting."""


class PretrainedDecoder(Attention):
    """The layers of a GPT-2, Llama, Mistral or Qwen, with the library's own attention: torch's SDPA.

    model_type: as the library names it. max_length: positions that it has room for; longer sequences are not supported.
    options: of the library's config, such as num_key_value_heads. Raises ValueError for a model that is no decoder.
    """

    slow = "reference_softmax"
    """The attention that the certificate holds this against, as it is registered below."""

    def __init__(
        self, hidden_dim: int, num_heads: int, *, model_type: str, num_layers: int = 2, max_length: int = 32768, **options: Any
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        # Sizes by names that all configs know. One token: embeddings and head have no part in this.
        sizes = {"hidden_size": hidden_dim, "num_attention_heads": num_heads, "num_hidden_layers": num_layers, "vocab_size": 1}
        special = {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": max_length}
        config = AutoConfig.for_model(model_type, **sizes, **special, **self.config_of(model_type, hidden_dim), **options)
        self.max_length = max_length
        self.decoder = self.decoder_of(AutoModel.from_config(config, attn_implementation="sdpa"))
        self.out_proj = nn.Identity()

    @staticmethod
    def config_of(model_type: str, hidden_dim: int) -> dict[str, Any]:
        """What of a config does not follow from the sizes: GPT-2 takes 4 · hidden_dim by itself, and dropout."""
        if model_type == "gpt2":
            return {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return {"intermediate_size": 4 * hidden_dim}

    def decoder_of(self, model: PreTrainedModel) -> PreTrainedModel:
        return model

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        return (hidden_states,)

    def attend(self, *tensors: Tensor) -> Tensor:
        (hidden_states,) = tensors
        self._check_length(hidden_states.shape[1])
        return cast(Tensor, self.decoder(inputs_embeds=hidden_states, use_cache=False).last_hidden_state)

    def reference(self, *tensors: Tensor) -> Tensor:
        with _attention(self.decoder, self.slow):
            return self.attend(*tensors)

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_hidden_states(hidden_states, self.hidden_dim)
        position = next_position(state)
        self._check_length(position + hidden_states.shape[1])
        cache = DynamicCache(config=self.decoder.config)
        if state is not None:
            self.restore(cache, state)
        output = self.decoder(inputs_embeds=hidden_states, cache=cache, use_cache=True).last_hidden_state
        return output, {**self.kept(cache), "position": position_counter(position + hidden_states.shape[1])}

    def restore(self, cache: DynamicCache, state: State) -> None:
        for index, layer in enumerate(cache.layers):
            keys, values = state[f"{index}.keys"], state[f"{index}.values"]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values

    def kept(self, cache: DynamicCache) -> State:
        return {f"{i}.{name}": getattr(layer, name) for i, layer in enumerate(cache.layers) for name in ("keys", "values")}

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """Of all layers: every matrix once a token, and their attentions."""
        dense = 2 * seq_len * sum(weight.numel() for _, weight in weight_matrices(self.decoder))
        return batch_size * (dense + self.num_layers * self.attention_flops(seq_len))

    def attention_flops(self, seq_len: int) -> int:
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
    """`PretrainedDecoder` of the same seed, converted by `convert_to_bsbr`, with its gates at 1, as healing opens them.

    chunk_size, chunk_overlap, retrieval_top_k, compression_factor: see there.
    """

    slow = "reference_bsbr"

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

    def decoder_of(self, model: PreTrainedModel) -> PreTrainedModel:
        converted = convert_to_bsbr(model, **self.conversion)  # type: ignore[arg-type]  # of whole numbers and None
        for part in retrievals(converted):
            nn.init.ones_(part.gate)
        converted.config._attn_implementation = UNPADDED
        return converted

    @property
    def block_length(self) -> int:
        return int(cast(int, self.conversion["chunk_size"]))

    def restore(self, cache: DynamicCache, state: State) -> None:
        for index in range(self.num_layers):
            layer = StreamingLayer()
            prefix = f"{index}."
            layer.state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            layer.seen, layer.is_initialized = next_position(state), True
            cache.layers[index] = layer

    def kept(self, cache: DynamicCache) -> State:
        state: State = {}
        for index, (layer, retrieval) in enumerate(zip(cache.layers, retrievals(self.decoder), strict=True)):
            layer.condense(retrieval)
            state |= {f"{index}.{name}": tensor for name, tensor in layer.state.items()}
        return state

    def attention_flops(self, seq_len: int) -> int:
        return retrievals(self.decoder)[0].flops(seq_len)

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        numbers = retrievals(self.decoder)[0].state_numbers(seq_len)
        return batch_size * self.num_layers * self.dtype.itemsize * numbers

    def implementation(self, *tensors: Tensor) -> str:
        return f"bsbr, {retrievals(self.decoder)[0].implementation()}"


def retrievals(converted: nn.Module) -> list[Retrieval]:
    return [cast(Retrieval, converted.get_submodule(f"{name}.retrieval")) for name in converted_attention_names(converted)]


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """While it lasts, the model's attention is the one that is registered under this name."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _softmax(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """softmax(scaling · QKᵀ + causal) V. Not the library's own plain form, whose softmax is of float32."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
    scores = (scaling * query @ key.mT).masked_fill(future, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


def _bsbr(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """A converted attention by `bsbr.reference`, for whole sequences without padding."""
    retrieval = cast(Retrieval, module.retrieval)
    r, h, q_features, k_features = retrieval.projected(query, key)

    def of(values: Tensor) -> Tensor:
        return reference.bsbr_attention(
            *(query, key, values, r, h),
            chunk_size=retrieval.chunk_size,
            q_features=q_features,
            k_features=k_features,
            gain=retrieval.gain,
            chunk_overlap=retrieval.chunk_overlap,
            top_k=retrieval.top_k,
        )

    far = of(torch.ones_like(value)) - 1  # what is near weighs 1
    return (of(value) / (1 + far.abs())).transpose(1, 2), None


AttentionInterface.register(UNPADDED, converted_attention.attention)
for name, plain in ((PretrainedDecoder.slow, _softmax), (ConvertedDecoder.slow, _bsbr)):
    AttentionInterface.register(name, plain)
    AttentionMaskInterface.register(name, converted_attention.mask)  # none, where there is no padding
