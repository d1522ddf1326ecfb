"""Copying: repeat all tokens that were read, or those that are not noise."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evals.training.tasks.base import IGNORED, Batch, Split, Task, distinct, require


@dataclass(frozen=True)
class Copy(Task):
    """Random tokens, a separator, and the same tokens again. Jelassi 2024 (arXiv:2402.01032), section 2.

    With seq_len=8 and symbols=9 the separator is 9:

        Inputs   4 1 7 7 9 4 1 7
        Targets  - - - - 4 1 7 7       (-: IGNORED)

    As in decoding with teacher forcing, the correct tokens precede every target. Tokens are uniform. chance is 1/symbols.

    Attributes:
        symbols: number of different tokens to copy.

    Raises:
        ValueError: unless seq_len is even and symbols is at least 2.
    """

    symbols: int = 64

    def __post_init__(self) -> None:
        require(self.seq_len % 2 == 0, f"copy needs an even seq_len, half to read and half to repeat, got {self.seq_len}")
        require(self.symbols >= 2, f"symbols must be at least 2, got {self.symbols}")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def batch(self, size: int, generator: torch.Generator, split: Split = "train") -> Batch:
        half = self.seq_len // 2
        tokens = torch.randint(self.symbols, (size, half), generator=generator)
        separator = torch.full((size, 1), self.symbols)
        inputs = torch.cat([tokens, separator, tokens[:, :-1]], dim=1)
        targets = torch.cat([torch.full((size, half), IGNORED), tokens], dim=1)
        return Batch(inputs, targets, torch.zeros_like(inputs))


@dataclass(frozen=True)
class SelectiveCopy(Task):
    """Items at random positions among noise, a separator, and the items in order. Mamba (arXiv:2312.00752), section 3.1.

    With seq_len=9, items=3 and symbols=8 the noise is 8 and the separator 9:

        Inputs   8 5 8 8 2 7 9 5 2
        Targets  - - - - - - 5 2 7       (-: IGNORED)

    The items of an example are distinct. chance is 1/symbols.

    Attributes:
        items: tokens to copy.
        symbols: number of different tokens to copy.

    Raises:
        ValueError: unless 1 ≤ items ≤ symbols and 2·items ≤ seq_len.
    """

    items: int = 16
    symbols: int = 64

    proportional: ClassVar[tuple[str, ...]] = ("items",)

    def __post_init__(self) -> None:
        require(1 <= self.items <= self.symbols, f"items must be from 1 to symbols = {self.symbols}, got {self.items}")
        require(2 * self.items <= self.seq_len, f"items must be at most seq_len / 2 = {self.seq_len // 2}, got {self.items}")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def batch(self, size: int, generator: torch.Generator, split: Split = "train") -> Batch:
        length = self.seq_len - self.items  # of what is read
        items = distinct(size, self.symbols, self.items, generator)
        positions = distinct(size, length, self.items, generator).sort(dim=1).values
        noise, separator = torch.full((size, length), self.symbols), torch.full((size, 1), self.symbols + 1)
        inputs = torch.cat([noise.scatter_(1, positions, items), separator, items[:, :-1]], dim=1)
        targets = torch.cat([torch.full((size, length), IGNORED), items], dim=1)
        return Batch(inputs, targets, torch.zeros_like(inputs))
