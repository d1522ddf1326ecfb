"""Which models can be converted, and the classes that they become: the library's own, with a `Retrieval` in every attention."""

import inspect
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from bsbr.convert import registered
from bsbr.convert.retrieval import Retrieval


class Family(NamedTuple):
    """An architecture: its self-attentions by class and, where cross-attentions share the class, the name that these do not have.

    width: the attribute of an attention that is its head_dim. causal: whether tokens see the past alone in all of them.
    """

    attention: str
    width: str = "head_dim"
    cross: str | None = None
    causal: bool = True


FAMILIES = {
    "gpt2": Family("GPT2Attention", cross="crossattention"),
    "llama": Family("LlamaAttention"),
    "mistral": Family("MistralAttention"),
    "qwen2": Family("Qwen2Attention"),
    "qwen3": Family("Qwen3Attention"),
    "bert": Family("BertSelfAttention", width="attention_head_size", causal=False),
    "t5": Family("T5Attention", width="key_value_proj_dim", cross="EncDecAttention", causal=False),
}
"""By model_type."""

AUTO_CLASSES = (
    *("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"),
    *("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"),
)


class Converted:
    """Mixed into a model class of the library: what its `config.bsbr` says of retrieval, each self-attention has."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        config._attn_implementation = registered.NAME
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        family = FAMILIES[config.model_type.removeprefix("bsbr_")]
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        for attention in self_attentions(cast(nn.Module, self), family):
            width = getattr(attention, family.width)
            attention.retrieval = Retrieval(config.num_attention_heads, kv_heads, width, **config.bsbr)
            attention.register_forward_pre_hook(registered.bring_cache, with_kwargs=True)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """As the library's, from safetensors."""
        return super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})  # type: ignore[misc]


def convert_to_bsbr(
    model_or_name: PreTrainedModel | str | Path,
    chunk_size: int = 128,
    *,
    chunk_overlap: int = 0,
    retrieval_top_k: int | None = None,
    compression_factor: int = 1,
) -> PreTrainedModel:
    """A pretrained model whose self-attention is BSBR, all else as it was; what is given is left as it is.

    model_or_name: a model of GPT-2, Llama, Mistral, Qwen 2 or 3, BERT or T5, or the name or folder of one, whose weights
    are read from safetensors. It keeps its dtype, device, `generate`, `save_pretrained` and `from_pretrained`; after
    `import bsbr.convert`, `AutoModelForCausalLM.from_pretrained` and its like read what it saved. Tokenizers do not change.

    What retrieval learns stands behind gates at 0: until it is trained, a token sees its chunk and the `chunk_overlap`
    tokens before that, and the logits of a sequence of at most one chunk are the original's. BERT and T5's encoder
    retrieve from the chunks on both sides. Attention of T5's decoder to its encoder stays whole. A sliding window, as
    Mistral has, must be no shorter than chunk_size + chunk_overlap: the local part then lies inside it, and retrieval takes
    the place of all beyond. Options: see `bsbr.BSBRAttention`; chunk_overlap needs a model of one direction alone, and no bias.

    Raises ValueError for another architecture, or options that it cannot have.
    """
    if not isinstance(model_or_name, PreTrainedModel):
        return convert_to_bsbr(
            load(str(model_or_name)),
            chunk_size,
            chunk_overlap=chunk_overlap,
            retrieval_top_k=retrieval_top_k,
            compression_factor=compression_factor,
        )
    model = model_or_name
    family = family_of(model.config)
    if chunk_overlap and not family.causal:
        raise ValueError(f"chunk_overlap is for models that see the past alone, and {model.config.model_type} is none: leave it 0")
    config = converted_config(model.config, chunk_size + chunk_overlap)
    config.bsbr = {
        "chunk_size": chunk_size,
        "chunk_overlap": chunk_overlap,
        "retrieval_top_k": retrieval_top_k,
        "compression_factor": compression_factor,
    }
    converted = converted_class(type(model))(config)  # type: ignore[arg-type]  # of what is Any here
    # Assigned, so that every tensor keeps its dtype and device: some models hold a few in float32 beside bfloat16.
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    missing, unexpected = converted.load_state_dict(state, strict=False, assign=True)
    strange = [name for name in [*missing, *unexpected] if ".retrieval." not in name]
    if strange:
        raise ValueError(f"a model of {type(model).__name__} has its own weights alone, and this one does not fit: {strange[0]}")
    converted.tie_weights()
    buffers = dict(converted.named_buffers())
    for name, buffer in model.named_buffers():
        buffers[name].data = buffer.clone()
    for attention in self_attentions(converted, family):
        like = next(attention.parameters(recurse=True))
        attention.retrieval.to(like.device, like.dtype)
    if model.can_generate():
        converted.generation_config = deepcopy(model.generation_config)
    return converted.train(model.training)


