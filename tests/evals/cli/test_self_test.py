"""The slowed attention of the self-tests, and the arguments of `evals.validate`."""

import pytest
import torch

from baselines.standard import StandardAttention
from evals import validate
from evals.benchmark.slowed import slowed

NODE = {"_target_": "baselines.standard.StandardAttention"}


def test_a_slowed_attention_gives_the_same_outputs() -> None:
    torch.manual_seed(0)
    plain = StandardAttention(hidden_dim=32, num_heads=2)
    slower = slowed(1.5, NODE, hidden_dim=32, num_heads=2)
    slower.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9, 32)
    assert torch.equal(slower(x), plain(x))
    mask = torch.ones(2, 9)
    mask[0, 5:] = 0
    assert torch.equal(slower(x, mask), plain(x, mask))


def test_a_factor_of_one_changes_nothing() -> None:
    assert "forward" not in vars(slowed(1.0, NODE, hidden_dim=32, num_heads=2))


def test_an_unknown_self_test_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        validate.main(["nothing"])
    assert stopped.value.code == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
