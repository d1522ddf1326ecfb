"""Induction: what followed this token when it stood here before?"""

from dataclasses import dataclass

import torch

from evals.training.tasks.base import IGNORED, Batch, Split, Task, require


@dataclass(frozen=True)
class Induction(Task):
    """Random tokens, among them once a special one; at the end it stands again: what followed it? H3 (arXiv:2212.14052), table 1.

    Tokens are uniform over `symbols`, the special token is one more; its first place is uniform over those that leave
    a token to follow. accuracy: of that token, one an example. chance: 1/symbols.
    Raises ValueError if seq_len is below 3 or there are not 2 symbols.
    """

    symbols: int = 16

    def __post_init__(self) -> None:
        require(self.seq_len >= 3, f"induction needs a seq_len of at least 3, got {self.seq_len}")
        require(self.symbols >= 2, f"symbols must be at least 2, got {self.symbols}")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def batch(self, size: int, generator: torch.Generator, split: Split = "train") -> Batch:
        inputs = torch.randint(self.symbols, (size, self.seq_len), generator=generator)
        place = torch.randint(self.seq_len - 2, (size, 1), generator=generator)
        inputs.scatter_(1, place, self.symbols)
        inputs[:, -1] = self.symbols
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -1:] = inputs.gather(1, place + 1)
        return Batch(inputs, targets, torch.zeros_like(inputs))