def load(name: str) -> PreTrainedModel:
    """The model that `name` has, from safetensors, as the class that it was saved as. Raises ValueError for one not supported."""
    config = AutoConfig.from_pretrained(name)
    family_of(config)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        raise ValueError(f"{name} does not say of which class its model is: load it yourself, and convert the model")
    try:
        return cast(PreTrainedModel, cls.from_pretrained(name, use_safetensors=True))
    except OSError as error:
        if "safetensors" in str(error):
            raise ValueError(f"{name} has no weights as safetensors, and no other kind is read: save it as such first") from error
        raise


def family_of(config: PreTrainedConfig) -> Family:
    """Raises ValueError unless the architecture is one of `FAMILIES`."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"a model to convert must be one of {', '.join(FAMILIES)}, got model_type={config.model_type!r}")
    return FAMILIES[config.model_type]


def self_attentions(model: nn.Module, family: Family) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if type(module).__name__ == family.attention and not (family.cross and family.cross in name):
            yield module


# --- classes ------------------------------------------------------------------------------------


@cache
def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The library's config under a model_type of its own, so that nothing loads a converted model as what it was."""
    base = type(AutoConfig.for_model(model_type))
    made = type(f"BSBR{base.__name__}", (base,), {"model_type": f"bsbr_{model_type}", "__module__": __name__})
    setattr(sys.modules[__name__], made.__name__, made)
    return made


@cache
def converted_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    config = config_class(cls.config_class.model_type)
    body = {"config_class": config, "__module__": __name__, "__doc__": f"`{cls.__name__}` whose attention is BSBR."}
    body["__signature__"] = inspect.signature(cls.__init__)
    made = type(f"BSBR{cls.__name__}", (Converted, cls), body)
    setattr(sys.modules[__name__], made.__name__, made)
    return made


def converted_config(config: PreTrainedConfig, reach: int) -> PreTrainedConfig:
    """A copy under its new type, without sliding windows. reach: tokens that the local part sees at most."""
    values = deepcopy(config.to_dict())
    window = values.get("sliding_window")
    if window is not None:
        if reach > window:
            raise ValueError(
                f"chunk_size + chunk_overlap must be at most the model's sliding window of {window} tokens, got {reach}"
            )
        values |= {"sliding_window": None}
        values |= {"use_sliding_window": False} if "use_sliding_window" in values else {}
    if values.get("layer_types"):
        values["layer_types"] = ["full_attention"] * len(values["layer_types"])
    values = {key: value for key, value in values.items() if key not in ("model_type", "transformers_version", "architectures")}
    return cast(PreTrainedConfig, config_class(config.model_type).from_dict(values))


def register() -> None:
    """Lets AutoConfig and AutoModel… read what converted models save."""
    for model_type in FAMILIES:
        config = config_class(model_type)
        AutoConfig.register(config.model_type, config)
        for name in AUTO_CLASSES:
            auto = getattr(transformers, name)
            original = auto._model_mapping.get(type(AutoConfig.for_model(model_type)), None)
            if original is not None:
                auto.register(config, converted_class(original))


register()
