"""Tests of the short convolution: by hand, causality, streaming, and inside the decoder."""

import pytest
import torch
from torch import Tensor

from bsbr import BSBRModel, TransformerModel
from bsbr.convolution import ShortConvolution
from evals.certification.subject import randomize_zero_parameters


def states(time: int, batch: int = 2, hidden_dim: int = 3) -> Tensor:
    return torch.randn(batch, time, hidden_dim, generator=torch.Generator().manual_seed(time), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 3, 4, 9])
def test_it_matches_its_definition(size: int, time: int) -> None:
    convolution = ShortConvolution(3, size).double()
    x = states(time)
    weight = convolution.weight.detach()[:, 0].flip(1)  # the weight of x_t first
    expected = x.clone()
    for t in range(time):
        for i in range(min(size, t + 1)):
            expected[:, t] += weight[:, i] * x[:, t - i]
    torch.testing.assert_close(convolution(x), expected)


@pytest.mark.parametrize("split", [1, 2, 3, 8])
def test_streaming_matches_the_whole(split: int) -> None:
    convolution = ShortConvolution(3, 4).double()
    x = states(9)
    first, before = convolution.extend(x[:, :split], None)
    second, _ = convolution.extend(x[:, split:], before)
    torch.testing.assert_close(torch.cat([first, second], dim=1), convolution(x))
    assert before.shape == (2, 3, 3)


@pytest.mark.parametrize("size", [1, 3])
def test_a_decoder_with_it_is_streamable_causal_and_padding_invariant(size: int) -> None:
    torch.manual_seed(0)
    model = randomize_zero_parameters(BSBRModel(30, 16, 2, 2, 5, 24, conv_size=size)).double().eval()
    plain = BSBRModel(30, 16, 2, 2, 5, 24).double().eval()
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters()) == 2 * 16 * size
    ids = torch.randint(30, (2, 17), generator=torch.Generator().manual_seed(1))
    whole = model(ids)
    changed = ids.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 30
    torch.testing.assert_close(model(changed)[:, :11], whole[:, :11], rtol=0, atol=1e-12)
    state, parts = None, []
    for piece in ids.split([1, 6, 2, 8], dim=1):
        output, state = model.extend(piece, state)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    padded = torch.cat([torch.full((2, 3), 7), ids, torch.full((2, 2), 7)], dim=1)
    mask = torch.zeros(2, 22).index_fill(1, torch.arange(3, 20), 1)
    torch.testing.assert_close(model(padded, mask)[:, 3:20], whole, rtol=0, atol=1e-12)


def test_a_bad_size_raises() -> None:
    with pytest.raises(ValueError, match="size must be a positive integer, got 0"):
        TransformerModel(10, 8, 1, 2, 8, attention=lambda **_: None, conv_size=0)  # type: ignore[arg-type, return-value]
