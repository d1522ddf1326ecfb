"""Tests converted models: equality with the original within a chunk, streaming, saving and loading, refusals."""

import copy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

from bsbr import reference
from bsbr.convert import Retrieval, convert_to_bsbr, models
from evals.measure.memory import peak_allocated_bytes

B, VOCABULARY = 7, 61
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
CAUSAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 128},
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 90},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
}
BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
CONFIGS = CAUSAL | {"bert": BERT, "t5": T5}
AUTO = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}


@cache
def original(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    auto = AUTO.get(name, AutoModelForCausalLM)
    model = auto.from_config(AutoConfig.for_model(name, **CONFIGS[name], **SPECIAL)).eval().to(dtype)
    for parameter in model.parameters():  # as large as in trained models, so that attention is far from uniform
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model


def converted(
    name: str, chunk_size: int = B, dtype: torch.dtype = torch.float64, gate: float = 0.0, **options: Any
) -> PreTrainedModel:
    model = convert_to_bsbr(original(name, dtype), chunk_size, **options)
    generator = torch.Generator().manual_seed(1)
    for part in retrievals(model):
        for parameter in part.parameters():
            if gate:
                parameter.data += gate * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def retrievals(model: torch.nn.Module) -> list[Retrieval]:
    return [part for part in model.modules() if isinstance(part, Retrieval)]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if mask is not None and "bert" not in model.config.model_type and not model.config.is_encoder_decoder:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **inputs).logits


def padded(time: int, left: int, right: int) -> Tensor:
    """[2, time]: a row with padding, and one with none."""
    mask = torch.ones(2, time, dtype=torch.long)
    mask[0, :left] = 0
    mask[0, time - right :] = 0
    return mask


# --- exact where it can be ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_logits_equal_the_original_within_one_chunk(name: str, dtype: torch.dtype, within: float) -> None:
    model = converted(name, dtype=dtype)
    for time in (1, B - 1, B):
        ids = tokens(2, time)
        expected = logits(original(name, dtype), ids)
        assert expected.std() > 0.1
        assert (logits(model, ids) - expected).abs().max() < within


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_original_with_a_chunk_longer_than_the_sequence(name: str) -> None:
    model = converted(name, chunk_size=80)
    ids = tokens(2, 79)
    assert (logits(model, ids) - logits(original(name), ids)).abs().max() < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 1)])
def test_padding_within_a_chunk_equals_the_original(name: str, left: int, right: int) -> None:
    ids, mask = tokens(2, B), padded(B, left, right)
    actual, expected = (logits(model, ids, mask) for model in (converted(name), original(name)))
    real = slice(None) if name == "t5" else mask.bool()  # its decoder has no padding here
    assert (actual - expected)[real].abs().max() < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 9), (B, 0)])
def test_padding_of_many_chunks_changes_no_real_logit(name: str, left: int, right: int) -> None:
    model, time = converted(name, gate=0.5), 3 * B + 2
    ids, mask = tokens(2, time), padded(time, left, right)
    if name == "bert":  # whose positions are those of the row
        left_positions = (mask.cumsum(1) - 1).clamp(min=0)
        actual = logits(model, ids, mask, position_ids=left_positions)
    elif name == "t5":
        with torch.no_grad():
            actual = model.get_encoder()(ids, attention_mask=mask).last_hidden_state
            unpadded = model.get_encoder()(ids[:1, left : time - right]).last_hidden_state
        assert (actual[:1, left : time - right] - unpadded).abs().max() < 1e-10
        return
    else:
        actual = logits(model, ids, mask)
    unpadded = logits(model, ids[:1, left : time - right])
    assert (actual[:1, left : time - right] - unpadded).abs().max() < 1e-10


