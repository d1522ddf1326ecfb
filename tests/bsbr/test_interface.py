"""Tests of what every attention inherits: padding, heads, rotary positions, default streaming and checks."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bsbr import BSBRAttention, BSBRModel, CausalLM
from bsbr.interface import (
    Attention,
    MultiHeadAttention,
    State,
    check_hidden_states,
    merge_heads,
    rotate,
    split_heads,
)
from bsbr.padding import pack
from bsbr.paging import page_lengths, state_pages


class RunningSum(Attention):
    """o_t = Σ_{s ≤ t} x_s + 1: a minimal implementation of the contract, which any padding would change."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__(hidden_dim, num_heads)
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        with torch.no_grad():
            self.out_proj.weight.copy_(torch.eye(hidden_dim))
            self.out_proj.bias.fill_(1)

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        return (hidden_states,)

    def attend(self, *tensors: Tensor) -> Tensor:
        return tensors[0].cumsum(dim=1)

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        before = torch.zeros_like(hidden_states[:, 0]) if state is None else state["sum"]
        sums = before[:, None] + hidden_states.cumsum(dim=1)
        return self.output(sums), {"sum": sums[:, -1]}

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return 0

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        return batch_size * self.hidden_dim * self.dtype.itemsize


class PlainSoftmax(MultiHeadAttention):
    """The shortest `attend` that takes q with fewer rows than k and v, and grouped heads."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for x in (k, v))
        new, time = q.shape[2], k.shape[2]
        future = torch.ones(new, time, dtype=torch.bool).triu(time - new + 1)
        return torch.softmax((q @ k.mT / math.sqrt(self.head_dim)).masked_fill(future, -torch.inf), dim=-1) @ v

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return 0


# --- padding --------------------------------------------------------------------------------------


def test_pack_moves_real_tokens_to_the_front_and_back() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    tokens = torch.tensor([[8, 9, 1, 2, 3], [1, 8, 2, 9, 3], [1, 2, 7, 8, 9], [5, 6, 7, 8, 9]])
    packed, unpack = pack(tokens, mask)
    assert packed.tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 0, 0], [1, 2, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert unpack(10 * packed + 4).tolist() == [[0, 0, 14, 24, 34], [14, 0, 24, 0, 34], [14, 24, 0, 0, 0], [0] * 5]
    # Further dimensions after batch and time are moved along.
    wide, unpack = pack(tokens[..., None, None].expand(4, 5, 2, 3), mask)
    assert torch.equal(wide, packed[..., None, None].expand(4, 5, 2, 3))
    assert unpack(torch.ones(4, 5, 7)).sum().item() == 7 * mask.sum().item()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.bfloat16])
def test_forward_sees_only_real_tokens(dtype: torch.dtype) -> None:
    attention = RunningSum(1, 1)
    x = torch.tensor([[5, 1, torch.nan, 2, torch.inf], [torch.nan] * 5])[..., None]
    mask = torch.tensor([[0, 1, 0, 1, 0], [0] * 5]).to(dtype)
    assert attention(x, mask)[..., 0].tolist() == [[0, 2, 0, 4, 0], [0] * 5]


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        ([[0.0, 0.0, -torch.inf]], "-inf"),
        ([[0.0, 0.0, torch.finfo(torch.float32).min]], "-3.40282e+38"),
        ([[0, 0, torch.iinfo(torch.int64).min]], "-9.22337e+18"),
        ([[0.0, 0.0, 0.0]], "zeros alone"),
        ([[1.0, 0.5, 0.0]], "0.5"),
        ([[1.0, torch.nan, 0.0]], "nan"),
        ([[1, 1, 2]], "2"),
    ],
)
def test_a_mask_of_other_values_raises_wherever_a_mask_is_taken(mask: list[list[float]], got: str) -> None:
    attention_mask, x = torch.tensor(mask), torch.ones(1, 3, 8)
    model = BSBRModel(5, 8, 1, 2, 2, 8)
    ids = torch.ones(1, 3, dtype=torch.int64)
    takers: dict[str, Callable[[Tensor], object]] = {
        "pack": lambda mask: pack(x, mask),
        "attention": lambda mask: RunningSum(8, 1)(x, mask),
        "BSBR": lambda mask: BSBRAttention(8, 2, chunk_size=2)(x, mask),
        "layer": lambda mask: model.layers[0](x, mask),
        "model": lambda mask: model(ids, mask),
        "language model": lambda mask: CausalLM(model)(ids, mask),
        "loss": lambda mask: CausalLM(model).loss(ids, mask),
    }
    for take in takers.values():
        with pytest.raises(ValueError, match=f"attention_mask must be 1 or True .* got {re.escape(got)}; .* == 0"):
            take(attention_mask)
        if got in ("-inf", "zeros alone"):  # the message's advice is right
            take(attention_mask == 0)


def test_masks_are_checked_in_a_compiled_graph_too() -> None:
    attention, x = RunningSum(8, 1), torch.ones(2, 3, 8)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with torch.no_grad():
        compiled = torch.compile(attention, fullgraph=True, backend="eager")
        for given in (mask, mask.bool(), mask.float()):
            torch.testing.assert_close(compiled(x, given), attention(x, mask))
        for wrong in (mask - 1, torch.zeros(2, 3), torch.full((2, 3), torch.nan)):
            with pytest.raises(RuntimeError, match="attention_mask must be 1 or True for a token and 0 or False for padding"):
                compiled(x, wrong)


def test_a_mask_under_vmap_is_boolean() -> None:
    attention, x = RunningSum(8, 1), torch.ones(2, 3, 8)
    mask = torch.tensor([[False, True, True], [True, True, True]])
    each = torch.vmap(lambda x, mask: attention(x[None], mask[None])[0])
    torch.testing.assert_close(each(x, mask), attention(x, mask))
    with pytest.raises(ValueError, match=r"attention_mask must be boolean under torch.vmap, .*, got torch.int64"):
        each(x, mask.long())


def test_a_row_of_padding_alone_is_no_additive_mask() -> None:
    x = torch.ones(2, 3, 1)
    assert RunningSum(1, 1)(x, torch.tensor([[0.0, 1.0, 1.0], [0.0] * 3]))[..., 0].tolist() == [[0, 2, 3], [0] * 3]
    assert RunningSum(1, 1)(x, torch.zeros(2, 3, dtype=torch.int64)).eq(0).all()


def test_padding_has_no_gradient() -> None:
    x = torch.tensor([[torch.nan, 1, torch.inf, 2]])[..., None].requires_grad_()
    attention = RunningSum(1, 1)
    attention(x, torch.tensor([[0, 1, 0, 1]])).sum().backward()
    assert x.grad is not None
    assert x.grad[..., 0].tolist() == [[0, 2, 0, 1]]
    assert attention.out_proj.weight.grad is not None
    assert attention.out_proj.weight.grad.item() == 1 + 3


# --- heads and positions --------------------------------------------------------------------------


def test_heads_are_neighbouring_columns() -> None:
    x = torch.arange(12.0).view(1, 2, 6)
    assert split_heads(x, 2).tolist() == [[[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]]
    assert torch.equal(merge_heads(split_heads(x, 3)), x)


@pytest.mark.parametrize(("time", "start", "head_dim"), [(1, 0, 2), (7, 0, 6), (5, 1_000_003, 8)])
def test_rotation_is_multiplication_by_a_complex_unit(time: int, start: int, head_dim: int) -> None:
    x = torch.randn(2, 3, time, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    half = head_dim // 2
    z = x.numpy()[..., :half] + 1j * x.numpy()[..., half:]
    positions, pairs = np.arange(start, start + time)[:, None], np.arange(half)[None, :]
    z = z * np.exp(1j * positions * 10_000.0 ** (-2 * pairs / head_dim))
    np.testing.assert_allclose(rotate(x, start).numpy(), np.concatenate([z.real, z.imag], axis=-1), rtol=0, atol=1e-9)
    if start == 0:
        assert torch.equal(rotate(x)[:, :, 0], x[:, :, 0])


def test_rotated_products_depend_on_the_distance_alone_even_far_out() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    near = (rotate(q, 5) * rotate(k, 2)).sum()
    far = (rotate(q, 1_000_005) * rotate(k, 1_000_002)).sum()
    torch.testing.assert_close(near, far, rtol=0, atol=1e-5)


# --- the default streaming ------------------------------------------------------------------------


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_the_default_extend_continues_at_any_point(num_kv_heads: int | None, rotary: bool) -> None:
    attention = PlainSoftmax(16, 4, num_kv_heads=num_kv_heads, rotary=rotary).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = attention(x)
    for split in range(1, 9):
        first, state = attention.extend(x[:, :split])
        second, after = attention.extend(x[:, split:], state)
        torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-12)
        for length, current in ((split, state), (9, after)):
            assert attention.state_bytes(length, 2) == sum(tensor.nbytes for key, tensor in current.items() if key != "position")
            assert current["position"].tolist() == length


def test_states_share_the_pages_of_a_cache() -> None:
    assert [page_lengths(time) for time in (1, 255, 256, 257, 1023, 1024, 3000)] == [
        [1], [255], [256], [256, 1], [512, 256, 255], [1024], [1024, 1024, 512, 256, 184],
    ]  # fmt: skip
    attention = PlainSoftmax(8, 2).double()
    x = torch.randn(1, 2100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = attention(x)
        for first, second in ((1, 1), (255, 1), (255, 2), (256, 300), (1023, 1), (1023, 1077), (1290, 1), (2050, 1)):
            _, state = attention.extend(x[:, :first])
            output, after = attention.extend(x[:, first : first + second], state)
            torch.testing.assert_close(output, whole[:, first : first + second], rtol=0, atol=1e-12)
            for name in ("keys", "values"):
                pages = state_pages(after, name)
                assert [page.shape[2] for page in pages] == page_lengths(first + second)
                assert all(page.is_contiguous() and page.untyped_storage().nbytes() == page.nbytes for page in pages)
                # Unchanged pages are the same tensors: a token copies no more than a page or two.
                shared = sum(page is before for page, before in zip(pages, state_pages(state, name), strict=False))
                assert shared == next(
                    (i for i, (a, b) in enumerate(zip(page_lengths(first), page_lengths(first + second), strict=False)) if a != b),
                    min(len(page_lengths(first)), len(page_lengths(first + second))),
                )


def test_rotation_changes_the_output() -> None:
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    attention = PlainSoftmax(8, 2)
    plain = attention(x)
    attention.rotary = True
    assert torch.equal(attention(x)[:, 0], plain[:, 0])
    assert not torch.allclose(attention(x)[:, 1:], plain[:, 1:])


def test_dropout_acts_in_training_only() -> None:
    attention = PlainSoftmax(8, 2, dropout=0.25)
    assert attention.dropout_p == 0.25
    assert attention.eval().dropout_p == 0


def test_dtype_is_that_of_the_parameters() -> None:
    assert PlainSoftmax(8, 2).to(torch.bfloat16).dtype == torch.bfloat16
    assert PlainSoftmax(8, 2).block_length == 64


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hidden_dim": 0}, "hidden_dim must be a positive integer, got 0"),
        ({"hidden_dim": True}, "hidden_dim must be a positive integer, got True"),
        ({"num_heads": -2}, "num_heads must be a positive integer, got -2"),
        ({"num_heads": 3}, "hidden_dim must be a multiple of num_heads, got hidden_dim=16, num_heads=3"),
        ({"num_kv_heads": 0}, "num_kv_heads must be a positive integer, got 0"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got num_heads=4, num_kv_heads=3"),
        ({"num_kv_heads": 8}, "num_heads must be a multiple of num_kv_heads, got num_heads=4, num_kv_heads=8"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
        ({"dropout": float("nan")}, "dropout must be at least 0 and below 1, got nan"),
        ({"hidden_dim": 12, "rotary": True}, "rotary=True needs an even head_dim, got 3 = 12 / 4"),
    ],
)
def test_bad_options_raise(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared below
        PlainSoftmax(**{"hidden_dim": 16, "num_heads": 4} | options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("shape", [(3, 16), (2, 0, 16), (2, 3, 15), (2, 3, 16, 1)])
def test_hidden_states_of_another_shape_raise(shape: tuple[int, ...]) -> None:
    attention = PlainSoftmax(16, 4)
    sentence = f"hidden_states must be [batch, time >= 1, hidden_dim = 16], got {list(shape)}"
    for call in (attention, attention.extend, lambda x: check_hidden_states(x, 16)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call(torch.zeros(shape))
        assert str(caught.value) == sentence


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (3,), (2, 3, 1)])
def test_a_mask_of_another_shape_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        PlainSoftmax(16, 4)(torch.zeros(2, 3, 16), torch.ones(shape))
    assert str(caught.value) == f"attention_mask must be [batch, time] = [2, 3], got {list(shape)}"
