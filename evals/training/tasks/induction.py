"""Induction: recall the token that followed a special token the first time."""

from dataclasses import dataclass

import torch

from evals.training.tasks.base import IGNORED, Batch, Split, Task, require


@dataclass(frozen=True)
class Induction(Task):
    """Random tokens with a special token once among them and once at the end. H3 (arXiv:2212.14052), table 1.

    With seq_len=8 and symbols=6 the special token is 6:

        Inputs   2 0 6 3 3 1 5 6
        Targets  - - - - - - - 3       (-: IGNORED)

    Tokens are uniform, and so is the first position of the special token. chance is 1/symbols.

    Attributes:
        symbols: number of different tokens, without the special one.

    Raises:
        ValueError: if seq_len is below 3 or symbols below 2.
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
        special = torch.randint(self.seq_len - 2, (size, 1), generator=generator)  # a token follows it before the end
        inputs.scatter_(1, special, self.symbols)
        inputs[:, -1] = self.symbols
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -1:] = inputs.gather(1, special + 1)
        return Batch(inputs, targets, torch.zeros_like(inputs))
