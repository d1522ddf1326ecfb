"""Conversion of pretrained models: the supported architectures, and the classes of converted models.

A converted class is the library's own, with a `Retrieval` in every self-attention.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from bsbr.convert import attention_interface
from bsbr.convert.retrieval import Retrieval


class Architecture(NamedTuple):
    """How to find and convert the self-attentions of an architecture.

    Attributes:
        attention: class name of its attention modules.
        head_dim: name of the attribute in which such a module stores its head_dim.
        cross_attention: part of the module names of cross-attentions that have the same class; None if there are none.
        is_causal: whether all self-attentions are causal.
    """

    attention: str
    head_dim: str = "head_dim"
    cross_attention: str | None = None
    is_causal: bool = True


ARCHITECTURES = {
    "gpt2": Architecture("GPT2Attention", cross_attention="crossattention"),
    "llama": Architecture("LlamaAttention"),
    "mistral": Architecture("MistralAttention"),
    "qwen2": Architecture("Qwen2Attention"),
    "qwen3": Architecture("Qwen3Attention"),
    "bert": Architecture("BertSelfAttention", head_dim="attention_head_size", is_causal=False),
    "t5": Architecture("T5Attention", head_dim="key_value_proj_dim", cross_attention="EncDecAttention", is_causal=False),
}
"""Supported architectures by model_type."""


def convert_to_bsbr(
    model_or_name: PreTrainedModel | str | Path,
    chunk_size: int = 128,
    *,
    chunk_overlap: int = 0,
    retrieval_top_k: int | None = None,
    compression_factor: int = 1,
) -> PreTrainedModel:
    """Converts a pretrained model: its self-attention becomes BSBR, everything else stays. The original is not changed.

    The converted model keeps its dtype, device, tokenizer, `generate`, `save_pretrained` and `from_pretrained`. Frozen parameters
    stay frozen, and every module keeps its mode (train or eval) and its gradient checkpointing. Hooks are not copied. After
    `import bsbr.convert`, `AutoModelForCausalLM.from_pretrained` and the other auto classes load what it saved; so does its own
    class, as in `from bsbr.convert.models import BSBRGPT2LMHeadModel`. The conversion holds the weights once more and nothing
    else of their size.

    The gates of retrieval begin at 0: until they are trained, a token sees only its chunk and the `chunk_overlap` tokens before the
    chunk. A sequence of at most one chunk has the logits of the original model. BERT and T5's encoder retrieve from the chunks on
    both sides. T5's cross-attention stays softmax attention. In a model with a sliding window, such as Mistral, the local part
    and retrieval replace the window.

    Args:
        model_or_name: a GPT-2, Llama, Mistral, Qwen 2, Qwen 3, BERT or T5 model, or the name or folder of one, whose weights are
            read from safetensors.
        chunk_size: tokens of a chunk.
        chunk_overlap: number of tokens before its chunk that a token also sees. For causal models without position bias.
        retrieval_top_k: number of chunks that a chunk retrieves, those with the highest scores; None for all.
        compression_factor: head_dim / d_r, a divisor of the model's head_dim.

    Returns:
        The converted model. The parameters of its retrieval are trainable.

    Raises:
        ValueError: for something that is no model, an unsupported architecture, a name or folder without safetensors, a model that
            outputs attention weights, or options that do not fit the model, such as chunk_size + chunk_overlap above its sliding
            window.
    """
    if isinstance(model_or_name, str | Path):
        model = load_model(str(model_or_name))
    elif isinstance(model_or_name, PreTrainedModel):
        model = model_or_name
    else:
        raise ValueError(
            "a model to convert must be a PreTrainedModel of transformers, or the name or folder of one, got "
            f"{type(model_or_name).__name__}; of a wrapped model, convert the model inside"
        )
    architecture = architecture_of(model.config)
    if chunk_overlap and not architecture.is_causal:
        raise ValueError(f"chunk_overlap is for models that see the past alone, and {model.config.model_type} is none: leave it 0")
    if model.config.output_attentions:
        raise ValueError("a converted model has no attention weights to output: set config.output_attentions = False first")
    config = converted_config(model.config, chunk_size + chunk_overlap)
    config.bsbr = {
        "chunk_size": chunk_size,
        "chunk_overlap": chunk_overlap,
        "retrieval_top_k": retrieval_top_k,
        "compression_factor": compression_factor,
    }
    with torch.device("meta"):  # which allocates nothing: all weights are the model's
        converted = converted_class(type(model))(config)  # type: ignore[arg-type]  # transformers is Any to mypy
    _copy_state(model, converted)
    for attention in self_attentions(converted, architecture):
        weight = next(attention.parameters(recurse=True))
        attention.retrieval = new_retrieval(attention, config).to(weight.device, weight.dtype).train(attention.training)
    if model.can_generate():
        converted.generation_config = deepcopy(model.generation_config)
    return converted


def _copy_state(model: PreTrainedModel, converted: PreTrainedModel) -> None:
    """Copies parameters, buffers, train or eval mode and gradient checkpointing of every module into its converted counterpart."""
    shapes, converted_shapes = (
        {name: parameter.shape for name, parameter in one.named_parameters(remove_duplicate=False) if ".retrieval." not in name}
        for one in (model, converted)
    )
    if shapes != converted_shapes:
        name = sorted(shapes.items() ^ converted_shapes.items())[0][0]
        raise ValueError(f"a model of {type(model).__name__} has its own weights alone, and this one does not fit: {name}")
    memo: dict[int, Any] = {}  # a parameter of two modules is copied once
    modes = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
    for name, module in model.named_modules():
        counterpart = converted.get_submodule(name)
        counterpart._parameters.update(deepcopy(module._parameters, memo))
        counterpart._buffers.update(deepcopy(module._buffers, memo))
        vars(counterpart).update({key: vars(module)[key] for key in modes if key in vars(module)})
    if getattr(model, "_require_grads_hooks", None):
        converted.enable_input_require_grads()


def load_model(name: str) -> PreTrainedModel:
    """Loads a pretrained model from safetensors, as the class that its config names.

    Raises:
        ValueError: if the architecture is not supported, the class is unknown, or there are no safetensors.
    """
    config = AutoConfig.from_pretrained(name)
    architecture_of(config)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        raise ValueError(f"{name} does not say of which class its model is: load it yourself, and convert the model")
    try:
        return cast(PreTrainedModel, cls.from_pretrained(name, use_safetensors=True))
    except OSError as error:
        if "safetensors" in str(error):
            raise ValueError(f"{name} has no weights as safetensors, and no other kind is read: save it as such first") from error
        raise


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Looks up a model's architecture. Raises ValueError if it is not in `ARCHITECTURES`."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"a model to convert must be one of {', '.join(ARCHITECTURES)}, got model_type={config.model_type!r}")
    return ARCHITECTURES[config.model_type]


def self_attentions(model: nn.Module, architecture: Architecture) -> Iterator[nn.Module]:
    """The self-attention modules of a model."""
    for name, module in model.named_modules():
        is_cross_attention = architecture.cross_attention is not None and architecture.cross_attention in name
        if type(module).__name__ == architecture.attention and not is_cross_attention:
            yield module


def _stacks(model: nn.Module) -> Iterator[nn.Module]:
    """The library's models inside a model, or itself, that hold no other: those that turn masks and hidden states into outputs."""
    for module in model.modules():
        inner = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
        if inner == [module]:
            yield module


