"""Copying: all that was read, or the tokens that are not noise."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evals.training.tasks.base import IGNORED, Batch, Split, Task, distinct, require


@dataclass(frozen=True)
class Copy(Task):
    """x₁ … x_m, a separator, and x₁ … x_m asked one after the other, n = 2m: Jelassi 2024 (arXiv:2402.01032), section 2.

    Tokens x are uniform over `symbols`, the separator is one more. At the separator x₁ is asked, at x₁ then x₂: as in decoding,
    with the right tokens before. accuracy: of those m tokens. chance: 1/symbols.
    Raises ValueError unless seq_len is even and there are 2 symbols.
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
        read = torch.randint(self.symbols, (size, half), generator=generator)
        separator = torch.full((size, 1), self.symbols)
        inputs = torch.cat([read, separator, read[:, :-1]], dim=1)
        targets = torch.cat([torch.full((size, half), IGNORED), read], dim=1)
        return Batch(inputs, targets, torch.zeros_like(inputs))


@dataclass(frozen=True)
class SelectiveCopy(Task):
    """`items` tokens at random places among noise, then a separator, and the items asked in order: Mamba (arXiv:2312.00752), 3.1.

    Items are different tokens of `symbols`; noise is one token more, the separator another. As in `Copy`, an item is asked
    with those before it in sight. accuracy: of the items. chance: 1/symbols.
    Raises ValueError unless 1 ≤ items ≤ symbols, and 2·items ≤ seq_len.
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
        body = self.seq_len - self.items
        items = distinct(size, self.symbols, self.items, generator)
        places = distinct(size, body, self.items, generator).sort(dim=1).values
        noise, separator = torch.full((size, body), self.symbols), torch.full((size, 1), self.symbols + 1)
        inputs = torch.cat([noise.scatter_(1, places, items), separator, items[:, :-1]], dim=1)
        targets = torch.cat([torch.full((size, body), IGNORED), items], dim=1)
        return Batch(inputs, targets, torch.zeros_like(inputs))
