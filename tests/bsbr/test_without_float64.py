"""Models on a device without float64 compute what they compute on the CPU."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from baselines.delta_net import DeltaNetAttention
from baselines.gated_delta_net import GatedDeltaNetAttention
from baselines.gau import GatedAttentionUnit
from baselines.hopfield import HopfieldAttention
from baselines.linear import LinearAttention
from baselines.sliding_window import SlidingWindowAttention
from baselines.standard import StandardAttention
from bsbr import Attention, BSBRAttention, CausalLM, TransformerModel, precision
from evals.certification.subject import randomize_zero_parameters
from tests.without_float64 import device_without_float64

ATTENTIONS: dict[str, Callable[..., Attention]] = {
    "bsbr": partial(BSBRAttention, chunk_size=4),
    "standard": StandardAttention,
    "linear": partial(LinearAttention, chunk_size=4),
    "sliding_window": partial(SlidingWindowAttention, window_size=5),
    "hopfield": HopfieldAttention,
    "delta_net": partial(DeltaNetAttention, chunk_size=4),
    "gated_delta_net": partial(GatedDeltaNetAttention, chunk_size=4),
    "gau": partial(GatedAttentionUnit, chunk_size=4, key_dim=8),
}


def moved(model: CausalLM, device: torch.device) -> CausalLM:
    """A copy on the device; `Module.to` makes parameters in a way that the imitation does not know."""
    copy = deepcopy(model)
    for module in copy.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(device))
    return copy


def test_apples_gpus_are_known_to_have_no_float64() -> None:
    assert precision.device_for_float64(torch.device("mps", 0)) == torch.device("cpu")
    assert precision.device_for_float64(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_the_imitated_device_refuses_what_the_real_one_refuses() -> None:
    with device_without_float64() as device:
        x = torch.ones(2, device=device)
        for refused in (x.double, lambda: torch.arange(2, device=device, dtype=torch.float64), lambda: x.to(torch.float64)):
            with pytest.raises(TypeError, match="doesn't support float64"):
                refused()
        with pytest.raises(RuntimeError, match="at least two devices"):
            _ = x + torch.ones(2)


@pytest.mark.parametrize(("name", "rotary"), [*((name, name == "gated_delta_net") for name in ATTENTIONS), ("bsbr", True)])
def test_a_model_runs_where_there_is_no_float64(name: str, rotary: bool) -> None:
    torch.manual_seed(0)
    build = partial(ATTENTIONS[name], rotary=True) if rotary else ATTENTIONS[name]
    lm = randomize_zero_parameters(CausalLM(TransformerModel(11, 16, 2, 2, 32, attention=build, positions=not rotary))).eval()
    ids = torch.randint(11, (2, 13))
    expected, loss = lm(ids).detach(), lm.loss(ids)
    gradients = dict(zip(dict(lm.named_parameters()), torch.autograd.grad(loss, list(lm.parameters())), strict=True))
    with device_without_float64() as device:
        there, ids_there = moved(lm, device), ids.to(device)
        torch.testing.assert_close(there(ids_there).detach().cpu(), expected, rtol=0, atol=1e-5)
        there.loss(ids_there).backward()
        for key, parameter in there.named_parameters():
            torch.testing.assert_close(parameter.grad.cpu(), gradients[key], rtol=0, atol=1e-5)
        state, streamed = None, []
        with torch.no_grad():
            for piece in ids_there.split([9, 1, 1, 1, 1], dim=1):
                logits, state = there.extend(piece, state)
                streamed.append(logits)
        torch.testing.assert_close(torch.cat(streamed, dim=1).cpu(), expected, rtol=0, atol=1e-5)
        assert there.generate(ids_there, 2, temperature=0.5).shape == (2, 2)
