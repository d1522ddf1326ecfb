"""Under autocast, and with an empty batch: every attention, and functions that are called with hard inputs."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from baselines.delta_net import DeltaNetAttention
from baselines.gated_delta_net import GatedDeltaNetAttention
from baselines.gau import GatedAttentionUnit
from baselines.hopfield import HopfieldAttention
from baselines.linear import LinearAttention, linear_attention, linear_attention_reference
from baselines.sliding_window import SlidingWindowAttention
from baselines.sparse import SparseAttention
from baselines.standard import StandardAttention
from bsbr import BSBRAttention
from bsbr.interface import Attention

CHUNK = 16
MAKE: dict[str, Callable[..., Attention]] = {
    "bsbr": partial(BSBRAttention, chunk_size=CHUNK),
    "bsbr, sums": partial(BSBRAttention, chunk_size=CHUNK, chunk_states="sum", retrieval_norm=False),
    "standard": StandardAttention,
    "hopfield": HopfieldAttention,
    "sliding_window": partial(SlidingWindowAttention, window_size=CHUNK),
    "sparse": partial(SparseAttention, block_size=CHUNK, summary_size=4),
    "linear": partial(LinearAttention, chunk_size=CHUNK),
    "delta_net": partial(DeltaNetAttention, chunk_size=CHUNK),
    "gated_delta_net": partial(GatedDeltaNetAttention, chunk_size=CHUNK),
    "gau": partial(GatedAttentionUnit, chunk_size=CHUNK),
}
ATTENTIONS = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ATTENTIONS
def test_autocast_does_not_undo_a_cast_up(make: Callable[..., Attention], dtype: torch.dtype) -> None:
    """The projections are in half precision, and what `attend` makes of them is as exact as its output's dtype."""
    torch.manual_seed(0)
    attention = make(hidden_dim=64, num_heads=2)
    x = torch.randn(1, 20 * CHUNK + 3, 64) + torch.linspace(0, 3, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        tensors = attention.project(x)
        out = attention.attend(*tensors)
        streamed, state = [], None
        for part in x.split(7 * CHUNK, dim=1):
            attended, state = attention.extend(part, state)
            streamed.append(attended)
        whole = attention(x)
    assert attention.reference is not None
    expected = attention.reference(*tensors)
    # An output that is rounded once is off by eps / 5 on average, and one that is merged of rounded parts by a little more.
    error = torch.linalg.vector_norm(out.double() - expected) / torch.linalg.vector_norm(expected)
    assert error <= 0.4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        torch.cat(streamed, dim=1), whole, rtol=0, atol=8 * torch.finfo(dtype).eps * whole.abs().max().item()
    )


@pytest.mark.parametrize("length", [1, CHUNK, 3 * CHUNK + 5])
@ATTENTIONS
def test_an_empty_batch_has_an_empty_output(make: Callable[..., Attention], length: int) -> None:
    attention = make(hidden_dim=16, num_heads=2)
    x = torch.zeros(0, length, 16, requires_grad=True)
    out = attention(x)
    out.sum().backward()
    assert out.shape == x.shape
    assert x.grad is not None
    state = None
    for part in (x, x[:, :1], x):
        extended, state = attention.extend(part.detach(), state)
        assert extended.shape == part.shape


def test_features_of_a_very_negative_key_keep_their_digits() -> None:
    """φ(−20) is e^−20, and elu(−20) + 1 is 0 in float32."""
    q = torch.zeros(1, 1, 2, 1)
    k = torch.tensor([-20.0, -21.0]).view(1, 1, 2, 1)
    v = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
    share = 1 / (1 + torch.e)  # of the second key, whose features are e times smaller
    for function in (linear_attention, linear_attention_reference):
        out: Tensor = function(q, k, v)
        torch.testing.assert_close(out[0, 0, 1, 0].item(), 1 + 2 * share, rtol=1e-6, atol=0)