@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
def test_generate_equals_the_original_within_a_chunk(name: str) -> None:
    model, options = converted(name, chunk_size=32), {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    ids, mask = tokens(2, 9), padded(9, 4, 0)
    expected = original(name).generate(ids, attention_mask=mask, **options)
    assert model.generate(ids, attention_mask=mask, **options).equal(expected)
    assert model.generate(ids, attention_mask=mask, use_cache=False, **options).equal(expected)
    beams = {**options, "num_beams": 3}
    assert model.generate(ids, attention_mask=mask, **beams).equal(original(name).generate(ids, attention_mask=mask, **beams))


# --- BSBR beyond a chunk ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("options", [{}, {"chunk_overlap": 3, "retrieval_top_k": 2, "compression_factor": 2}])
def test_decoding_over_chunk_boundaries_equals_the_whole(name: str, options: dict[str, Any]) -> None:
    model, time = converted(name, gate=0.5, **options), 4 * B + 1
    ids, mask = tokens(2, time), padded(time, 3, 0)
    whole = logits(model, ids, mask)
    assert (whole - logits(converted(name, **options), ids, mask)).abs().max() > 1e-2  # retrieval changes the logits
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for first in (4, B, 2 * B + 3):
        parts, cache = [], None
        for start, stop in [(0, first), (first, first + 3), *((i, i + 1) for i in range(first + 3, time))]:
            with torch.no_grad():
                output = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    cache=cache,
                    use_cache=True,
                )
            cache = output.cache
            parts.append(output.logits)
        assert (torch.cat(parts, dim=1) - whole)[mask.bool()].abs().max() < 1e-10


def test_a_t5_decoder_streams_too() -> None:
    model, time = converted("t5", gate=0.5), 3 * B + 1
    ids, question = tokens(2, time), tokens(2, 2 * B + 3, seed=1)
    with torch.no_grad():
        whole = model(input_ids=question, decoder_input_ids=ids).logits
        encoded, cache, parts = model.get_encoder()(question), None, []
        for start, stop in [(0, 4), *((i, i + 1) for i in range(4, time))]:
            output = model(encoder_outputs=encoded, decoder_input_ids=ids[:, start:stop], cache=cache, use_cache=True)
            cache = output.cache
            parts.append(output.logits)
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-10


def test_the_decoding_state_keeps_one_entry_per_complete_chunk() -> None:
    model = converted("llama", gate=0.5)
    num_states = []
    for time in (10 * B + 1, 20 * B + 1):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens(1, time), cache=cache)
            model(tokens(1, 1), cache=cache)
        state = cache.layers[0].state
        assert state["keys"].shape[2] == B
        num_states.append(state["states"].shape[2])
    assert num_states == [10, 20]


def test_causal_attention_equals_the_definition() -> None:
    torch.manual_seed(0)
    part, time = Retrieval(4, 2, 8, chunk_size=B, chunk_overlap=2, retrieval_top_k=2, compression_factor=2).double(), 3 * B + 2
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    q, k, v = (torch.randn(2, heads, time, 8, dtype=torch.float64) for heads in (4, 2, 2))
    h = torch.stack([k[:, :, s * B : (s + 1) * B].mean(dim=2) for s in range(3)], dim=2) @ part.meta_key
    before = torch.tensor([0.0] * B + [1.0] * B + [2.0] * (B + 2), dtype=torch.float64)  # chunks, of which two at most are mixed
    query_gate = 2 * (q @ part.query_weight + part.query_bias).sigmoid() * before.view(-1, 1)

    def bsbr(values: Tensor) -> Tensor:
        return reference.bsbr_attention(
            *(q, k, values, q[:, :, ::B] @ part.meta_query, h),
            chunk_size=B,
            q_features=(q @ part.query_features).softmax(dim=-1) * query_gate,
            k_features=(k @ part.key_features).softmax(dim=-1),
            gain=part.gate * 4 / B,
            chunk_overlap=2,
            top_k=2,
        )

    total_weight = 1 + (bsbr(torch.ones_like(v)) - 1).abs()  # local tokens weigh 1
    assert (part.causal_attention(q, k, v) - bsbr(v) / total_weight).abs().max() < 1e-10


@pytest.mark.parametrize("biased", [False, True])
def test_local_and_retrieved_values_are_one_weighted_mean(biased: bool) -> None:
    torch.manual_seed(0)
    bias = torch.randn(1, 4, B, B, dtype=torch.float64) if biased else None
    part = Retrieval(4, 2, 8, chunk_size=B).double()
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    part.gate.data.abs_()
    q, k = (torch.randn(2, heads, 3 * B + 2, 8, dtype=torch.float64) for heads in (4, 2))
    value = torch.randn(8, dtype=torch.float64)  # of all tokens
    for attended in (
        part.causal_attention(q, k, value.expand_as(k), bias),
        part.bidirectional_attention(q, k, value.expand_as(k), None, bias),
    ):
        assert (attended - value).abs().max() < 1e-12


