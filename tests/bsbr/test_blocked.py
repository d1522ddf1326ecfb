"""`bsbr.blocked` where it cuts: rooms, stretches and strips far smaller than those that ship, against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bsbr import BSBRAttention, attention, blocked, bsbr_attention, dispatch, reference

CHUNK = 6
OPTIONS: list[dict[str, int]] = [{}, {"chunk_overlap": 2}, {"chunk_overlap": 2 * CHUNK + 1}, {"top_k": 2, "chunk_overlap": CHUNK}]


@pytest.fixture(params=[(1, 1, 1), (2 * CHUNK, 2, 4), (13 * CHUNK, 3, 2), (10**6, 10**6, 10**6)], ids=str)
def cuts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in zip(("ROOM", "STRETCH", "STRIP"), request.param, strict=True):
        monkeypatch.setattr(blocked, name, size)


def inputs(time: int, *, features: bool, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """4 heads that share 2 keys, 2 items, head_dim 6, d_r 3; heads are views of joined ones, as projections give them."""
    generator = torch.Generator().manual_seed(time)

    def heads(number: int, length: int, dim: int) -> Tensor:
        return torch.randn(2, length, number, dim, generator=generator, dtype=dtype).transpose(1, 2)

    chunks = -(-time // CHUNK)
    tensors = {"q": heads(4, time, 6), "k": heads(2, time, 6), "v": heads(2, time, 6)}
    tensors |= {"r": heads(4, chunks, 6), "h": heads(2, chunks - 1, 6), "gain": torch.tensor([1.0, -0.5, 2.0, 0.1], dtype=dtype)}
    return tensors | ({"q_features": heads(4, time, 3), "k_features": heads(2, time, 3)} if features else {})


@pytest.mark.usefixtures("cuts")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("time", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 2])
def test_values_and_gradients_are_those_of_the_reference(time: int, features: bool, options: dict[str, int]) -> None:
    tensors = inputs(time, features=features)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    truth = reference.bsbr_attention(**leaves, chunk_size=CHUNK, **options)
    out = bsbr_attention(**leaves, chunk_size=CHUNK, impl="blocked", **options)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(
            bsbr_attention(**tensors, chunk_size=CHUNK, impl="blocked", **options), truth, rtol=0, atol=1e-10
        )
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
    mine, theirs = (
        torch.autograd.grad((x * upstream).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        for x in (out, truth)
    )
    for name, a, b in zip(leaves, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda words, name=name: f"{name}: {words}")


@pytest.mark.parametrize("options", [{}, {"retrieval_top_k": 3}, {"chunk_overlap": CHUNK + 1, "compression_factor": 2}], ids=str)
def test_a_long_sequence_without_gradients_goes_in_segments_and_comes_out_the_same(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(attention, "PAGE", 3)
    torch.manual_seed(0)
    module = BSBRAttention(16, 4, chunk_size=CHUNK, num_kv_heads=2, **options).double()
    x = torch.randn(2, 11 * CHUNK + 2, 16, dtype=torch.float64)
    whole = module(x)  # with gradients, in one piece
    with torch.no_grad():
        torch.testing.assert_close(module(x), whole, rtol=0, atol=1e-10)
        _, state = module.extend(x)
    assert [state[f"states.{page}"].shape[2] for page in range(4)] == [3, 3, 3, 2]


def test_a_future_that_overflows_does_not_reach_the_past() -> None:
    tensors = inputs(CHUNK, features=False, dtype=torch.float32)
    before = bsbr_attention(**tensors, chunk_size=CHUNK, impl="blocked")
    tensors["k"] = tensors["k"].clone()
    tensors["k"][:, :, -1, 0] = 3e38  # times a query, beyond what float32 holds
    after = bsbr_attention(**tensors, chunk_size=CHUNK, impl="blocked")
    assert torch.equal(before[:, :, :-1], after[:, :, :-1])


def test_the_choice_of_implementation() -> None:
    tensors = inputs(CHUNK + 1, features=False, dtype=torch.float32)
    order = [tensors[name] for name in ("q", "k", "v", "r", "h")]
    assert dispatch.choose("auto", *order) == "blocked"
    assert dispatch.choose("torch", *order) == "torch"
    assert dispatch.choose("auto", *order[:3], order[3][:, :, :1], *order[4:]) == "torch"  # a single chunk
    assert dispatch.choose("auto", *order, dropout_p=0.1) == "torch"
    assert dispatch.choose("auto", *(x.bfloat16() for x in order)) == "torch"
    with pytest.raises(NotImplementedError, match=r"impl='blocked' was asked for: blocks have no dropout; impl='torch' takes"):
        dispatch.choose("blocked", *order, dropout_p=0.1)
    with pytest.raises(NotImplementedError, match=r"impl='triton' was asked for: the kernels "):
        dispatch.choose("triton", *order)
    with pytest.raises(ValueError, match=r"^impl must be one of auto, torch, blocked, triton, got 'cuda'$"):
        BSBRAttention(16, 4, impl="cuda")  # type: ignore[arg-type]
