"""Tests of the Triton kernels against `bsbr.reference`, in a separate process, which test_triton.py starts.

They run on the CPU under TRITON_INTERPRET=1, which triton reads when the kernels are imported, and otherwise on a GPU.
"""

import dataclasses
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from bsbr import reference
from bsbr.backends import triton
from bsbr.backends.triton import top_k, tuning
from bsbr.inputs import BSBRInputs, BSBROptions

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets tiles so small that every loop has several iterations, with as few programs as possible: each takes milliseconds."""

    def tile(step: str, like: Tensor, *, head_dim: int, chunk_size: int) -> tuning.Tile:
        if step in ("states", "output", "queries", "keys"):
            return tuning.Tile(rows=16 if chunk_size <= 16 else 32, columns=16, depth=16, num_warps=4, num_stages=1)
        return tuning.Tile(rows=16, columns=16, depth=256 if head_dim < 64 else 8192, num_warps=4, num_stages=1)

    if DEVICE == "cpu":
        from triton import language
        from triton.runtime import interpreter

        # A third of the time is spent on checks for pointer overflow, which out-of-bounds accesses would show too.
        options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)

        # Half of the rest is spent on patching triton.language for each call of a function; once is enough.
        patch, patched = interpreter._patch_lang, set[frozenset[str]]()

        def patch_once(function: Any) -> interpreter._LangPatchScope:
            seen = frozenset(one.__name__ for one in function.__globals__.values() if one in (language, language.core))
            if seen not in patched:
                patched.add(seen)
                scopes.append(patch(function))
            return interpreter._LangPatchScope()

        scopes: list[interpreter._LangPatchScope] = []
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(tuning, "tile", tile)


def inputs(
    time: int,
    chunk_size: int,
    *,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 24,
    d_r: int | None = None,
    batch: int = 1,
    spare_keys: int = 0,
    beta: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(time)
    chunks = -(-time // chunk_size)
    shapes = {
        "q": (heads, time, head_dim),
        "k": (kv_heads, time, head_dim),
        "v": (kv_heads, time, head_dim),
        "meta_query": (heads, chunks, head_dim),
        "meta_key": (kv_heads, chunks - 1 + spare_keys, head_dim),
    }
    if d_r is not None:
        shapes |= {"q_features": (heads, time, d_r), "k_features": (kv_heads, time, d_r)}
    made = {name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}
    made["gain"] = torch.linspace(-1, 1.5, heads)
    if d_r is not None:
        made |= {name: made[name] / d_r**0.5 for name in ("q_features", "k_features")}
    if beta:
        made["beta"] = torch.rand(batch, kv_heads, time, generator=generator)
    return {name: x.to(DEVICE, dtype) for name, x in made.items()}


def triton_attention(
    *, chunk_size: int, chunk_overlap: int = 0, top_k: int | None = None, normalise: bool = False, **tensors: Tensor
) -> Tensor:
    """Runs the kernels with the arguments of `reference.bsbr_attention`."""
    return triton.attend(BSBRInputs(**tensors), BSBROptions(chunk_size, chunk_overlap, top_k, normalise))


def compare(tensors: dict[str, Tensor], **options: Any) -> None:
    """Compares values and all gradients with the reference, by relative norm."""
    tensors = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    dtype = tensors["q"].dtype
    actual, expected = triton_attention(**tensors, **options), reference.bsbr_attention(**tensors, **options)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert_close("o", actual, expected, TOLERANCE[dtype], 0)
    upstream = torch.randn(actual.shape, generator=torch.Generator().manual_seed(0)).to(actual)
    names = list(tensors)
    gradients = [
        torch.autograd.grad(out, list(tensors.values()), upstream.to(out), allow_unused=True, materialize_grads=True)
        for out in (actual, expected)
    ]
    # A gradient of pure rounding, such as that of the scores of a softmax over one chunk, is compared with the largest gradient.
    largest = max(float(x.double().norm()) for x in gradients[1])
    for name, a, b in zip(names, *gradients, strict=True):
        assert a.dtype == tensors[name].dtype
        # The gradient of a score is a difference of sums over d_r·head_dim numbers: off by up to 1.4e-5 in float32 with 25600.
        factor = 2 if name in ("meta_query", "meta_key") else 1
        assert_close(f"the gradient of {name}", a, b, factor * TOLERANCE[dtype], 1e-2 * TOLERANCE[dtype] * largest)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float, floor: float) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert actual.isfinite().all(), name
    error, size = float((actual.double() - expected.double()).norm()), float(expected.double().norm())
    assert error <= max(tolerance * size, floor), f"{name} is off by {error:.2e} of {size:.2e}"


# --- sizes and options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "d_r", "options"),
    [
        *((time, d_r, {}) for time, d_r in ((1, None), (15, 8), (16, None), (17, None), (17, 8))),
        *((53, 8, options) for options in ({}, {"chunk_overlap": 1}, {"chunk_overlap": 47}, {"top_k": 2, "chunk_overlap": 5})),
        *((53, None, options) for options in ({}, {"chunk_overlap": 1000}, {"top_k": 1})),
    ],
)
def test_values_and_gradients_for_lengths_and_options(time: int, d_r: int | None, options: dict[str, int]) -> None:
    compare(inputs(time, 16, d_r=d_r), chunk_size=16, **options)


@pytest.mark.parametrize(
    ("time", "chunk_size", "sizes", "options"),
    [
        (9, 1, {}, {"chunk_overlap": 3}),
        (10, 2, {"heads": 2, "kv_heads": 2, "batch": 2}, {"top_k": 3}),
        (13, 5, {"heads": 6, "kv_heads": 2, "head_dim": 48}, {}),
        (95, 37, {"spare_keys": 3}, {"chunk_overlap": 40}),
        (150, 70, {"head_dim": 48, "d_r": 12}, {"chunk_overlap": 9}),
        (70, 33, {"head_dim": 32, "d_r": 96}, {}),  # features wider than the heads
        (75, 37, {"head_dim": 160}, {}),
        (70, 32, {"head_dim": 256, "d_r": 64}, {}),
        (70, 512, {}, {}),
        (37, 2, {"heads": 1}, {}),  # more chunks than a tile of states
        (15, 2, {}, {"top_k": 7}),  # as many as there are
    ],
    ids=str,
)
def test_values_and_gradients_for_sizes_that_are_no_powers_of_two(
    time: int, chunk_size: int, sizes: dict[str, int], options: dict[str, int]
) -> None:
    compare(inputs(time, chunk_size, **sizes), chunk_size=chunk_size, **options)


@pytest.mark.parametrize(
    ("dtype", "d_r", "options"),
    [(torch.float16, None, {"top_k": 2}), (torch.bfloat16, None, {"chunk_overlap": 7}), (torch.bfloat16, 16, {"top_k": 2})],
    ids=str,
)
def test_half_precision(dtype: torch.dtype, d_r: int | None, options: dict[str, int]) -> None:
    compare(inputs(53, 16, heads=2, kv_heads=1, d_r=d_r, dtype=dtype), chunk_size=16, **options)


@pytest.mark.parametrize(
    ("time", "d_r", "options"),
    [
        *((time, 8, {}) for time in (1, 16, 17, 53)),
        (53, None, {"chunk_overlap": 5}),
        (53, 8, {"top_k": 2}),
        (53, 96, {"dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_the_delta_rule_and_normalised_retrieval(time: int, d_r: int | None, options: dict[str, Any]) -> None:
    dtype = options.pop("dtype", torch.float32)
    compare(inputs(time, 16, d_r=d_r, beta=True, dtype=dtype), chunk_size=16, normalise=True, **options)


@pytest.mark.parametrize(("beta", "normalise"), [(True, False), (False, True)])
def test_the_delta_rule_or_normalised_retrieval_alone(beta: bool, normalise: bool) -> None:
    compare(inputs(37, 16, d_r=8, beta=beta), chunk_size=16, normalise=normalise)


def test_the_default_gain_is_one() -> None:
    tensors = inputs(50, 16)
    del tensors["gain"]
    compare(tensors, chunk_size=16)


@pytest.mark.parametrize(("d_r", "options"), [(None, {}), (8, {"top_k": 1})], ids=str)
def test_views_need_no_copy(d_r: int | None, options: dict[str, int]) -> None:
    tensors = inputs(20, 16, d_r=d_r, batch=2)
    expected = triton_attention(**tensors, chunk_size=16, **options)
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x for name, x in tensors.items()}
    assert not views["q"].is_contiguous()
    assert torch.equal(triton_attention(**views, chunk_size=16, **options), expected)
    columns = {name: x.mT.contiguous().mT if x.dim() == 4 else x for name, x in tensors.items()}
    assert torch.equal(triton_attention(**columns, chunk_size=16, **options), expected)
    every_other = {name: x.repeat_interleave(2, dim=-2)[..., ::2, :] if x.dim() == 4 else x for name, x in tensors.items()}
    compare(every_other, chunk_size=16, **options)


def test_the_upstream_gradient_may_be_expanded() -> None:
    tensors = {name: x.requires_grad_() for name, x in inputs(40, 16).items()}
    actual, expected = (
        torch.autograd.grad(function(**tensors, chunk_size=16).sum(), list(tensors.values()))
        for function in (triton_attention, reference.bsbr_attention)
    )
    for name, a, b in zip(tensors, actual, expected, strict=True):
        assert_close(name, a, b, 1e-5, 1e-4)


# --- properties -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "chunk_overlap": 20}], ids=str)
def test_earlier_outputs_have_the_same_bits_for_all_later_inputs(options: dict[str, int]) -> None:
    tensors = inputs(55, 16)
    whole = triton_attention(**tensors, chunk_size=16, **options)
    for cut in (32, 47):
        changed = {name: x.clone() for name, x in tensors.items()}
        for name in ("q", "k", "v"):
            changed[name][:, :, cut:] = 1e3
        changed["meta_query"][:, :, -(-cut // 16) :] = 1e3
        changed["meta_key"][:, :, cut // 16 :] = 1e3
        part = triton_attention(**changed, chunk_size=16, **options)
        assert torch.equal(part[:, :, :cut], whole[:, :, :cut])
        prefix = {name: x[:, :, :cut] if name in ("q", "k", "v") else x for name, x in tensors.items()}
        prefix |= {"meta_query": tensors["meta_query"][:, :, : -(-cut // 16)], "meta_key": tensors["meta_key"][:, :, : cut // 16]}
        torch.testing.assert_close(triton_attention(**prefix, chunk_size=16, **options), whole[:, :, :cut], rtol=0, atol=2e-6)


def test_top_k_selects_the_earliest_of_equal_scores() -> None:
    tensors = inputs(14, 2)
    tensors["meta_query"] = torch.zeros_like(tensors["meta_query"])
    compare(tensors, chunk_size=2, top_k=3)
    _, chosen = top_k.select(tensors["meta_query"], tensors["meta_key"], 6, 3)
    assert chosen[0, :, 2:].unique(dim=1).tolist() == [[[0, 1, 2]]] * 2


def test_gradients_have_the_same_bits_every_time() -> None:
    tensors = {name: x.requires_grad_() for name, x in inputs(70, 16).items()}
    first, second = (
        torch.autograd.grad(triton_attention(**tensors, chunk_size=16, top_k=2).square().sum(), list(tensors.values()))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_scores_neither_overflow_nor_vanish() -> None:
    tensors = inputs(50, 16)
    tensors |= {name: 30 * tensors[name] for name in ("q", "k", "meta_query", "meta_key")}
    out = triton_attention(**tensors, chunk_size=16)
    assert_close("o", out, reference.bsbr_attention(**tensors, chunk_size=16), 1e-4, 0)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take minutes")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_sequences_match_the_torch_backend(head_dim: int) -> None:
    from bsbr import bsbr_attention

    tensors = inputs(8192 + 77, 128, heads=4, kv_heads=2, head_dim=head_dim, dtype=torch.bfloat16)
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    wide = {name: x.detach().float().requires_grad_() for name, x in tensors.items()}
    actual = triton_attention(**tensors, chunk_size=128, chunk_overlap=32)
    expected = bsbr_attention(**wide, chunk_size=128, chunk_overlap=32)
    assert_close("o", actual, expected, 2e-2, 0)
    upstream = torch.randn_like(actual)
    gradients = (torch.autograd.grad(o, list(x.values()), upstream.to(o)) for o, x in ((actual, tensors), (expected, wide)))
    for name, a, b in zip(tensors, *gradients, strict=True):
        assert_close(f"the gradient of {name}", a, b, 2e-2, 0)
