"""Tests of retrieval per token: values and gradients, streaming, cost, stored states, and equality of `retrieval="chunk"`.

Values are compared with `bsbr.token_retrieval.reference`, which is compared with a hand-worked case here.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from bsbr import BSBRAttention, BSBRModel, TokenRetrievalAttention
from bsbr.token_retrieval import pytorch, reference, streaming
from bsbr.token_retrieval.inputs import ChunkTable

CHUNK = 5
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 7 * CHUNK + 2]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"candidates": 1, "chunk_overlap": 2, "compression_factor": 2},
    {"candidates": None, "num_kv_heads": 2, "rotary": True, "feature_expansion": 2},
    {"router": "key", "candidates": 2, "num_kv_heads": 1},
    {"router": "meta", "candidates": 3, "chunk_states": "sum", "feature_map": "linear", "num_kv_heads": 2},
    {"router": "meta", "candidates": None, "meta_projections": True},
]
TOLERANCE: dict[torch.dtype, Any] = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 1e-3, "atol": 2e-5}}
options_of_all_kinds = pytest.mark.parametrize("options", OPTIONS, ids=str)


def build(**options: Any) -> TokenRetrievalAttention:
    """hidden_dim 16, 4 heads of 4, float64, with gains that differ from head to head and β that differ from token to token."""
    torch.manual_seed(0)
    attention = BSBRAttention(16, 4, retrieval="token", **{"chunk_size": CHUNK} | options).double().eval()
    assert isinstance(attention, TokenRetrievalAttention)
    with torch.no_grad():
        attention.retrieval_gain.copy_(torch.tensor([1.0, -0.5, 2.0, 0.1]))
        if attention.beta_proj is not None:
            attention.beta_proj.weight.normal_()
    return attention


def hidden(time: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, time, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(time))


# --- values ---------------------------------------------------------------------------------------


def test_reference_matches_a_hand_worked_case() -> None:
    # Chunks of one token. Chunk 0 stores 3 under the first feature and chunk 1 stores 1 under the second. With φ(q) = (1, 1)/√2 the
    # energies are 9/2 and 1/2; with p = 1 the weights are 0.9 and 0.1, and 0.9·3/√2 + 0.1·1/√2 = 2.8/√2 is read.
    one = torch.ones(1, 1, 3, 1)
    k_features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).view(1, 1, 3, 2)
    v = torch.tensor([3.0, 1.0, 0.0]).view(1, 1, 3, 1)
    q_features = torch.full((1, 1, 3, 2), 0.5**0.5)
    gain, exponent = torch.tensor([2.0]), torch.tensor([1.0])
    out = reference.token_retrieval_attention(
        one, one, v, q_features, k_features, None, None, None, gain, exponent, chunk_size=1, router="energy"
    )
    assert out.flatten().tolist() == pytest.approx([3.0, 1.0 + 2 * 3 / 2**0.5, 0.0 + 2 * 2.8 / 2**0.5], rel=1e-6)


@options_of_all_kinds
@pytest.mark.parametrize("time", LENGTHS)
def test_values_and_gradients_match_the_reference(time: int, options: dict[str, Any]) -> None:
    attention = build(**options)
    leaves = [x.detach().requires_grad_() for x in attention.project(hidden(time, batch=1))]
    wanted = [*leaves, attention.retrieval_gain, *([] if attention.exponent is None else [attention.exponent])]
    found = []
    for function in (attention.attend, attention.reference):
        value = function(*leaves)
        weights = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((value * weights).sum(), wanted, allow_unused=True)
        found.append([value, *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, wanted, strict=True))])
    for fast, true in zip(*found, strict=True):
        torch.testing.assert_close(fast, true, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 2, 1, 16), {"chunk_size": 5, "candidates": 2}),
        ((2, 4, 2, 6), {"chunk_size": 18, "candidates": 1, "chunk_overlap": 7, "feature_expansion": 2}),
        ((1, 2, 2, 32), {"chunk_size": 3, "candidates": 7, "chunk_states": "sum"}),
        ((1, 1, 1, 33), {"chunk_size": 4, "candidates": None}),
    ],
)
def test_cpp_gives_the_reference(sizes: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> None:
    batch, heads, kv_heads, head_dim = sizes
    torch.manual_seed(0)
    attention = BSBRAttention(
        heads * head_dim, heads, num_kv_heads=kv_heads, retrieval="token", impl="cpp", initial_gain=1.0, **options
    )
    attention.to(dtype)
    for chunks, rest in ((0, 1), (1, 0), (2, 1), (23, 2)):  # one more than the rows of a tile, and a vector and some more of chunks
        x = torch.randn(batch, chunks * attention.chunk_size + rest, heads * head_dim, dtype=dtype)
        with torch.no_grad():
            tensors = attention.project(x)
            torch.testing.assert_close(attention.attend(*tensors).double(), attention.reference(*tensors), **TOLERANCE[dtype])


def test_cpp_says_what_it_does_not_take() -> None:
    x = hidden(13)
    with pytest.raises(NotImplementedError, match="computes no gradients"):
        build(impl="cpp")(x)
    with pytest.raises(NotImplementedError, match='got router="meta"'), torch.no_grad():
        build(impl="cpp", router="meta")(x)
    assert build().implementation(*build().project(x)) == "torch"
    with torch.no_grad():
        assert build().implementation(*build().project(x)) == "cpp"


def test_all_candidates_read_in_parts_are_those_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = build(candidates=None), hidden(43)
    (whole,) = torch.autograd.grad(attention(x).square().sum(), attention.q_proj.weight)
    monkeypatch.setattr(pytorch, "MAX_READ_NUMBERS", 1000)
    (parts,) = torch.autograd.grad(attention(x).square().sum(), attention.q_proj.weight)
    torch.testing.assert_close(parts, whole)


def test_a_token_reads_what_was_stored_many_chunks_ago() -> None:
    # One pair among chunks of others, all with orthogonal keys: the candidate of the query's key is its chunk, for any p.
    heads, chunks, size = 1, 7, 4
    features = torch.eye(chunks * size, dtype=torch.float64).view(1, heads, -1, chunks * size)
    v = torch.randn(1, heads, chunks * size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = ChunkTable(
        torch.stack([features[0, 0, size * s : size * (s + 1)].sum(0) for s in range(chunks)]).view(1, 1, chunks, -1),
        pytorch.chunk_states(features, v, size, chunks),
    )
    readers = pytorch.Readers(features, features, torch.ones(1), torch.tensor([1.0]), chunks * size)
    options = build(chunk_size=size, candidates=1).token_options
    torch.testing.assert_close(pytorch.retrieve(readers, [table], options), v)


def test_retrieval_chunk_is_the_form_without_the_option() -> None:
    torch.manual_seed(3)
    plain = BSBRAttention(16, 4, chunk_size=CHUNK, initial_gain=1.0, impl="torch")
    torch.manual_seed(3)
    named = BSBRAttention(16, 4, retrieval="chunk", chunk_size=CHUNK, initial_gain=1.0, impl="torch")
    x = hidden(23).float()
    assert type(named) is BSBRAttention
    assert torch.equal(plain(x), named(x))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), named.parameters(), strict=True))


# --- decoding -------------------------------------------------------------------------------------


@options_of_all_kinds
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
def test_any_split_streams_to_the_whole_and_declares_its_bytes(options: dict[str, Any], state_dtype: str | None) -> None:
    attention, x = build(**options, state_dtype=state_dtype), hidden(43)
    with torch.no_grad():
        whole = attention(x)
        for split in ([1] * 43, [3, 2, 5, 13, 1, 19], [20, 23]):
            outputs, state = [], None
            for piece in x.split(split, dim=1):
                output, state = attention.extend(piece, state)
                outputs.append(output)
            torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-9, atol=1e-11)
    assert state is not None
    assert sum(x.untyped_storage().nbytes() for x in state.values()) == attention.state_bytes(43, 2) + 8


def test_a_long_input_in_segments_gives_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = build(), hidden(43)
    with torch.no_grad():
        whole = attention(x)
        monkeypatch.setattr("bsbr.interface.SEGMENT", 2 * CHUNK)
        torch.testing.assert_close(attention(x), whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("state_dtype", "allowed"), [("bfloat16", 0.01), ("int8", 0.02)])
def test_rounded_states_change_outputs_by_their_rounding(state_dtype: str, allowed: float) -> None:
    x = hidden(43)
    with torch.no_grad():
        exact, rounded = build()(x), build(state_dtype=state_dtype)(x)
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-5 < error < allowed


@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_states_in_files_give_the_same_outputs(monkeypatch: pytest.MonkeyPatch, state_dtype: str | None) -> None:
    monkeypatch.setattr(streaming, "PAGE", 2)
    monkeypatch.setattr("bsbr.streaming.PAGE", 2)
    x, outputs = hidden(43), {}
    for store in ("memory", "file"):
        attention, state, parts = build(state_store=store, state_dtype=state_dtype), None, []
        for piece in x.split([13, 1, 1, 1, 27], dim=1):
            with torch.no_grad():
                output, state = attention.extend(piece, state)
            parts.append(output)
        outputs[store] = torch.cat(parts, dim=1)
    assert torch.equal(outputs["memory"], outputs["file"])


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("candidates", [2, None])
def test_decoding_in_cpp_gives_what_torch_gives(
    monkeypatch: pytest.MonkeyPatch, candidates: int | None, state_dtype: str | None
) -> None:
    monkeypatch.setattr("bsbr.streaming.PAGE", 2)
    monkeypatch.setattr(streaming, "PAGE", 2)
    torch.manual_seed(0)
    options = {"candidates": candidates, "state_dtype": state_dtype, "num_kv_heads": 2, "feature_expansion": 3, "initial_gain": 1.0}
    attention = BSBRAttention(72, 4, retrieval="token", chunk_size=3, **options).eval()
    x = torch.randn(2, 24, 72)
    with torch.no_grad():
        _, state = attention.extend(x[:, :22])
        in_cpp, after = attention.extend(x[:, 22:23], state)
        attention.impl = "torch"
        in_torch, same = attention.extend(x[:, 22:23], state)
    torch.testing.assert_close(in_cpp, in_torch, rtol=1e-4, atol=1e-5)
    assert after.keys() == same.keys()


def test_a_state_of_another_shape_or_dtype_is_refused() -> None:
    attention = build()
    _, state = attention.extend(hidden(13))
    with pytest.raises(ValueError, match=r"has keys \[1, 4, 3, 4\], got \[2, 4, 3, 4\]"):
        attention.extend(hidden(1, batch=1), state)
    with pytest.raises(ValueError, match=r"chunk_states\.0 must be torch\.int8, got torch\.float64"):
        build(state_dtype="int8").extend(hidden(1), state)
    with pytest.raises(ValueError, match="has 2 chunks in its tables, got 0"):
        attention.extend(hidden(1), {name: x for name, x in state.items() if not name.startswith("chunk_")})


# --- cost and options -----------------------------------------------------------------------------


@options_of_all_kinds
def test_declared_flops_are_those_of_a_count_by_hand(options: dict[str, Any]) -> None:
    attention, time = build(**options), 43
    d_r, k, kv_heads = attention.feature_dim, options.get("candidates", 4), attention.num_kv_heads
    seen = [i // CHUNK for i in range(time)]
    local = sum(i % CHUNK + 1 + min(options.get("chunk_overlap", 0), i // CHUNK * CHUNK) for i in range(time)) * 2 * 4
    read = sum(min(s, k or 99) for s in seen) * d_r * 4
    size = 4 if options.get("router") == "meta" else d_r
    scored = 0 if k is None and options.get("router", "energy") == "energy" else sum(seen) * size
    stored = 8 * (CHUNK * d_r * 4 + (attention.beta_proj is not None) * CHUNK * (CHUNK - 1) // 2 * (d_r + 4))
    assert attention.flops(time) == 2 * (4 * (local + read + scored) + kv_heads * stored)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "softmax"}, "router must be one of energy, key, meta, got 'softmax'"),
        ({"candidates": 0}, "candidates must be a positive integer, got 0"),
        ({"state_dtype": "int4"}, "state_dtype must be one of None, bfloat16, int8, got 'int4'"),
        ({"state_store": "disk"}, "state_store must be one of memory, file, got 'disk'"),
        ({"meta_projections": True}, "meta_projections are those of router=\"meta\", got router='energy'"),
        ({"feature_expansion": 0}, "feature_expansion must be a positive integer, got 0"),
        ({"retrieval": "word"}, "retrieval must be one of chunk, token, got 'word'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BSBRAttention(16, 4, **{"retrieval": "token"} | options)


def test_a_model_takes_the_option() -> None:
    model = BSBRModel(10, 16, 1, 2, chunk_size=4, ff_dim=8, retrieval="token", candidates=1)
    assert any(isinstance(part, TokenRetrievalAttention) for part in model.modules())
