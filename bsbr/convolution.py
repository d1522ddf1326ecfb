"""Short causal convolution along time, an optional part of a decoder layer before its attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsbr.interface import check_hidden_states, require_positive


class ShortConvolution(nn.Module):
    """y_t = x_t + Σ_{i < size} w_i ⊙ x_{t−i}, per channel, with x = 0 before the sequence (arXiv:2302.10866, section 3).

    It mixes a token with the tokens just before it. Associative recall needs this: the key of a value is the token before it.

    Args:
        hidden_dim: number of channels.
        size: number of taps; their weights w_i [hidden_dim] begin uniform in ±1/√size.

    Raises:
        ValueError: if size is not a positive integer.
    """

    def __init__(self, hidden_dim: int, size: int) -> None:
        super().__init__()
        require_positive(size=size)
        self.size = size
        self.weight = nn.Parameter(torch.empty(hidden_dim, 1, size))
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, time, hidden_dim] -> the same shape."""
        check_hidden_states(hidden_states, self.weight.shape[0])
        return self.extend(hidden_states, None)[0]

    def extend(self, hidden_states: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Computes the outputs of tokens that follow earlier ones.

        Args:
            hidden_states: new tokens, [batch, new, hidden_dim].
            before: the last size − 1 inputs [batch, size − 1, hidden_dim] that an earlier call returned; None for the first call.

        Returns:
            [batch, new, hidden_dim], and the last size − 1 inputs.
        """
        batch, _, hidden_dim = hidden_states.shape
        if before is None:
            before = hidden_states.new_zeros(batch, self.size - 1, hidden_dim)
        seen = torch.cat([before, hidden_states], dim=1)
        mixed = F.conv1d(seen.mT, self.weight, groups=hidden_dim).mT
        # A clone: a view would keep the whole sequence in memory.
        return hidden_states + mixed, seen[:, seen.shape[1] - self.size + 1 :].clone()