@pytest.mark.parametrize("top_k", [None, 1])
def test_bidirectional_attention_token_by_token(top_k: int | None) -> None:
    torch.manual_seed(0)
    part, time = Retrieval(2, 2, 4, chunk_size=3, retrieval_top_k=top_k).double(), 8
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    q, k, v = (torch.randn(1, 2, time, 4, dtype=torch.float64) for _ in range(3))
    actual = part.bidirectional_attention(q, k, v, None)
    spans = [slice(0, 3), slice(3, 6), slice(6, 8)]
    for head in range(2):
        phi_q, phi_k = ((x[0, head] @ w[head]).softmax(dim=-1) for x, w in ((q, part.query_features), (k, part.key_features)))
        for t, own in enumerate(spans):
            others = [span for s, span in enumerate(spans) if s != t]
            r = q[0, head, own].mean(dim=0) @ part.meta_query[head]
            scores = torch.stack([r @ (k[0, head, s].mean(dim=0) @ part.meta_key[head]) / 2 for s in others])
            weights = scores.softmax(dim=0) if top_k is None else (scores == scores.max()).double()
            for i in range(own.start, own.stop):
                query_gate = 2 * (q[0, head, i] @ part.query_weight[head, :, 0] + part.query_bias[head, 0, 0]).sigmoid()
                local = (q[0, head, i] @ k[0, head, own].T / 2).softmax(dim=0) @ v[0, head, own]
                query_gate = query_gate * (len(others) if top_k is None else top_k)
                weight = [
                    part.gate[head] * 4 / 3 * query_gate * w * phi_q[i] @ phi_k[s].T for w, s in zip(weights, others, strict=True)
                ]
                far = sum(w @ v[0, head, s] for w, s in zip(weight, others, strict=True))
                expected = (local + far) / (1 + sum(w.sum() for w in weight).abs())
                assert (actual[0, head, i] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_an_encoder_retrieves_from_both_sides(name: str) -> None:
    ids = tokens(1, 3 * B)
    for position in (0, 3 * B - 1):
        other = ids.clone()
        other[0, position] = 3 + (ids[0, position] - 2) % (VOCABULARY - 3)
        for gate, visible in ((0.0, False), (0.5, True)):
            model = converted(name, gate=gate)
            encoder = model.get_encoder() if name == "t5" else model.bert
            with torch.no_grad():
                change = (encoder(ids).last_hidden_state - encoder(other).last_hidden_state)[0, B : 2 * B].abs().max()
            assert (change > 1e-6) == visible


def test_every_parameter_of_retrieval_has_a_gradient() -> None:
    model = converted("llama", gate=0.5).train()
    model(tokens(2, 3 * B), labels=tokens(2, 3 * B)).loss.backward()
    assert all(float(parameter.grad.abs().max()) > 0 for part in retrievals(model) for parameter in part.parameters())


# --- what stays as it was -----------------------------------------------------------------------


def test_frozen_parameters_modes_and_checkpointing_stay() -> None:
    source = copy.deepcopy(original("llama", torch.float32)).train()
    source.model.embed_tokens.requires_grad_(False)
    source.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    source.model.layers[1].eval()
    source.activation_checkpointing_enable({"use_reentrant": True})
    source.enable_input_require_grads()
    model = convert_to_bsbr(source, B)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"}
    assert {name: model.get_submodule(name).training for name, _ in source.named_modules()} == {
        name: module.training for name, module in source.named_modules()
    }
    assert [part.training for part in retrievals(model)] == [True, False]
    assert model.is_activation_checkpointing
    for layer in model.model.layers:
        assert layer.gradient_checkpointing
        assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": True}
    assert model.model.embed_tokens(tokens(1, 2)).requires_grad


def test_ties_stay_as_they_are_whatever_the_config_says() -> None:
    tied = converted("gpt2")
    assert tied.lm_head.weight is tied.transformer.wte.weight
    torn = copy.deepcopy(original("gpt2"))
    torn.lm_head.weight = torch.nn.Parameter(torn.lm_head.weight + 1)
    assert (logits(convert_to_bsbr(torn, B), tokens(1, B)) - logits(torn, tokens(1, B))).abs().max() < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
def test_no_tensor_is_left_on_meta_and_dtypes_stay(name: str) -> None:
    source = original(name, torch.bfloat16)
    model = convert_to_bsbr(source, B)
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        assert not any(tensor.is_meta for tensor in tensors if isinstance(tensor, Tensor))
    buffers = {key: (buffer.dtype, buffer.tolist()) for key, buffer in source.named_buffers()}
    assert {key: (buffer.dtype, buffer.tolist()) for key, buffer in model.named_buffers()} == buffers
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_conversion_holds_the_weights_once_more() -> None:
    config = AutoConfig.for_model("gpt2", **CONFIGS["gpt2"] | {"vocab_size": 50_000}, **SPECIAL)
    source = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in source.parameters())
    assert peak_allocated_bytes(lambda: convert_to_bsbr(source, B)) < 1.1 * weights


