"""Tests the library's decoders as candidates: checks of the certificate, and a conversion against its original."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from evals.certification.cost_checks import flops, state_size
from evals.certification.parity_check import parity
from evals.certification.streaming_check import streaming
from evals.certification.subject import Subject
from evals.conversion.decoders import ConvertedDecoder, PretrainedDecoder

B = 6
SIZES = {"hidden_dim": 16, "num_heads": 4, "max_length": 1100}


def decoder(model_type: str, converted: bool, **options: int) -> Callable[[], PretrainedDecoder]:
    grouped = {} if model_type == "gpt2" else {"num_key_value_heads": 2}
    if converted:
        return partial(ConvertedDecoder, model_type=model_type, chunk_size=B, **SIZES, **grouped, **options)
    return partial(PretrainedDecoder, model_type=model_type, **SIZES, **grouped, **options)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("converted", [False, True])
def test_a_decoder_keeps_the_contract(model_type: str, converted: bool) -> None:
    """Runs the certificate's checks of parity, streaming, FLOPs and state; a sweep runs all of them."""
    subject = Subject(decoder(model_type, converted))
    for check in (streaming, parity, flops, state_size):
        with torch.set_grad_enabled(check is parity):
            assert check(subject) is None


def test_a_conversion_equals_its_original_up_to_one_chunk_only() -> None:
    subjects = [Subject(decoder("llama", converted)) for converted in (False, True)]  # built from the same seed
    for time, same in ((1, True), (B, True), (B + 1, False)):
        with torch.no_grad():
            original, converted = (one.attention(one.inputs(time)) for one in subjects)
        assert ((converted - original).abs().max() < 1e-10) == same


def test_the_state_of_a_conversion_grows_slower_than_the_original_s() -> None:
    original, converted = (decoder("llama", one)() for one in (False, True))
    ratios = [converted.state_bytes(time) / original.state_bytes(time) for time in (B, 4 * B, 20 * B)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 0.7


def test_a_sequence_longer_than_the_positions_raises() -> None:
    with pytest.raises(NotImplementedError, match="max_length=1100, got 1101 tokens"):
        decoder("gpt2", False)()(torch.zeros(1, 1101, 16))
