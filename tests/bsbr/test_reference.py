"""Tests of `bsbr_attention` and its reference against masks in numpy, cases worked out by hand, and their gradients."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bsbr import bsbr_attention, reference
from bsbr.backends.pytorch import unit_norm

CHUNK = 5
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7, 7 * CHUNK]
OPTIONS: list[dict[str, int]] = [
    {},
    {"chunk_overlap": 1},
    {"chunk_overlap": CHUNK},
    {"chunk_overlap": 2 * CHUNK + 3},
    {"chunk_overlap": 1000},
    {"top_k": 1},
    {"top_k": 2, "chunk_overlap": 3},
    {"top_k": 50},
    {"normalise": True},
    {"normalise": True, "top_k": 2},
]
Array = np.ndarray[Any, Any]


# --- the oracle: the equation with its two masks written out --------------------------------------


def bsbr_oracle(
    q: Array,
    k: Array,
    v: Array,
    r: Array,
    h: Array,
    phi_q: Array,
    phi_k: Array,
    *,
    chunk_size: int,
    chunk_overlap: int = 0,
    top_k: int | None = None,
    normalise: bool = False,
    beta: Array | None = None,
) -> Array:
    heads, time, head_dim = q.shape[1:]
    k, v, h, phi_k = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v, h, phi_k))
    i, j = np.arange(time)[:, None], np.arange(time)[None, :]
    inside = (j <= i) & (j >= i // chunk_size * chunk_size - chunk_overlap)
    local = softmax(np.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(head_dim), inside)
    out = np.einsum("bhij,bhjd->bhid", local, v)

    chunk_of = np.arange(time) // chunk_size
    chunks = chunk_of[-1] + 1
    belongs = (np.arange(chunks)[:, None] == chunk_of[None, :]).astype(float)
    if beta is None:
        states = np.einsum("sj,bhjr,bhjd->bhsrd", belongs, phi_k, v)
    else:  # what a token writes is multiplied by I − β φ(k) φ(k)ᵀ of each later token of its chunk
        states = np.zeros((*q.shape[:2], chunks, phi_k.shape[3], head_dim))
        beta = np.repeat(beta, heads // beta.shape[1], axis=1)[..., None, None]
        erased = np.eye(phi_k.shape[3]) - beta * phi_k[..., :, None] * phi_k[..., None, :]
        for token in range(time):
            new = beta[:, :, token] * phi_k[:, :, token, :, None] * v[:, :, token, None, :]
            for later in range(token + 1, min(time, (chunk_of[token] + 1) * chunk_size)):
                new = erased[:, :, later] @ new
            states[:, :, chunk_of[token]] += new
    scores = np.zeros((*q.shape[:2], chunks, chunks))  # the last chunk has no meta key, because no chunk retrieves it
    scores[..., : h.shape[2]] = np.einsum("bhtd,bhsd->bhts", r, h[:, :, :chunks]) / math.sqrt(head_dim)
    t, s = np.arange(chunks)[:, None], np.arange(chunks)[None, :]
    outside = np.broadcast_to(s < t, scores.shape)
    if top_k is not None:
        # better[.., t, s, u]: for chunk t, the visible chunk u comes before chunk s.
        a, b = scores[..., :, None], scores[..., None, :]
        better = outside[..., None, :] & ((b > a) | ((b == a) & (s[..., None, :] < s[..., None])))
        outside = outside & (better.sum(axis=-1) < top_k)
    retrieved = np.einsum("bhts,bhsrd->bhtrd", softmax(scores, outside), states)
    if normalise:
        norm = np.sqrt((retrieved**2).sum(axis=(-2, -1), keepdims=True))
        retrieved = retrieved / np.where(norm == 0, 1, norm) * math.sqrt(head_dim)
    return out + np.einsum("bhir,bhird->bhid", phi_q, retrieved[:, :, chunk_of])


def softmax(scores: Array, mask: Array) -> Array:
    """Softmax over the last axis of the entries in the mask; zero in rows without any."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * mask
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def inputs(
    time: int, *, heads: int = 4, kv_heads: int = 2, head_dim: int = 6, feature_dim: int = 3, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v, r, h, φ(q), φ(k)."""
    generator = torch.Generator().manual_seed(time)
    chunks = -(-time // CHUNK)
    sizes = [
        *((heads, time, head_dim), (kv_heads, time, head_dim), (kv_heads, time, head_dim)),
        *((heads, chunks, head_dim), (kv_heads, chunks - 1, head_dim)),
        *((heads, time, feature_dim), (kv_heads, time, feature_dim)),
    ]
    return [torch.randn(2, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def fast(*tensors: Tensor, **options: int) -> Tensor:
    q, k, v, r, h, q_features, k_features = tensors
    return bsbr_attention(q, k, v, r, h, chunk_size=CHUNK, q_features=q_features, k_features=k_features, **options)


def slow(*tensors: Tensor, **options: int) -> Tensor:
    q, k, v, r, h, q_features, k_features = tensors
    return reference.bsbr_attention(q, k, v, r, h, chunk_size=CHUNK, q_features=q_features, k_features=k_features, **options)


def is_close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the relative norm of the difference is at most `tolerance`."""
    return bool((actual.double() - expected.double()).norm() <= tolerance * expected.double().norm())


# --- by hand --------------------------------------------------------------------------------------


def row(*numbers: float) -> Tensor:
    """[1, 1, time, 1]."""
    return torch.tensor(numbers, dtype=torch.float64).view(1, 1, -1, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # q = 0, so inside a chunk every visible token counts the same: 1, (1+2)/2 | 4, (4+8)/2 | 16.
        # F_0 = 1·1 + 1·2 = 3, F_1 = 1·4 + 2·8 = 20. Chunk 1 sees chunk 0 only: F̄_1 = 3. Chunk 2 scores ln 3 and 0,
        # weights 3/4 and 1/4: F̄_2 = 2.25 + 5 = 7.25. Read with φ(q) = 1, 2 | 3: 4 + 3, 6 + 6 | 16 + 21.75.
        ({}, [1, 1.5, 7, 12, 37.75]),
        # One token of overlap: (2+4)/2, (2+4+8)/3 | (8+16)/2.
        ({"chunk_overlap": 1}, [1, 1.5, 3 + 3, 14 / 3 + 6, 12 + 21.75]),
        # More overlap than there is: plain means of the past.
        ({"chunk_overlap": 9}, [1, 1.5, 7 / 3 + 3, 15 / 4 + 6, 31 / 5 + 21.75]),
        # Chunk 2 keeps only chunk 0: 16 + 3·3.
        ({"top_k": 1}, [1, 1.5, 7, 12, 25]),
    ],
)
@pytest.mark.parametrize("function", [bsbr_attention, reference.bsbr_attention])
def test_five_tokens_by_hand(function: Any, options: dict[str, int], expected: list[float]) -> None:
    out = function(
        row(0, 0, 0, 0, 0),
        row(3, 1, 4, 1, 5),
        row(1, 2, 4, 8, 16),
        row(-7, 2, math.log(3)),
        row(1, 0),
        chunk_size=2,
        q_features=row(50, 60, 1, 2, 3),
        k_features=row(1, 1, 1, 2, 70),
        **options,
    )
    torch.testing.assert_close(out, row(*expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [bsbr_attention, reference.bsbr_attention])
def test_both_softmaxes_scale_by_the_root_of_head_dim(function: Any) -> None:
    # head_dim 4: a product of 2·ln 3 is a score of ln 3, hence weights 3/4 and 1/4 beside a score of 0.
    def rows(*firsts: float) -> Tensor:
        return torch.tensor([[first, 0, 0, 0] for first in firsts], dtype=torch.float64).view(1, 1, -1, 4)

    asks, off, on = rows(2 * math.log(3)), rows(0, 0, 0), rows(1, 1, 1)
    inside = function(off + asks, rows(0, 1, 0), rows(1, 5, 9), rows(0), rows(), chunk_size=3, q_features=off, k_features=off)
    torch.testing.assert_close(
        inside[..., 0].flatten(), rows(1, 4, 5).flatten()[::4], rtol=0, atol=1e-12
    )  # (1·1 + 3·5)/4; (1+15+9)/5

    # Chunks of one token, read with φ = 1: token 2 adds 3/4·1 + 1/4·5 = 2 to its own 9, token 1 adds 1 to its 5.
    outside = function(off, off, rows(1, 5, 9), off + asks, rows(1, 0), chunk_size=1, q_features=on, k_features=on)
    torch.testing.assert_close(outside[..., 0].flatten(), rows(1, 6, 11).flatten()[::4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [bsbr_attention, reference.bsbr_attention])
def test_default_features_read_the_value_of_an_equal_key(function: Any) -> None:
    # With unit norm the query (6, 8) matches the key (3, 4), and (-8, 6) is orthogonal to it.
    q = torch.tensor([[0, 0], [6, 8], [-8, 6]], dtype=torch.float64).view(1, 1, 3, 2)
    k = torch.tensor([[3, 4], [0, 0], [0, 0]], dtype=torch.float64).view(1, 1, 3, 2)
    v = torch.tensor([[7, 1], [20, 30], [40, 50]], dtype=torch.float64).view(1, 1, 3, 2)
    # Chunks of one token; the third retrieves only the first, whose score is far higher.
    r = torch.tensor([[0, 0], [0, 0], [1e3, 0]], dtype=torch.float64).view(1, 1, 3, 2)
    h = torch.tensor([[1, 0], [0, 0]], dtype=torch.float64).view(1, 1, 2, 2)
    expected = torch.tensor([[7, 1], [20 + 7, 30 + 1], [40, 50]], dtype=torch.float64).view(1, 1, 3, 2)
    torch.testing.assert_close(function(q, k, v, r, h, chunk_size=1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", [bsbr_attention, reference.bsbr_attention])
def test_neighbouring_query_heads_share_a_key_value_head(function: Any) -> None:
    q, _, _, r, _, _, _ = inputs(2 * CHUNK, kv_heads=4)
    ones = torch.ones(2, 2, 2 * CHUNK, 6, dtype=torch.float64)
    v = ones * torch.tensor([1.0, 10.0], dtype=torch.float64).view(1, 2, 1, 1)
    out = function(q, ones, v, r, ones[:, :, :1], chunk_size=CHUNK, q_features=q[..., :1] * 0 + 1, k_features=ones[..., :1])
    # Means of equal values in the first chunk; the second adds the sum over the first.
    expected = torch.tensor([1.0, 1.0, 10.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(out[:, :, 0], expected.view(1, 4, 1).expand(2, 4, 6))
    torch.testing.assert_close(out[:, :, -1], (1 + CHUNK) * expected.view(1, 4, 1).expand(2, 4, 6))


# --- agreement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("time", LENGTHS)
def test_fast_reference_and_oracle_agree(time: int, options: dict[str, int]) -> None:
    tensors = inputs(time)
    expected = bsbr_oracle(*(x.numpy() for x in tensors), chunk_size=CHUNK, **options)
    np.testing.assert_allclose(slow(*tensors, **options).numpy(), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(fast(*tensors, **options).numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "feature_dim"), [(1, 1, 1, 1), (3, 3, 2, 2), (6, 2, 8, 1), (4, 1, 3, 7)])
def test_fast_reference_and_oracle_agree_for_other_sizes(heads: int, kv_heads: int, head_dim: int, feature_dim: int) -> None:
    tensors = inputs(23, heads=heads, kv_heads=kv_heads, head_dim=head_dim, feature_dim=feature_dim)
    options = {"top_k": 2, "chunk_overlap": 2}
    expected = bsbr_oracle(*(x.numpy() for x in tensors), chunk_size=CHUNK, **options)
    np.testing.assert_allclose(slow(*tensors, **options).numpy(), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(fast(*tensors, **options).numpy(), expected, rtol=0, atol=1e-9)


def test_default_features_are_unit_vectors() -> None:
    q, k, v, r, h, _, _ = inputs(22)
    phi = [x.numpy() / np.sqrt((x.numpy() ** 2).sum(axis=-1, keepdims=True) + 1e-6) for x in (q, k)]
    expected = bsbr_oracle(*(x.numpy() for x in (q, k, v, r, h)), *phi, chunk_size=CHUNK)
    np.testing.assert_allclose(bsbr_attention(q, k, v, r, h, chunk_size=CHUNK).numpy(), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(reference.bsbr_attention(q, k, v, r, h, chunk_size=CHUNK).numpy(), expected, rtol=0, atol=1e-9)
    assert unit_norm(torch.zeros(3)).tolist() == [0, 0, 0]


def test_the_gain_scales_what_each_head_retrieves() -> None:
    tensors = inputs(3 * CHUNK + 2)
    gain = torch.tensor([1.0, -0.5, 2.0, 0.1], dtype=torch.float64)
    phi_q = tensors[5].numpy() * gain.numpy()[:, None, None]
    expected = bsbr_oracle(*(x.numpy() for x in tensors[:5]), phi_q, tensors[6].numpy(), chunk_size=CHUNK)
    for function in (bsbr_attention, reference.bsbr_attention):
        out = function(*tensors[:5], chunk_size=CHUNK, q_features=tensors[5], k_features=tensors[6], gain=gain)
        np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-9)


def with_beta(time: int, **sizes: Any) -> dict[str, Tensor]:
    """Inputs by name, with φ of unit norm and β from 0 to 1."""
    names = ("q", "k", "v", "meta_query", "meta_key", "q_features", "k_features")
    named = dict(zip(names, inputs(time, **sizes), strict=True))
    named |= {name: named[name] / named[name].norm(dim=-1, keepdim=True) for name in ("q_features", "k_features")}
    return named | {"beta": torch.linspace(0, 1, named["k"].shape[:3].numel(), dtype=torch.float64).view(named["k"].shape[:3])}


@pytest.mark.parametrize("options", [{}, {"normalise": True}, {"normalise": True, "top_k": 2, "chunk_overlap": 3}], ids=str)
@pytest.mark.parametrize("time", LENGTHS)
def test_the_delta_rule_in_each_chunk(time: int, options: dict[str, int]) -> None:
    tensors = {name: x.requires_grad_() for name, x in with_beta(time).items()}
    *rest, beta = (x.detach().numpy() for x in tensors.values())
    expected = bsbr_oracle(*rest, chunk_size=CHUNK, beta=beta, **options)
    outs = [function(**tensors, chunk_size=CHUNK, **options) for function in (bsbr_attention, reference.bsbr_attention)]
    outs.append(bsbr_attention(**tensors, chunk_size=CHUNK, impl="torch", **options))
    upstream = torch.randn(outs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for out in outs:
        np.testing.assert_allclose(out.detach().numpy(), expected, rtol=0, atol=1e-9)
        wanted = {"allow_unused": True, "materialize_grads": True}
        gradients.append(torch.autograd.grad((out * upstream).sum(), list(tensors.values()), **wanted))
    for a, b, c in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        torch.testing.assert_close(c, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_gradients_of_the_delta_rule_match_finite_differences(impl: Any) -> None:
    named = with_beta(2 * CHUNK + 3, heads=2, kv_heads=1, head_dim=2, feature_dim=2)
    tensors = [x[:1].detach().requires_grad_() for x in named.values()]

    def attend(*x: Tensor) -> Tensor:
        return bsbr_attention(**dict(zip(named, x, strict=True)), chunk_size=CHUNK, normalise=True, impl=impl)

    assert torch.autograd.gradcheck(attend, tensors)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_delta_rule_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    tensors = {name: x.to(dtype) for name, x in with_beta(8 * CHUNK + 3).items()}
    actual, expected = (
        function(**tensors, chunk_size=CHUNK, normalise=True) for function in (bsbr_attention, reference.bsbr_attention)
    )
    assert actual.dtype == dtype
    assert is_close(actual, expected, tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("time", [1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_gradients_match_the_reference(time: int, options: dict[str, int]) -> None:
    tensors = [x.requires_grad_() for x in inputs(time)]
    upstream = torch.randn(2, 4, time, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual, expected = (
        torch.autograd.grad((function(*tensors, **options) * upstream).sum(), tensors, allow_unused=True, materialize_grads=True)
        for function in (fast, slow)
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"top_k": 1, "chunk_overlap": 2}], ids=str)
def test_gradients_match_finite_differences(options: dict[str, int]) -> None:
    tensors = [x[:1].requires_grad_() for x in inputs(2 * CHUNK + 3, heads=2, kv_heads=1, head_dim=2, feature_dim=1)]
    assert torch.autograd.gradcheck(lambda *x: fast(*x, **options), tensors)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_close_in_values_and_gradients(dtype: torch.dtype, tolerance: float, options: dict[str, int]) -> None:
    tensors = [x.requires_grad_() for x in inputs(8 * CHUNK + 3, dtype=dtype)]
    actual, expected = fast(*tensors, **options), slow(*tensors, **options)
    assert actual.dtype == dtype
    assert is_close(actual, expected, tolerance)
    for a, b in zip(
        torch.autograd.grad(actual.float().square().mean(), tensors),
        torch.autograd.grad(expected.square().mean(), tensors),
        strict=True,
    ):
        assert is_close(a, b, 2 * tolerance)  # the loss squares the error of the output


@pytest.mark.parametrize("function", [fast, slow])
def test_top_k_selects_the_earliest_of_equal_scores_for_all_later_inputs(function: Any) -> None:
    tensors = inputs(40 * CHUNK)
    tensors[3] = torch.zeros_like(tensors[3])  # every score is 0
    expected = bsbr_oracle(*(x.numpy() for x in tensors), chunk_size=CHUNK, top_k=2)
    whole = function(*tensors, top_k=2)
    np.testing.assert_allclose(whole.numpy(), expected, rtol=0, atol=1e-9)
    for chunks in (7, 20):
        lengths = [chunks * CHUNK] * 3 + [chunks, chunks - 1] + [chunks * CHUNK] * 2
        part = function(*(x[:, :, :length] for x, length in zip(tensors, lengths, strict=True)), top_k=2)
        torch.testing.assert_close(part, whole[:, :, : chunks * CHUNK], rtol=0, atol=1e-12)


# --- causality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [fast, slow])
@pytest.mark.parametrize("overlap", [0, 2, CHUNK + 2])
def test_a_token_reads_exactly_what_the_masks_allow(function: Any, overlap: int) -> None:
    time = 3 * CHUNK + 2
    tensors = [x[:1].requires_grad_() for x in inputs(time, heads=1, kv_heads=1)]
    out = function(*tensors, chunk_overlap=overlap)
    for i in range(time):
        gradients = torch.autograd.grad(out[:, :, i].sum(), tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
        read = [{int(at) for at in (x[0, 0].abs() > 1e-12).any(dim=1).nonzero()} for x in gradients]
        chunk = i // CHUNK
        inside = set(range(max(0, chunk * CHUNK - overlap), i + 1))
        earlier = set(range(chunk * CHUNK))
        retrieves = chunk > 1  # a softmax over one chunk does not depend on its score
        assert read == [
            {i} if len(inside) > 1 else set(),  # q; of a single visible key the weight is 1
            inside if len(inside) > 1 else set(),
            inside | earlier,
            {chunk} if retrieves else set(),  # r: that of its own chunk
            set(range(chunk)) if retrieves else set(),  # h: those of complete chunks, never its own
            {i} if chunk else set(),
            earlier,  # φ(k): the own chunk is never retrieved
        ]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_later_inputs_change_no_earlier_output(options: dict[str, int]) -> None:
    time = 3 * CHUNK + 7
    tensors, other = inputs(time), [100 * x.flip(2) for x in inputs(time)]
    before = fast(*tensors, **options)
    for t in range(time):
        chunk = t // CHUNK
        known = [t + 1, t + 1, t + 1, chunk + 1, chunk, t + 1, t + 1]
        changed = [torch.cat([x[:, :, :n], y[:, :, n:]], dim=2) for x, y, n in zip(tensors, other, known, strict=True)]
        after = fast(*changed, **options)
        torch.testing.assert_close(after[:, :, : t + 1], before[:, :, : t + 1], rtol=0, atol=1e-12)
        assert t + 1 == time or not torch.allclose(after[:, :, t + 1 :], before[:, :, t + 1 :])


@pytest.mark.parametrize("time", [1, 2, CHUNK - 1, CHUNK])
@pytest.mark.parametrize("overlap", [0, 3])
def test_one_chunk_is_softmax_attention(time: int, overlap: int) -> None:
    q, k, v, *rest = inputs(time)
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q @ keys.mT / math.sqrt(6)).masked_fill(~torch.ones(time, time, dtype=torch.bool).tril(), -torch.inf)
    expected = torch.softmax(scores, dim=-1) @ values
    torch.testing.assert_close(fast(q, k, v, *rest, chunk_overlap=overlap), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(slow(q, k, v, *rest, chunk_overlap=overlap), expected, rtol=0, atol=1e-12)


def test_spare_meta_keys_are_not_read() -> None:
    q, k, v, r, h, *features = inputs(3 * CHUNK)
    spare = torch.cat([h, torch.full_like(h, torch.nan)], dim=2)
    assert torch.equal(fast(q, k, v, r, spare, *features), fast(q, k, v, r, h, *features))


def test_a_batch_item_does_not_depend_on_its_neighbours() -> None:
    tensors = inputs(22)
    both = fast(*tensors, top_k=2, chunk_overlap=3)
    for item in range(2):
        single = fast(*(x[item : item + 1] for x in tensors), top_k=2, chunk_overlap=3)
        torch.testing.assert_close(single, both[item : item + 1], rtol=0, atol=1e-12)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"chunk_size": 0}, "chunk_size must be a positive integer, got 0"),
        ({"chunk_size": 2.0}, "chunk_size must be a positive integer, got 2.0"),
        ({"top_k": 0}, "retrieval_top_k must be a positive integer, got 0"),
        ({"chunk_overlap": -1}, "chunk_overlap must be an integer of at least 0, got -1"),
        (
            {"q": torch.zeros(2, 9, 6)},
            "q, k and v must be [batch, heads, time, head_dim], got q [2, 9, 6], k [2, 2, 9, 6], v [2, 2, 9, 6]",
        ),
        (
            {"v": torch.zeros(2, 2, 8, 6)},
            (
                "q, k and v must agree in batch and head_dim, and k and v in heads and time, "
                "got q [2, 4, 9, 6], k [2, 2, 9, 6], v [2, 2, 8, 6]"
            ),
        ),
        (
            {"q": torch.zeros(2, 3, 9, 6)},
            (
                "there must be heads, and the heads of q must be a multiple of those of k and v, "
                "got q [2, 3, 9, 6], k [2, 2, 9, 6], v [2, 2, 9, 6]"
            ),
        ),
        (
            {"q": torch.zeros(2, 4, 10, 6)},
            "q must hold at least one position and no more than k and v, got q [2, 4, 10, 6], k [2, 2, 9, 6], v [2, 2, 9, 6]",
        ),
        (
            {"q": torch.zeros(2, 4, 8, 6)},
            "q and k must have the same time, got 8 and 9; to continue a sequence use BSBRAttention.extend",
        ),
        (
            {"meta_query": torch.zeros(2, 4, 1, 6)},
            "meta_query must be [batch, heads, 2 chunks, head_dim] = [2, 4, 2, 6], got [2, 4, 1, 6]",
        ),
        (
            {"meta_key": torch.zeros(2, 2, 0, 6)},
            "meta_key must be [batch, kv_heads, 1 chunks or more, head_dim], got [2, 2, 0, 6] beside k [2, 2, 9, 6]",
        ),
        ({"gain": torch.ones(2)}, "gain must be [heads = 4], got [2]"),
        ({"beta": torch.ones(2, 4, 9)}, "beta must be [batch, kv_heads, time] = [2, 2, 9], got [2, 4, 9]"),
        (
            {"q_features": torch.zeros(2, 4, 9, 2)},
            (
                "q_features and k_features must be those of q and k in all but their common last size, d_r: "
                "got [2, 4, 9, 2] and [2, 2, 9, 3] beside q [2, 4, 9, 6] and k [2, 2, 9, 6]"
            ),
        ),
    ],
)
def test_bad_input_raises(change: dict[str, Any], sentence: str) -> None:
    names = ("q", "k", "v", "meta_query", "meta_key", "q_features", "k_features")
    arguments: dict[str, Any] = dict(zip(names, inputs(9), strict=True)) | {"chunk_size": CHUNK}
    arguments |= {name: x.double() if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared below
        bsbr_attention(**arguments)
    assert str(caught.value) == sentence