def new_retrieval(attention: nn.Module, config: PreTrainedConfig) -> Retrieval:
    """The untrained retrieval of a self-attention of a converted model, with the options in `config.bsbr`."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(attention, converted_architecture(config).head_dim)
    return Retrieval(config.num_attention_heads, kv_heads, head_dim, **config.bsbr)


def converted_architecture(config: PreTrainedConfig) -> Architecture:
    """Architecture of the model that was converted to one of this config."""
    return ARCHITECTURES[config.model_type.removeprefix("bsbr_")]


# --- classes ------------------------------------------------------------------------------------


class ConvertedModel:
    """Mixin for a model class of transformers: adds to each self-attention a `Retrieval` with the options in `config.bsbr`."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        config._attn_implementation = attention_interface.ATTENTION_NAME
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for attention in self_attentions(cast(nn.Module, self), converted_architecture(config)):
            attention.retrieval = new_retrieval(attention, config)
            attention.register_forward_pre_hook(attention_interface.pass_cache_layer, with_kwargs=True)
        for stack in _stacks(cast(nn.Module, self)):
            stack.register_forward_pre_hook(attention_interface.check_arguments, with_kwargs=True)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError for another attention than BSBR, which would not retrieve."""
        if attn_implementation != attention_interface.ATTENTION_NAME:
            raise NotImplementedError(f"the attention of a converted model is BSBR, got {attn_implementation!r}")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Loads as the library's class does, from safetensors only."""
        return super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})  # type: ignore[misc]


