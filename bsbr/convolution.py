"""A short causal convolution along time, which a layer can have before its attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsbr.interface import check_hidden_states, require_positive


class ShortConvolution(nn.Module):
    """y_t = x_t + Σ_{i<w} w_i ⊙ x_{t−i}, each channel by itself, with x = 0 before the sequence (arXiv:2302.10866, section 3).

    It lets a token see its neighbours before attention compares it with others. Recall needs that: a value is found by the
    token before it, its key.

    Args:
        hidden_dim: number of channels.
        size: w, the number of taps; their weights begin small and random, so that y ≈ x.
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
        """Outputs of tokens that follow others.

        Args:
            hidden_states: of the new tokens [batch, new, hidden_dim].
            before: the last w − 1 inputs [batch, w − 1, hidden_dim], as an earlier call returned them; None for the first call.

        Returns:
            [batch, new, hidden_dim], and the last w − 1 inputs.
        """
        batch, _, hidden_dim = hidden_states.shape
        if before is None:
            before = hidden_states.new_zeros(batch, self.size - 1, hidden_dim)
        seen = torch.cat([before, hidden_states], dim=1)
        mixed = F.conv1d(seen.mT, self.weight, groups=hidden_dim).mT
        # A clone: a view would keep the whole sequence alive.
        return hidden_states + mixed, seen[:, seen.shape[1] - self.size + 1 :].clone()
