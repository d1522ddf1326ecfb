"""`check_attention` fails as the certificate does, in sentences."""

import re

import pytest
from torch import Tensor

from baselines.standard import StandardAttention
from evals.testing import check_attention
from tests.evals import wrong_attentions as wrong


def test_a_right_attention_of_a_test_passes() -> None:
    class Mine(StandardAttention):
        def __init__(self, hidden_dim: int, num_heads: int, sign: float = 1.0):
            super().__init__(hidden_dim, num_heads)
            self.sign = sign

        def attend(self, *tensors: Tensor) -> Tensor:
            return self.sign * super().attend(*tensors)

    assert re.fullmatch(r"certified: \d+ checks, \d+ configurations", check_attention(Mine, hidden_dim=16, num_heads=2, sign=1.0))


def test_a_wrong_attention_fails_with_a_sentence_for_each_failed_check() -> None:
    with pytest.raises(AssertionError) as caught:
        check_attention(wrong.TriuForTril, hidden_dim=16, num_heads=2)
    first, *lines = str(caught.value).splitlines()
    assert first == "TriuForTril is not certified:"
    assert {line.strip().partition(":")[0] for line in lines} == {"causality", "padding", "streaming", "parity"}
    assert any("changing the inputs after 0 changes output 0 " in line for line in lines)