@cache
def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The library's config class under its own model_type, so that no converted model is loaded as an original one."""
    base = type(AutoConfig.for_model(model_type))
    cls = type(f"BSBR{base.__name__}", (base,), {"model_type": f"bsbr_{model_type}", "__module__": __name__})
    setattr(sys.modules[__name__], cls.__name__, cls)
    return cls


@cache
def converted_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of a converted model: the library's class with `ConvertedModel` mixed in."""
    name, config = model_class.__name__, config_class(model_class.config_class.model_type)
    body = {"config_class": config, "__module__": __name__, "__doc__": f"`{name}` whose attention is BSBR."}
    body["__signature__"] = inspect.signature(model_class.__init__)
    cls = type(f"BSBR{name}", (ConvertedModel, model_class), body)
    setattr(sys.modules[__name__], cls.__name__, cls)
    return cls


def converted_config(config: PreTrainedConfig, num_local_tokens: int) -> PreTrainedConfig:
    """Copies a config as its converted class, without sliding windows.

    Args:
        config: config of the original model.
        num_local_tokens: chunk_size + chunk_overlap.

    Raises:
        ValueError: if num_local_tokens exceeds the model's sliding window.
    """
    values = deepcopy(config.to_dict())
    window = values.get("sliding_window")
    if window is not None:
        if num_local_tokens > window:
            raise ValueError(
                f"chunk_size + chunk_overlap must be at most the model's sliding window of {window} tokens, got {num_local_tokens}"
            )
        values |= {"sliding_window": None}
        values |= {"use_sliding_window": False} if "use_sliding_window" in values else {}
    if values.get("layer_types"):
        values["layer_types"] = ["full_attention"] * len(values["layer_types"])
    values = {key: value for key, value in values.items() if key not in ("model_type", "transformers_version", "architectures")}
    return cast(PreTrainedConfig, config_class(config.model_type).from_dict(values))


def register() -> None:
    """Registers the converted classes with transformers' auto classes, so that these load saved converted models."""
    candidates: list[Any] = [one for one in vars(modeling_auto).values() if isinstance(one, type)]
    auto_classes = [one for one in candidates if getattr(one, "_model_mapping", None) is not None]
    for model_type in ARCHITECTURES:
        config = config_class(model_type)
        AutoConfig.register(config.model_type, config)
        for auto in auto_classes:
            original = auto._model_mapping.get(config.__base__, None)
            if getattr(original, "config_class", None) is config.__base__:  # some map a config to several classes, or to others
                auto.register(config, converted_class(original))


def __getattr__(name: str) -> type[PreTrainedModel]:
    """The converted class of a library class, as in `from bsbr.convert.models import BSBRT5EncoderModel`."""
    for model_type in ARCHITECTURES:
        library = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        original = getattr(library, name.removeprefix("BSBR"), None)
        if name.startswith("BSBR") and isinstance(original, type) and issubclass(original, PreTrainedModel):
            return converted_class(original)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
