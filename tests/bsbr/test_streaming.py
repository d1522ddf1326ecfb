"""Tests of `extend` of attention, layer and model: any split, states as values and on disk, and the cost of a token."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bsbr import BSBRAttention, BSBRLayer, BSBRModel, State
from evals.certification.subject import randomize_zero_parameters

CHUNK = 5
TIME = 3 * CHUNK + 7
OPTIONS: list[dict[str, Any]] = [
    {},
    {"chunk_overlap": 2, "compression_factor": 2},
    {"chunk_overlap": 2 * CHUNK + 3, "num_kv_heads": 2, "rotary": True},
    {"chunk_overlap": 1000},
    {"retrieval_top_k": 1, "compression_factor": 4, "num_kv_heads": 1, "rotary": True},
    {"retrieval_top_k": 2, "chunk_overlap": CHUNK, "num_kv_heads": 2},
    {"retrieval_top_k": 100, "rotary": True},
    {"chunk_size": 1},
    {"chunk_size": 1, "chunk_overlap": 2, "retrieval_top_k": 2},
    {"chunk_size": 1000, "rotary": True},
    {"chunk_states": "sum", "retrieval_norm": False},
]
options_of_all_kinds = pytest.mark.parametrize("options", OPTIONS, ids=str)
Extend = Callable[[Tensor, State | None], tuple[Tensor, State]]


def build(**options: Any) -> BSBRAttention:
    torch.manual_seed(0)
    attention = BSBRAttention(16, 4, **{"chunk_size": CHUNK} | options).double()
    with torch.no_grad():
        attention.retrieval_gain.copy_(torch.tensor([1.0, -0.5, 2.0, 0.1]))
        if attention.beta_proj is not None:
            attention.beta_proj.weight.normal_()
    return attention


def hidden(time: int = TIME) -> Tensor:
    return torch.randn(2, time, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(time))


def in_pieces(extend: Extend, inputs: Tensor, sizes: list[int], state: State | None = None) -> tuple[Tensor, State]:
    outputs = []
    for piece in inputs.split(sizes, dim=1):
        output, state = extend(piece, state)
        outputs.append(output)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def assert_same(first: State, second: State, **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(
            first[key], second[key], **tolerance or {"rtol": 0, "atol": 0}, msg=lambda m, key=key: f"{key}: {m}"
        )


# --- any split ------------------------------------------------------------------------------------


@options_of_all_kinds
def test_two_parts_equal_the_whole_for_every_cut(options: dict[str, Any]) -> None:
    attention, x = build(**options), hidden()
    whole = attention(x)
    output, state = attention.extend(x)
    torch.testing.assert_close(output, whole, rtol=0, atol=1e-10)
    for cut in range(1, TIME):
        output, after = in_pieces(attention.extend, x, [cut, TIME - cut])
        torch.testing.assert_close(output, whole, rtol=0, atol=1e-10)
        assert_same(after, state, rtol=0, atol=1e-10)


@options_of_all_kinds
@pytest.mark.parametrize("sizes", [[1] * TIME, [3] * 7 + [1], [CHUNK] * 4 + [2], [1, 13, 2, 6], [4, 1, 10, 7]], ids=str)
def test_any_number_of_parts_matches_the_whole(sizes: list[int], options: dict[str, Any]) -> None:
    attention, x = build(**options), hidden()
    output, state = in_pieces(attention.extend, x, sizes)
    torch.testing.assert_close(output, attention(x), rtol=0, atol=1e-10)
    assert_same(state, attention.extend(x)[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_streaming_in_lower_precision_stays_close(dtype: torch.dtype, tolerance: float) -> None:
    attention, x = build(chunk_overlap=2, compression_factor=2).to(dtype), hidden(8 * CHUNK + 2).to(dtype)
    whole = attention(x).float()
    output, state = in_pieces(attention.extend, x, [1] * x.shape[1])
    assert output.dtype == dtype
    assert (output.float() - whole).norm() <= tolerance * whole.norm()
    assert {state["open_state"].dtype, state["open_hidden"].dtype} == {torch.float32}  # sums are kept in float32


def test_gradients_flow_through_the_state() -> None:
    attention, x = build(chunk_overlap=2), hidden().requires_grad_()
    leaves = [x, *attention.parameters()]
    whole = torch.autograd.grad(attention(x).square().sum(), leaves)
    pieces = torch.autograd.grad(in_pieces(attention.extend, x, [3, 9, 10])[0].square().sum(), leaves)
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_selection_between_equal_scores_does_not_depend_on_the_number_of_chunks() -> None:
    attention, x = build(retrieval_top_k=2), hidden(60 * CHUNK)
    x[:, ::CHUNK] = 0  # every meta query is 0, and so is every score
    output, _ = in_pieces(attention.extend, x, [CHUNK] * 60)
    torch.testing.assert_close(output, attention(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS[:6], ids=str)
def test_in_training_dropout_acts_on_new_tokens_too(options: dict[str, Any]) -> None:
    attention = build(dropout=0.3, **options).train()
    with torch.no_grad():
        attention.retrieval_gain.fill_(3)  # large enough that the dropout of both softmaxes shows
        x = hidden(2 * CHUNK + 2)[:1].expand(8000, -1, -1)
        torch.manual_seed(1)
        whole, pieces = attention(x), in_pieces(attention.extend, x, [3, 4, 1, 4])[0]
    # The same distribution as in one piece: in units of its spread, means differ by 1/63 at one standard error.
    spread = whole.std(dim=0)
    assert ((pieces.mean(dim=0) - whole.mean(dim=0)).abs() < 0.1 * spread).all()
    torch.testing.assert_close(pieces.std(dim=0), spread, rtol=0.1, atol=0)


# --- a state is a value ---------------------------------------------------------------------------


@options_of_all_kinds
@pytest.mark.parametrize("cut", [1, CHUNK - 1, CHUNK, CHUNK + 2, 3 * CHUNK])
def test_many_continuations_start_from_one_state(cut: int, options: dict[str, Any]) -> None:
    attention, x = build(**options), hidden()
    _, state = attention.extend(x[:, :cut])
    assert_same(in_pieces(attention.extend, x[:, :cut], [1] * cut)[1], state, rtol=0, atol=1e-10)
    copy = {key: tensor.clone() for key, tensor in state.items()}
    for sizes in ([TIME - cut], [1, TIME - cut - 1], [2, TIME - cut - 2]):
        for tokens in (x[:, cut:], -x[:, cut:]):
            output, _ = in_pieces(attention.extend, tokens, sizes, state)
            expected = attention(torch.cat([x[:, :cut], tokens], dim=1))[:, cut:]
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
            assert_same(state, copy)


@options_of_all_kinds
def test_a_state_is_the_same_after_saving_and_loading(tmp_path: Path, options: dict[str, Any]) -> None:
    attention, x = build(**options), hidden()
    with torch.no_grad():
        for cut in (1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK):
            _, state = in_pieces(attention.extend, x[:, :cut], [1] * cut)
            save_file(state, tmp_path / "state.safetensors")
            loaded = load_file(tmp_path / "state.safetensors")
            assert_same(loaded, state)
            assert torch.equal(attention.extend(x[:, cut:], loaded)[0], attention.extend(x[:, cut:], state)[0])


@options_of_all_kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_state_holds_exactly_the_declared_bytes_of_memory(dtype: torch.dtype, options: dict[str, Any]) -> None:
    attention, x = build(**options).to(dtype), hidden().to(dtype)
    by_token: State | None = None
    with torch.no_grad():
        for time in range(1, TIME + 1):
            _, by_token = attention.extend(x[:, time - 1 : time], by_token)
            _, at_once = attention.extend(x[:, :time])
            _, in_two = in_pieces(attention.extend, x[:, :time], [time // 2, time - time // 2][time < 2 :])
            for state in (by_token, at_once, in_two):
                assert state["position"].tolist() == time
                tensors = [tensor for key, tensor in state.items() if key != "position"]  # a counter that every attention has
                assert sum(tensor.nbytes for tensor in tensors) == attention.state_bytes(time, batch_size=2)
                assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == attention.state_bytes(time, 2)


# --- one token in C++ -----------------------------------------------------------------------------


@options_of_all_kinds
@pytest.mark.parametrize("more", [{}, {"feature_map": "linear"}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=str)
def test_a_token_in_cpp_equals_that_in_torch(
    dtype: torch.dtype, tolerance: float, more: dict[str, Any], options: dict[str, Any]
) -> None:
    fast, slow = (build(**options | more, impl=impl).to(dtype) for impl in ("cpp", "torch"))
    x, tokens = hidden().to(dtype), [1] * TIME
    with torch.no_grad():
        (output, state), (expected, after) = in_pieces(fast.extend, x, tokens), in_pieces(slow.extend, x, tokens)
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)
    assert_same(state, after, rtol=0, atol=tolerance)


@pytest.mark.parametrize("head_dim", [4, 16, 20, 33])
@pytest.mark.parametrize("cached", [1, 15, 16, 17, 40])
def test_a_token_in_cpp_equals_the_reference_at_any_size(head_dim: int, cached: int) -> None:
    torch.manual_seed(0)
    attention = randomize_zero_parameters(BSBRAttention(2 * head_dim, 2, chunk_size=48, num_kv_heads=1)).double()
    x = torch.randn(3, 48 + cached + 1, 2 * head_dim, dtype=torch.float64)
    with torch.no_grad():
        _, state = attention.extend(x[:, :-1])
        output, _ = attention.extend(x[:, -1:], state)
        expected = attention.output(attention.reference(*attention.project(x)))[:, -1:]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)


def test_a_token_takes_a_state_of_any_strides_and_refuses_another_attentions() -> None:
    attention, x = build(impl="cpp"), hidden(CHUNK + 3)
    with torch.no_grad():
        _, state = attention.extend(x[:, :-1])
        output, _ = attention.extend(x[:, -1:], state)
        strided = {name: tensor.mT.contiguous().mT if tensor.dim() >= 4 else tensor for name, tensor in state.items()}
        again, _ = attention.extend(x[:, -1:], strided)
        torch.testing.assert_close(again, output, rtol=0, atol=1e-14)
        empty, _ = attention.extend(x[:0, -1:], {name: t[:0] if t.dim() else t for name, t in state.items()})
        assert empty.shape == (0, 1, 16)
        for wrong in (
            {"keys": state["keys"][:1]},
            {"values": state["values"][..., :3]},
            {"open_state": state["open_state"][:, :, :2]},
            {"retrieved": state["retrieved"][:, :1]},
        ):
            with pytest.raises(ValueError, match="the state must be that of 2 sequences of this attention"):
                attention.extend(x[:, -1:], state | wrong)


def test_a_token_reads_no_page_of_the_memory() -> None:
    """Reading the pages of a million tokens would take longer than the token."""
    attention, x = build(), hidden(2 * CHUNK + 2)
    with torch.no_grad():
        _, state = attention.extend(x[:, :-1])
        pages = {name for name in state if name.startswith(("states.", "meta_keys."))}
        without = {name: tensor for name, tensor in state.items() if name not in pages}
        expected, _ = attention.extend(x[:, -1:], state)
        assert pages
        assert torch.equal(attention.extend(x[:, -1:], without)[0], expected)


# --- cost of a token ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunk_overlap": 3}, {"chunk_overlap": CHUNK + 1, "num_kv_heads": 2}], ids=str)
def test_only_the_first_token_of_a_chunk_costs_more_after_a_longer_context(options: dict[str, Any]) -> None:
    attention, contexts = build(**options), (4, 16, 64)
    x = hidden(64 * CHUNK + CHUNK)

    def cost(time: int) -> int:
        """FLOPs of the token at position `time`."""
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernel is not counted
            _, state = attention.extend(x[:, :time])
            with FlopCounterMode(display=False) as counter:
                attention.extend(x[:, time : time + 1], state)
        return counter.get_total_flops()

    for opened in range(1, CHUNK):
        costs = {cost(chunks * CHUNK + opened) for chunks in contexts}
        assert len(costs) == 1
        assert min(costs) > 0
    # A chunk's first token scores and mixes all chunks before it, and nothing else grows.
    scored_and_mixed = 2 * 4 * (2 * 4 + 2 * 4 * 4)
    firsts = [cost(chunks * CHUNK) for chunks in contexts]
    assert [b - a for a, b in pairwise(firsts)] == [(b - a) * scored_and_mixed for a, b in pairwise(contexts)]


# --- layer and model ------------------------------------------------------------------------------


def layer(**options: Any) -> BSBRLayer:
    torch.manual_seed(0)
    return randomize_zero_parameters(
        BSBRLayer(16, 4, CHUNK, 24, **{key: value for key, value in options.items() if key != "chunk_size"})
    ).double()


def model(**options: Any) -> BSBRModel:
    torch.manual_seed(0)
    # Twelve layers, so that the names of layers 10 and 11 begin like that of layer 1.
    return randomize_zero_parameters(BSBRModel(30, 16, 12, 4, chunk_size=CHUNK, ff_dim=24, **options)).double()


@pytest.mark.parametrize("options", OPTIONS[:7], ids=str)
@pytest.mark.parametrize("make", [layer, model, partial(model, positions=False)])
def test_layer_and_model_stream(make: Callable[..., BSBRLayer | BSBRModel], options: dict[str, Any]) -> None:
    module = make(**options)
    inputs = hidden() if isinstance(module, BSBRLayer) else torch.randint(30, (2, TIME), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = module(inputs)
        for sizes in ([TIME], [1] * TIME, [CHUNK, TIME - CHUNK], [7, 6, 9]):
            output, _ = in_pieces(module.extend, inputs, sizes)
            torch.testing.assert_close(output, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cut", [1, CHUNK, 2 * CHUNK + 3])
def test_a_models_state_is_not_changed_and_can_be_saved(tmp_path: Path, cut: int) -> None:
    lm = model(chunk_overlap=2, rotary=True, num_kv_heads=2)
    ids = torch.randint(30, (2, TIME), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, state = lm.extend(ids[:, :cut])
        copy = {key: tensor.clone() for key, tensor in state.items()}
        save_file(state, tmp_path / "prefix.safetensors")
        for prefix in (state, load_file(tmp_path / "prefix.safetensors")):
            for continuation in (ids[:, cut:], 29 - ids[:, cut:]):
                expected = lm(torch.cat([ids[:, :cut], continuation], dim=1))[:, cut:]
                torch.testing.assert_close(lm.extend(continuation, prefix)[0], expected, rtol=0, atol=1e-10)
        assert_same(state, copy)
    one = lm.layers[0].attention.extend(hidden(cut))[1]
    assert state.keys() == {"position"} | {f"layers.{index}.{key}" for index in range(12) for key in one}
    bytes_kept = sum(tensor.nbytes for key, tensor in state.items() if not key.endswith("position"))
    assert bytes_kept == sum(layer.attention.state_bytes(cut, batch_size=2) for layer in lm.layers)


def test_a_token_after_a_state_of_another_precision() -> None:
    """Under autocast after a prefix without, and after tensors of mixed dtypes, which C++ would read as one dtype."""
    torch.manual_seed(0)
    module, x = randomize_zero_parameters(BSBRAttention(16, 4, chunk_size=8)), torch.randn(2, 12, 16)
    with torch.no_grad():
        expected = module(x)[:, -1:]
        _, state = module.extend(x[:, :-1])
        for name in ("values", "retrieved"):
            with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
                module.extend(x[:, -1:], {**state, name: state[name].double()})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, _ = module.extend(x[:, -1:], state)
        torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
