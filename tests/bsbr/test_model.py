"""Tests of the decoder: layers, any length, positions, padding, dropout, checkpointing, precision and bad input."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from baselines.standard import StandardAttention
from bsbr import BSBRLayer, BSBRModel, TransformerLayer, TransformerModel
from bsbr.model import sinusoids
from evals.certification.subject import randomize_zero_parameters

VOCAB, CHUNK = 30, 5


def small(**options: Any) -> BSBRModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_dim": 16, "num_layers": 2, "num_heads": 4, "chunk_size": CHUNK, "ff_dim": 24}
    return randomize_zero_parameters(BSBRModel(**sizes | options))


def tokens(time: int, batch: int = 2, vocab_size: int = VOCAB) -> Tensor:
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(time))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


# --- use ------------------------------------------------------------------------------------------


def test_the_example_works_at_any_length_and_in_bfloat16() -> None:
    model = BSBRModel(
        vocab_size=10000, hidden_dim=512, num_layers=4, num_heads=8, chunk_size=128, ff_dim=2048, dropout=0.1, compression_factor=4
    )
    outputs = model(torch.randint(0, 10000, (2, 256)), torch.ones(2, 256))
    assert outputs.shape == (2, 256, 512)
    assert outputs.isfinite().all()
    assert model.layers[0].attention.feature_dim == 512 // 8 // 4

    model.eval()
    with torch.no_grad():
        whole = model(tokens(1000, 1, 10000))
        for length in (1, 3, 255, 257):
            part = model(tokens(1000, 1, 10000)[:, :length])
            assert part.shape == (1, length, 512)
            torch.testing.assert_close(part, whole[:, :length], rtol=0, atol=1e-4)
        narrow = model.to(torch.bfloat16)(tokens(1000, 1, 10000))
    assert narrow.dtype == torch.bfloat16
    # Four layers, where one attention alone may be off by 2e-2.
    assert (narrow.float() - whole).norm() < 4 * 2e-2 * whole.norm()


def test_bfloat16_trains() -> None:
    model = small(chunk_overlap=2, retrieval_top_k=1).to(torch.bfloat16)
    model(tokens(23)).float().square().mean().backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_there_is_no_longest_sequence() -> None:
    model = small().eval()
    with torch.no_grad():
        long = model(tokens(5000, 1))
        assert long.isfinite().all()
        torch.testing.assert_close(long[:, :37], model(tokens(5000, 1)[:, :37]), rtol=0, atol=1e-4)
    assert not any(5000 in buffer.shape for buffer in model.buffers())


# --- values ---------------------------------------------------------------------------------------


def test_a_layer_is_two_pre_norm_residual_branches() -> None:
    torch.manual_seed(0)
    layer = BSBRLayer(16, 4, CHUNK, 24, compression_factor=2, chunk_overlap=1, retrieval_top_k=2, num_kv_heads=2, rotary=True)
    assert (layer.attention.chunk_size, layer.attention.chunk_overlap, layer.attention.retrieval_top_k) == (CHUNK, 1, 2)
    assert (layer.attention.feature_dim, layer.attention.num_kv_heads, layer.attention.rotary) == (2, 2, True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def norm(x: Tensor, weights: nn.LayerNorm) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weights.weight + weights.bias

    x = torch.randn(2, 17, 16)
    up, down = layer.feed_forward[0], layer.feed_forward[2]
    middle = x + layer.attention(norm(x, layer.attention_norm))
    inner = norm(middle, layer.feed_forward_norm) @ up.weight.T + up.bias
    gelu = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    torch.testing.assert_close(layer(x), middle + gelu @ down.weight.T + down.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("hidden_dim", "start"), [(1, 0), (6, 0), (7, 3), (8, 100_000)])
def test_positions_are_sines_and_cosines_of_falling_frequency(hidden_dim: int, start: int) -> None:
    pairs = (hidden_dim + 1) // 2
    angles = np.arange(start, start + 9)[:, None] * 10_000.0 ** (-2 * np.arange(pairs) / hidden_dim)[None, :]
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :hidden_dim]
    found = sinusoids(torch.zeros(2, 9, hidden_dim, dtype=torch.float64), start)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-10)


def test_the_model_is_its_embedding_positions_layers_and_norm() -> None:
    model, ids = small().eval(), tokens(13)
    with torch.no_grad():
        expected = model.embedding.weight[ids] * 16**0.5 + sinusoids(torch.zeros(1, 13, 16))
        for layer in model.layers:
            expected = layer(expected)
        torch.testing.assert_close(model(ids), model.final_norm(expected))


def test_without_positions_only_chunks_distinguish_positions() -> None:
    # The same token repeated: inside the first chunk all outputs are equal without positions, and none with them.
    same = torch.full((1, CHUNK), 3)
    with torch.no_grad():
        without, with_positions = small(positions=False)(same), small()(same)
    torch.testing.assert_close(without, without[:, :1].expand_as(without), rtol=0, atol=1e-5)
    for t in range(1, CHUNK):
        assert not torch.allclose(with_positions[:, t], with_positions[:, t - 1], atol=1e-2)


# --- padding --------------------------------------------------------------------------------------


def masks(time: int) -> Tensor:
    """Padding on the left, on the right, in holes; one token, no token, all tokens."""
    mask = torch.zeros(6, time)
    mask[0, 4:] = 1
    mask[1, :-3] = 1
    mask[2, ::3] = 1
    mask[3, 7] = 1
    mask[5] = 1
    return mask


@pytest.mark.parametrize("options", [{}, {"rotary": True, "chunk_overlap": 3}, {"use_checkpointing": True}], ids=str)
def test_the_model_is_padding_invariant(options: dict[str, Any]) -> None:
    model, mask = small(**options).double(), masks(17)
    ids = tokens(17, batch=6).masked_fill(mask == 0, -100)  # an invalid token id, which must never be looked up
    out = model(ids, mask)
    for row, real, result in zip(ids, mask != 0, out, strict=True):
        assert (result[~real] == 0).all()
        if real.any():
            torch.testing.assert_close(result[real], model(row[real][None])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_a_layer_is_padding_invariant(garbage: float) -> None:
    torch.manual_seed(0)
    layer, mask = randomize_zero_parameters(BSBRLayer(16, 4, CHUNK, 24, chunk_overlap=1)).double(), masks(17)
    x = torch.randn(6, 17, 16, dtype=torch.float64).masked_fill(mask[..., None] == 0, garbage).requires_grad_()
    out = layer(x, mask)
    for row, real, result in zip(x, mask != 0, out, strict=True):
        assert (result[~real] == 0).all()
        if real.any():
            torch.testing.assert_close(result[real], layer(row[real][None])[0], rtol=0, atol=1e-12)
    out.square().sum().backward()
    assert x.grad is not None
    assert (x.grad[mask == 0] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients(layer).values())


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_is_off_in_eval_and_reaches_weights_and_residuals_in_training() -> None:
    model, ids = small(dropout=0.4), tokens(17)
    assert not torch.equal(model(ids), model(ids))
    assert [layer.attention.dropout for layer in model.layers] == [0.4, 0.4]
    model.eval()
    assert torch.equal(model(ids), model(ids))
    assert torch.equal(model(ids), small()(ids))
    assert BSBRLayer(16, 4, CHUNK, 24, dropout=0.4).attention.dropout == 0.4


@pytest.mark.parametrize("silent", ["attention", "feed_forward"])
def test_residual_dropout_zeroes_or_doubles_each_number_of_a_branch(silent: str) -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(16, 4, 24, attention=StandardAttention, dropout=0.5)
    with torch.no_grad():
        for parameter in (layer.attention.out_proj if silent == "attention" else layer.feed_forward[2]).parameters():
            parameter.zero_()
        x = torch.randn(8, 40, 16, dtype=torch.float64)
        layer.double()
        branch = layer.eval()(x) - x
        ratio = (layer.train()(x) - x) / branch
    assert {round(number, 6) for number in ratio.flatten().tolist()} == {0, 2}
    # 5120 coin tosses: their mean is off by more than 5 standard errors once in a million seeds.
    assert abs(ratio.mean().item() - 1) < 5 / ratio.numel() ** 0.5


# --- checkpointing --------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_checkpointing_changes_no_gradient(masked: bool, dropout: float) -> None:
    mask = masks(17) if masked else None
    results = []
    for use_checkpointing in (False, True):
        model = small(dropout=dropout, chunk_overlap=1, use_checkpointing=use_checkpointing)
        torch.manual_seed(1)
        out = model(tokens(17, batch=6), mask)
        out.square().mean().backward()
        results.append({"out": out.detach()} | gradients(model))
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    def saved_bytes(use_checkpointing: bool) -> int:
        sizes: list[int] = []
        model, ids = small(num_layers=4, use_checkpointing=use_checkpointing), tokens(200)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            model(ids)
        return sum(sizes)

    assert saved_bytes(True) < saved_bytes(False) / 4


def test_checkpointing_without_gradients_is_the_plain_forward() -> None:
    with torch.no_grad():
        assert torch.equal(small(use_checkpointing=True)(tokens(17)), small()(tokens(17)))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"hidden_dim": 0}, "hidden_dim must be a positive integer, got 0"),
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ({"ff_dim": 0}, "ff_dim must be a positive integer, got 0"),
        ({"chunk_size": 0}, "chunk_size must be a positive integer, got 0"),
        ({"num_heads": 3}, "hidden_dim must be a multiple of num_heads, got hidden_dim=16, num_heads=3"),
        ({"compression_factor": 3}, "compression_factor must divide head_dim = 4 (16 / 4), got 3"),
        ({"chunk_overlap": -1}, "chunk_overlap must be an integer of at least 0, got -1"),
        ({"retrieval_top_k": 0}, "retrieval_top_k must be a positive integer, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_options_raise(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared below
        small(**options)
    assert str(caught.value) == sentence


def test_an_unknown_option_raises() -> None:
    with pytest.raises(TypeError, match="chunk_sise"):
        small(chunk_sise=3)


@pytest.mark.parametrize(
    ("ids", "got"),
    [
        (torch.zeros(3, dtype=torch.int64), "torch.int64 [3]"),
        (torch.zeros(2, 0, dtype=torch.int64), "torch.int64 [2, 0]"),
        (torch.zeros(2, 3), "torch.float32 [2, 3]"),
        (torch.zeros(2, 3, 1, dtype=torch.int32), "torch.int32 [2, 3, 1]"),
    ],
)
def test_bad_token_ids_raise(ids: Tensor, got: str) -> None:
    model = small()
    for call in (model, model.extend):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call(ids)
        assert str(caught.value) == f"input_ids must be integers [batch, time >= 1], got {got}"


def test_a_mask_of_another_shape_raises() -> None:
    for call in (partial(small(), tokens(4)), partial(BSBRLayer(16, 4, CHUNK, 24), torch.zeros(2, 4, 16))):
        with pytest.raises(ValueError, match=r"^attention_mask must be \[batch, time\] = \[2, 4\], got \[2, 5\]$"):
            call(torch.ones(2, 5))


def test_a_lambda_or_a_class_builds_the_attention_of_every_layer() -> None:
    built = []

    def build(hidden_dim: int, num_heads: int) -> StandardAttention:
        built.append((hidden_dim, num_heads))
        return StandardAttention(hidden_dim, num_heads)

    model = TransformerModel(VOCAB, 16, 3, 4, 24, attention=build)
    assert built == [(16, 4)] * 3
    assert len({id(layer.attention) for layer in model.layers}) == 3