# --- saving, loading and refusals ---------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_equals_the_saved_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = converted(name, gate=0.5, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    for loader in (type(model), AUTO.get(name, AutoModelForCausalLM)):
        again = loader.from_pretrained(tmp_path)
        assert type(again) is type(model)
        assert all(tensor.equal(again.state_dict()[key]) for key, tensor in model.state_dict().items())
        ids = tokens(2, 3 * B + 1)
        assert logits(again, ids).equal(logits(model, ids))


@pytest.mark.parametrize(
    ("name", "library_class", "auto"),
    [
        ("gpt2", "GPT2DoubleHeadsModel", None),
        ("bert", "BertForPreTraining", "AutoModelForPreTraining"),
        ("bert", "BertForNextSentencePrediction", "AutoModelForNextSentencePrediction"),
        ("bert", "BertForMultipleChoice", "AutoModelForMultipleChoice"),
        ("t5", "T5EncoderModel", "AutoModelForTextEncoding"),
        ("t5", "T5Stack", None),
    ],
)
def test_a_model_of_any_class_is_loaded_again(name: str, library_class: str, auto: str | None, tmp_path: Path) -> None:
    config = AutoConfig.for_model(name, **CONFIGS[name], **SPECIAL)
    library = import_module(f"transformers.models.{name}.modeling_{name}")
    model = convert_to_bsbr(getattr(library, library_class)(config), B)
    model.save_pretrained(tmp_path)
    loaders = [getattr(models, f"BSBR{library_class}"), *([] if auto is None else [getattr(transformers, auto)])]
    for loader in loaders:
        again = loader.from_pretrained(tmp_path)
        assert type(again) is type(model)
        assert all(tensor.equal(again.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_the_class_of_a_converted_model_is_found_by_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(models, "BSBRBertForPreTraining", raising=False)  # as in a process that has converted no such model
    assert models.BSBRBertForPreTraining is models.converted_class(transformers.BertForPreTraining)
    with pytest.raises(AttributeError, match="no attribute 'BSBRBertForNothing'"):
        _ = models.BSBRBertForNothing


def test_a_folder_is_loaded_and_the_original_not_changed(tmp_path: Path) -> None:
    source = original("gpt2", torch.float32)
    before = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    source.save_pretrained(tmp_path)
    model, ids = convert_to_bsbr(tmp_path, chunk_size=B), tokens(2, B)
    assert (logits(model, ids) - logits(source, ids)).abs().max() < 1e-4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert source.config._attn_implementation == "sdpa"
    assert all(tensor.equal(before[key]) for key, tensor in source.state_dict().items())


def test_the_tokenizer_does_not_change(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    backend = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    converted("gpt2", dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("b a c")["input_ids"] == [2, 1, 0]


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    model = original("gpt2", torch.float32)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config = AutoConfig.from_pretrained(tmp_path)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no weights as safetensors"):
        convert_to_bsbr(tmp_path)


def test_other_architectures_raise(tmp_path: Path) -> None:
    AutoConfig.for_model("opt").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one of gpt2, llama, mistral, qwen2, qwen3, bert, t5, got model_type='opt'"):
        convert_to_bsbr(str(tmp_path))
    with pytest.raises(ValueError, match="got model_type='bsbr_gpt2'"):
        convert_to_bsbr(converted("gpt2"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mistral", {"chunk_size": 80, "chunk_overlap": 11}, "sliding window of 90 tokens, got 91"),
        ("bert", {"chunk_overlap": 1}, "chunk_overlap is for models that see the past alone"),
        ("gpt2", {"compression_factor": 3}, "must divide the model's head_dim = 8, got 3"),
        ("gpt2", {"chunk_size": 0}, "chunk_size must be a positive integer"),
    ],
)
def test_invalid_options_raise(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_to_bsbr(original(name), **options)


@pytest.mark.parametrize("given", [None, 3, torch.nn.Linear(2, 2), AutoConfig.for_model("gpt2")])
def test_what_is_no_model_raises_and_is_looked_up_nowhere(given: Any) -> None:
    message = f"must be a PreTrainedModel of transformers, or the name or folder of one, got {type(given).__name__}"
    with pytest.raises(ValueError, match=message):
        convert_to_bsbr(given)


def test_a_model_that_does_not_fit_its_class_raises() -> None:
    source = copy.deepcopy(original("gpt2"))
    source.transformer.h[1].attn.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"this one does not fit: transformer.h.1.attn.adapter.bias"):
        convert_to_bsbr(source)


def test_attention_weights_are_refused_before_and_after_conversion(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", **CONFIGS["gpt2"], **SPECIAL, attn_implementation="eager", output_attentions=True)
    with pytest.raises(ValueError, match=r"no attention weights to output: set config.output_attentions = False first"):
        convert_to_bsbr(AutoModelForCausalLM.from_config(config))
    model, ids = converted("llama"), tokens(1, 4)
    with pytest.raises(NotImplementedError, match="leave output_attentions False"):
        model(ids, output_attentions=True)
    with pytest.raises(NotImplementedError, match="leave output_attentions False"):
        model.generate(ids, max_new_tokens=1, output_attentions=True, return_dict_in_generate=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="leave output_attentions False"):
        AutoModelForCausalLM.from_pretrained(tmp_path, output_attentions=True)(ids)


def test_another_attention_is_refused() -> None:
    model, ids = converted("gpt2", gate=0.5), tokens(1, 3 * B)
    before = logits(model, ids)
    with pytest.raises(NotImplementedError, match="converted model is BSBR, got 'eager'"):
        model.set_attn_implementation("eager")
    model.set_attn_implementation("bsbr")
    assert logits(model, ids).equal(before)


def test_masks_and_caches_that_bsbr_would_ignore_raise() -> None:
    model, ids = converted("llama"), tokens(1, 10)
    with pytest.raises(NotImplementedError, match="packed sequences"):
        model(ids, position_ids=torch.arange(5).repeat(2)[None], use_cache=False)
    with pytest.raises(NotImplementedError, match=r"padding, got one of \[1, 1, 10, 10\]"):
        model(ids, attention_mask=torch.ones(1, 1, 10, 10))
    with pytest.raises(NotImplementedError, match="DynamicCache"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("name", CONFIGS)
def test_an_additive_mask_raises(name: str) -> None:
    model, ids = converted(name), tokens(1, 4)
    for mask, got in ((torch.tensor([[-torch.inf, 0, 0, 0]]), "-inf"), (torch.zeros(1, 4), "zeros alone"), (ids + 1, r"\d+")):
        with pytest.raises(ValueError, match=f"attention_mask must be 1 or True .* got {got}; "):
            logits(model, ids, mask)
    if model.config.is_encoder_decoder:
        with pytest.raises(ValueError, match="encoder_attention_mask must be 1 or True"):
            model(encoder_outputs=(torch.randn(1, 4, 32),), attention_mask=ids, decoder_input_ids=ids)
    if name == "bert":
        with pytest.raises(ValueError, match="attention_mask must be 1 or True"):
            model.bert(ids, ids)
