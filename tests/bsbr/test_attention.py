"""Tests of `BSBRAttention`: projections, causality, dropout, padding, cost and bad options.

`attend` is compared with `bsbr.reference`, which test_reference.py compares with masks in numpy.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bsbr import BSBRAttention

CHUNK = 5
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"chunk_overlap": 2, "compression_factor": 2, "retrieval_norm": False},
    {"chunk_overlap": CHUNK + 3, "num_kv_heads": 2, "rotary": True},
    {"retrieval_top_k": 1, "compression_factor": 4, "num_kv_heads": 1},
    {"retrieval_top_k": 2, "chunk_overlap": 1, "num_kv_heads": 2, "meta_pooling": "last", "retrieval_norm": False},
    {"retrieval_top_k": 100, "rotary": True, "compression_factor": 1, "feature_map": "linear"},
    {"compression_factor": 2, "num_kv_heads": 2, "feature_map": "linear", "meta_projections": True, "chunk_states": "sum"},
    {"chunk_states": "sum", "retrieval_norm": False},
]
PAIRS = {4: [(0, 0), (1, 1), (2, 2), (0, 1)], 2: [(0, 0), (1, 1)], 1: [(0, 0)]}
"""Indices of the factors that each feature of φ multiplies, by d_r."""

options_of_all_kinds = pytest.mark.parametrize("options", OPTIONS, ids=str)


def build(**options: Any) -> BSBRAttention:
    """hidden_dim 16, 4 heads of 4, float64, with gains that differ from head to head and β that differ from token to token."""
    torch.manual_seed(0)
    attention = BSBRAttention(16, 4, **{"chunk_size": CHUNK} | options).double()
    with torch.no_grad():
        attention.retrieval_gain.copy_(torch.tensor([1.0, -0.5, 2.0, 0.1]))
        if attention.beta_proj is not None:
            attention.beta_proj.weight.normal_()
    return attention


def hidden(time: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, time, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(time))


# --- values ---------------------------------------------------------------------------------------


@options_of_all_kinds
@pytest.mark.parametrize("time", LENGTHS)
def test_projections_match_the_definition(time: int, options: dict[str, Any]) -> None:
    attention, x = build(**options), hidden(time).numpy()
    weights = {name: parameter.detach().numpy() for name, parameter in attention.named_parameters()}

    def heads(values: Any, name: str) -> Any:
        weight = weights[f"{name}.weight"].reshape(-1, 4, 16)
        return np.einsum("bti,hdi->bhtd", values, weight)

    def rotated(values: Any) -> Any:
        if not options.get("rotary"):
            return values
        z = (values[..., :2] + 1j * values[..., 2:]) * np.exp(1j * np.outer(np.arange(time), [1, 0.01]))
        return np.concatenate([z.real, z.imag], axis=-1)

    feature_dim = 4 // options.get("compression_factor", 1)

    def phi(name: str, values: Any) -> Any:
        if options.get("feature_map") == "linear":
            features = np.einsum("bhti,oi->bhto", values, weights.get("features.projection.weight", np.eye(4)))
        else:
            weight = weights[f"features.{name}.weight"]
            # 3 factors have 6 products, of which the first 4 are used; 2 have 3; 1 has 1.
            num_factors = {4: 3, 2: 2, 1: 1}[feature_dim]
            features = np.einsum("bti,hdi->bhtd", x, weight.reshape(-1, num_factors, 16))
        unit = features / np.sqrt((features**2).sum(axis=-1, keepdims=True) + 1e-6)
        if options.get("feature_map") == "linear":
            return unit
        return np.stack([unit[..., i] * unit[..., j] * (1 if i == j else 2**0.5) for i, j in PAIRS[feature_dim]], axis=-1)

    q, k, v = heads(x, "q_proj"), heads(x, "k_proj"), heads(x, "v_proj")
    chunk_starts = range(0, time, CHUNK)
    first_tokens = np.stack([x[:, begin] for begin in chunk_starts], axis=1)
    chunks = [x[:, begin : begin + CHUNK] for begin in chunk_starts[:-1]]
    pooled = [chunk[:, -1] if options.get("meta_pooling") == "last" else chunk.mean(axis=1) for chunk in chunks]
    pooled = np.stack(pooled, axis=1) if chunks else np.zeros((2, 0, 16))
    own = "meta_" if options.get("meta_projections") else ""
    expected = [rotated(q), rotated(k), v, heads(first_tokens, f"{own}q_proj"), heads(pooled, f"{own}k_proj")]
    expected += [phi("q_proj", q), phi("k_proj", k)]
    if options.get("chunk_states") != "sum":
        logits = x @ weights["beta_proj.weight"].T + weights["beta_proj.bias"]
        expected.append((1 / (1 + np.exp(-logits))).transpose(0, 2, 1))

    tensors = attention.project(torch.from_numpy(x))
    for actual, expected_value in zip(tensors, expected, strict=True):
        np.testing.assert_allclose(actual.detach().numpy(), expected_value, rtol=0, atol=1e-12)

    attended = attention.reference(*tensors).detach().numpy().transpose(0, 2, 1, 3).reshape(2, time, 16)
    output = attention(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(output, attended @ weights["out_proj.weight"].T, rtol=0, atol=1e-9)


@options_of_all_kinds
def test_gradients_match_the_reference(options: dict[str, Any]) -> None:
    attention, x = build(**options), hidden(3 * CHUNK + 7).requires_grad_()
    leaves = [x, *attention.parameters()]
    by_fast, by_reference = (
        torch.autograd.grad(attention.output(attend(*attention.project(x))).square().mean(), leaves)
        for attend in (attention.attend, attention.reference)
    )
    for a, b in zip(by_fast, by_reference, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@options_of_all_kinds
@pytest.mark.parametrize("time", [1, CHUNK - 1, CHUNK])
def test_one_chunk_without_gradients_skips_the_features(time: int, options: dict[str, Any]) -> None:
    attention, x = build(**options), hidden(time)
    expected_value = attention(x)
    made = []
    attention.features.register_forward_hook(lambda *_: made.append("φ"))
    with torch.no_grad():
        torch.testing.assert_close(attention(x), expected_value, rtol=0, atol=1e-12)
        assert not made
        attention(hidden(CHUNK + 1))
    assert made


def test_a_single_chunk_is_softmax_attention() -> None:
    for attention, time in ((build(), CHUNK), (build(chunk_size=1000, chunk_overlap=3), 23)):
        x = hidden(time)
        q, k, v, *_ = attention.project(x)
        weights = torch.softmax((q @ k.mT / 2).masked_fill(~torch.ones(time, time, dtype=torch.bool).tril(), -torch.inf), dim=-1)
        torch.testing.assert_close(attention(x), attention.output(weights @ v), rtol=0, atol=1e-12)


def test_the_state_shrinks_by_exactly_the_compression_factor() -> None:
    for factor, feature_dim in ((None, 4), (1, 4), (2, 2), (4, 1)):
        attention = build(compression_factor=factor)
        _, state = attention.extend(hidden(9))
        assert state["states.0"].shape == (2, 4, 1, feature_dim, 4)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e6, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_inputs_give_finite_values_and_gradients(dtype: torch.dtype, scale: float) -> None:
    attention = build(chunk_overlap=2, compression_factor=2).to(dtype)
    x = (scale * hidden(3 * CHUNK + 2)).to(dtype).requires_grad_()
    out = attention(x)
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    assert out.isfinite().all()
    assert gradient.isfinite().all()


# --- causality ------------------------------------------------------------------------------------


@options_of_all_kinds
def test_later_tokens_change_no_earlier_output(options: dict[str, Any]) -> None:
    # Every t, so also within one chunk: the meta query is known at a chunk's first token.
    attention, time = build(**options), 3 * CHUNK + 3
    x = hidden(time)
    before = attention(x)
    for t in range(time - 1):
        after = attention(torch.cat([x[:, : t + 1], 10 * hidden(99)[:, t + 1 : time]], dim=1))
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=1e-12)
        assert not torch.allclose(after[:, t + 1], before[:, t + 1])


@options_of_all_kinds
def test_gradients_reach_all_past_and_no_future_tokens(options: dict[str, Any]) -> None:
    attention, time = build(**options), 3 * CHUNK + 3
    x = hidden(time, batch=1).requires_grad_()
    out = attention(x)
    for t in range(time):
        (gradient,) = torch.autograd.grad(out[:, t].square().sum(), x, retain_graph=True)
        reached = gradient[0].abs().amax(dim=1) > 0
        assert not reached[t + 1 :].any()
        if options.get("retrieval_top_k", 100) == 100:
            assert reached[: t + 1].all()


def test_a_chunk_is_retrieved_only_once_it_is_complete() -> None:
    # The values of the token's own chunk are 0: what remains is retrieved from complete earlier chunks.
    attention = build()
    for end in (CHUNK + 2, 2 * CHUNK, 3 * CHUNK):
        x = hidden(end + 1)
        q, k, v, *rest = attention.project(x)
        begin = end // CHUNK * CHUNK
        v = torch.cat([v[:, :, :begin], torch.zeros_like(v[:, :, begin:])], dim=2)
        retrieved = attention.attend(q, k, v, *rest)[:, :, end]
        assert retrieved.abs().max() > 1e-3
        for s in range(end // CHUNK):
            without = v.clone()
            without[:, :, s * CHUNK : (s + 1) * CHUNK] = 0
            other = attention.attend(q, k, without, *rest)[:, :, end]
            assert not torch.allclose(other, retrieved)


# --- the delta rule and normalisation --------------------------------------------------------------


def single_head(**options: Any) -> tuple[BSBRAttention, dict[str, Tensor]]:
    """An attention with one head, chunks of 4, head_dim 4 and gain 1; and q, k, v, r, h of 12 tokens, all zero."""
    attention = BSBRAttention(4, 1, chunk_size=4, feature_map="linear", initial_gain=1, **options).double()
    q = torch.zeros(1, 1, 12, 4, dtype=torch.float64)
    tensors = {"q": q, "k": q.clone(), "v": q.clone(), "meta_query": q[:, :, :3].clone(), "meta_key": q[:, :, :2].clone()}
    return attention, tensors


def test_the_delta_rule_replaces_the_value_of_a_repeated_key() -> None:
    # A key is stored twice in a chunk, with 1 and then 5. The next chunk reads 5 with β = 1, and their sum without β.
    for options, expected_value in (({"retrieval_norm": False}, 5), ({"retrieval_norm": False, "chunk_states": "sum"}, 6)):
        attention, tensors = single_head(**options)
        key = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
        keys, values = torch.zeros(1, 1, 12, 4, dtype=torch.float64), tensors["v"]
        keys[0, 0, [0, 3]] = key
        values[0, 0, 0, 1], values[0, 0, 3, 1] = 1, 5
        queries = torch.zeros_like(keys)
        queries[0, 0, 4] = key
        beta = [torch.ones(1, 1, 12, dtype=torch.float64)][: attention.beta_proj is not None]
        out = attention.attend(*tensors.values(), queries, keys, *beta)
        torch.testing.assert_close(out[0, 0, 4], torch.tensor([0, expected_value, 0, 0], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunks", [2, 7, 40])
def test_normalised_retrieval_does_not_fade_with_the_number_of_chunks(chunks: int) -> None:
    # One value of norm 2 = √head_dim under one key, among empty chunks: read in full, or divided by the number of chunks.
    key, value = torch.eye(4, dtype=torch.float64)[0], torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)
    for norm, expected_value in ((True, value), (False, value / (chunks - 1))):
        attention, _ = single_head(retrieval_norm=norm)
        x = torch.zeros(1, 1, 4 * chunks, 4, dtype=torch.float64)
        keys, values, queries = x.clone(), x.clone(), x.clone()
        keys[0, 0, 2], values[0, 0, 2], queries[0, 0, -1] = key, value, key
        out = attention.attend(x, x, values, x[:, :, :chunks], x[:, :, : chunks - 1], queries, keys, torch.ones_like(x[..., 0]))
        torch.testing.assert_close(out[0, 0, -1], expected_value, rtol=0, atol=1e-9)


# --- dropout --------------------------------------------------------------------------------------


@options_of_all_kinds
def test_dropout_is_off_in_eval_and_unbiased_in_training(options: dict[str, Any]) -> None:
    options = options | {"retrieval_norm": False}  # the mean of normalised states is not the normalised mean
    attention, runs, time = build(dropout=0.3, **options), 4000, 2 * CHUNK + 2
    x = hidden(time, batch=1)
    expected = attention.eval()(x)
    assert torch.equal(attention(x), expected)
    torch.testing.assert_close(expected, build(**options)(x), rtol=0, atol=0)

    torch.manual_seed(1)
    samples = attention.train()(x.expand(runs, -1, -1)).detach()
    assert not torch.equal(samples[0], samples[1])
    # 192 means of 4000 draws: in one of 10^6 such tests a mean is off by more than 6 standard errors.
    stray = (samples.mean(dim=0) - expected[0]).abs() / (samples.std(dim=0) / runs**0.5)
    assert stray.max() < 6


def test_dropout_acts_on_both_softmaxes() -> None:
    attention, local_only = (build(dropout=0.5, retrieval_norm=False) for _ in range(2))
    with torch.no_grad():
        local_only.retrieval_gain.zero_()
    torch.manual_seed(0)
    q, k, v, *rest = attention.project(hidden(2 * CHUNK))
    exact = attention.eval().attend(q, k, v, *rest)
    inside = local_only.eval().attend(q, k, v, *rest)
    outside = exact - inside
    # Without retrieval only the local part is left; with local values of 0 only the retrieved part: dropped, or doubled.
    assert not torch.allclose(local_only.train().attend(q, k, v, *rest), inside)
    attention.train()
    v = torch.cat([v[:, :, :CHUNK], torch.zeros_like(v[:, :, CHUNK:])], dim=2)
    retrieved = attention.attend(q, k, v, *rest)[:, :, CHUNK:]
    ratio = (retrieved / outside[:, :, CHUNK:]).detach()
    assert {round(number, 6) for number in ratio.flatten().tolist()} == {0, 2}


# --- padding --------------------------------------------------------------------------------------


def masks(time: int) -> Tensor:
    """Padding on the left, on the right, in holes, in holes as long as a chunk; one token, no token, all tokens."""
    mask = torch.zeros(7, time, dtype=torch.int64)
    mask[0, 4:] = 1
    mask[1, :-3] = 1
    mask[2, ::2] = 1
    mask[3] = 1
    mask[3, CHUNK - 1 : 2 * CHUNK] = 0
    mask[4, 7] = 1
    mask[6] = 1
    return mask


@options_of_all_kinds
@pytest.mark.parametrize("garbage", [0.0, torch.nan, torch.inf, -1e30])
def test_padding_anywhere_changes_nothing(garbage: float, options: dict[str, Any]) -> None:
    attention, time = build(**options), 3 * CHUNK + 2
    mask = masks(time)
    x = hidden(time, batch=len(mask)).masked_fill(mask[..., None] == 0, garbage).requires_grad_()
    out = attention(x, mask)
    for row, real, result in zip(x, mask != 0, out, strict=True):
        assert (result[~real] == 0).all()
        if real.any():
            torch.testing.assert_close(result[real], attention(row[real][None])[0], rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])
    assert (gradients[0][mask == 0] == 0).all()
    assert (gradients[0][:4][mask[:4] != 0] != 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


# --- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"compression_factor": 1}, *OPTIONS[1:]], ids=str)
@pytest.mark.parametrize("time", [*LENGTHS, 2 * CHUNK, 6 * CHUNK + 1])
def test_declared_flops_equal_a_count_over_the_masks(time: int, options: dict[str, Any]) -> None:
    attention = build(**options)
    heads, kv_heads, dim, feature_dim = 4, attention.num_kv_heads, 4, attention.feature_dim
    overlap, top_k = attention.chunk_overlap, attention.retrieval_top_k
    chunks = (time - 1) // CHUNK + 1
    total = 0
    for i in range(time):
        chunk = i // CHUNK
        seen = sum(chunk * CHUNK - overlap <= j <= i for j in range(time))
        total += heads * seen * 2 * (2 * dim)  # a score and a weighted value
        total += kv_heads * 2 * feature_dim * dim * (chunk < chunks - 1)  # stored in F, if a later chunk can retrieve it
        total += heads * 2 * feature_dim * dim * (chunk > 0)  # read out of F̄
    for chunk in range(chunks):
        if options.get("chunk_states") != "sum" and chunk < chunks - 1:
            for i in range(CHUNK):  # products of keys and parts of values in its block; the state before its block, read
                total += kv_heads * (i % 16) * 2 * (feature_dim + dim) + kv_heads * (i >= 16) * 2 * feature_dim * dim
        total += heads * 2 * dim * chunk
        total += heads * 2 * feature_dim * dim * (chunk if top_k is None else min(top_k, chunk))
    assert attention.flops(time) == total
    assert attention.flops(time, batch_size=3) == 3 * total


@options_of_all_kinds
def test_counted_flops_are_at_most_three_times_those_declared(options: dict[str, Any]) -> None:
    # Masked products are computed and discarded: half of a chunk's square, half of C × C, and more with overlap. Heads of 16 fill
    # a register of doubles; narrower ones are padded to the registers of the processor, which would count too.
    heads, head_dim, chunk, time = 4, 16, 16, 40 * 16
    attention = BSBRAttention(heads * head_dim, heads, **options | {"chunk_size": chunk}).double()
    tensors = attention.project(torch.randn(2, time, heads * head_dim, dtype=torch.float64))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attention.attend(*tensors)
    counted = counter.get_total_flops()
    if attention.retrieval_top_k in (None, 100):  # the counter does not count embedding_bag
        assert counted >= attention.flops(time, batch_size=2)
    assert counted < 3 * attention.flops(time, batch_size=2)
    n_by_n = 4 * heads * head_dim * time * time * 2
    assert counted < n_by_n / 2, f"as much work as {time} × {time} scores, at chunks of {chunk}"


def test_with_top_k_all_flops_but_the_scores_are_linear() -> None:
    attention = build(retrieval_top_k=2)
    scores = [4 * 2 * 4 * (chunks * (chunks - 1) // 2) for chunks in (64, 128, 256)]
    rest = [attention.flops(chunks * CHUNK) - s for chunks, s in zip((64, 128, 256), scores, strict=True)]
    assert rest[2] - rest[1] == 2 * (rest[1] - rest[0])


@pytest.mark.parametrize(("given", "gain"), [({}, 0), ({"initial_gain": 1}, 1), ({"initial_gain": -0.5}, -0.5)], ids=str)
def test_the_gain_starts_at_its_initial_value_and_can_leave_zero(given: dict[str, float], gain: float) -> None:
    attention, x = BSBRAttention(16, 4, chunk_size=CHUNK, **given).double(), hidden(3 * CHUNK + 2)
    assert attention.gain.tolist() == [gain] * 4
    chunk_outputs = torch.cat([attention(chunk) for chunk in x.split(CHUNK, dim=1)], dim=1)
    assert torch.allclose(attention(x), chunk_outputs, rtol=0, atol=1e-12) == (gain == 0)
    (slope,) = torch.autograd.grad(attention(x).square().sum(), attention.retrieval_gain)
    assert slope.all()  # it can leave 0


# --- bad options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"chunk_size": 0}, "chunk_size must be a positive integer, got 0"),
        ({"chunk_size": None}, "chunk_size must be a positive integer, got None"),
        ({"chunk_size": "128"}, "chunk_size must be a positive integer, got '128'"),
        ({"compression_factor": 3}, "compression_factor must divide head_dim = 4 (16 / 4), got 3"),
        ({"compression_factor": 8}, "compression_factor must divide head_dim = 4 (16 / 4), got 8"),
        ({"compression_factor": 0}, "compression_factor must be a positive integer, got 0"),
        ({"feature_map": "cubic"}, "feature_map must be one of quadratic, linear, got 'cubic'"),
        ({"initial_gain": "1"}, "initial_gain must be a finite number, got '1'"),
        ({"initial_gain": float("nan")}, "initial_gain must be a finite number, got nan"),
        ({"chunk_states": "product"}, "chunk_states must be one of delta, sum, got 'product'"),
        ({"meta_pooling": "first"}, "meta_pooling must be one of mean, last, got 'first'"),
        ({"chunk_overlap": -1}, "chunk_overlap must be an integer of at least 0, got -1"),
        ({"chunk_overlap": 1.5}, "chunk_overlap must be an integer of at least 0, got 1.5"),
        ({"chunk_overlap": True}, "chunk_overlap must be an integer of at least 0, got True"),
        ({"retrieval_top_k": 0}, "retrieval_top_k must be a positive integer, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got num_heads=4, num_kv_heads=3"),
    ],
)
def test_bad_options_raise(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared below
        BSBRAttention(16, 4, **options)
    assert str(caught.value) == sentence


def test_heads_that_do_not_divide_raise() -> None:
    with pytest.raises(ValueError, match=r"^hidden_dim must be a multiple of num_heads, got hidden_dim=16, num_heads=5$"):
        BSBRAttention(16, 5)
