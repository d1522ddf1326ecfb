"""A needle in a haystack: one key and its value somewhere in filler, asked for at the end."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evals.training.tasks.base import IGNORED, Batch, Split, Task, distinct, require


@dataclass(frozen=True)
class Needle(Task):
    """Filler, in it pairs of a key and a value, and at the end one of the keys again: what is its value?

    After Kamradt 2023 ("Needle in a haystack", github.com/gkamradt/LLMTest_NeedleInAHaystack), with tokens for sentences.
    The pair that is asked for begins at depth·(n − 3), rounded to even: depth 0 is the beginning, 1 right before the question.
    `num_pairs` − 1 others, which keep a model from returning the only value that it saw, are anywhere else. Keys, values and
    filler are of vocabularies of their own, `symbols` each; keys of an example are different.

    depths: how many depths there are, from 0 to 1, evenly; each example's is drawn among them. accuracy: of the value, one an
    example. chance: 1/num_pairs, a value of this example.
    Raises ValueError if there is no room for the pairs, too few symbols, or fewer than 2 depths.
    """

    num_pairs: int = 4
    symbols: int = 64
    depths: int = 11

    grouped_by: ClassVar[str | None] = "depth"

    def __post_init__(self) -> None:
        require(1 <= self.num_pairs <= self.symbols, f"num_pairs must be from 1 to symbols = {self.symbols}, got {self.num_pairs}")
        require(
            2 * self.num_pairs < self.seq_len,
            f"needle needs a seq_len of at least {2 * self.num_pairs + 1} for {self.num_pairs} pairs and the question, "
            f"got {self.seq_len}",
        )
        require(self.depths >= 2, f"depths must be at least 2, the beginning and the end, got {self.depths}")

    @property
    def vocab_size(self) -> int:
        return 3 * self.symbols

    @property
    def chance(self) -> float:
        return 1 / self.num_pairs

    @property
    def groups(self) -> tuple[float, ...]:
        return tuple(index / (self.depths - 1) for index in range(self.depths))

    def batch(self, size: int, generator: torch.Generator, split: Split = "train") -> Batch:
        slots = (self.seq_len - 1) // 2  # of two tokens
        depth = torch.randint(self.depths, (size, 1), generator=generator)
        asked = (depth.double() / (self.depths - 1) * (slots - 1)).round().long()
        others = distinct(size, slots - 1, self.num_pairs - 1, generator)
        begins = 2 * torch.cat([asked, others + (others >= asked)], dim=1)  # all but the one that is taken
        keys = distinct(size, self.symbols, self.num_pairs, generator)
        values = self.symbols + torch.randint(self.symbols, keys.shape, generator=generator)
        inputs = 2 * self.symbols + torch.randint(self.symbols, (size, self.seq_len), generator=generator)
        inputs.scatter_(1, begins, keys).scatter_(1, begins + 1, values)
        inputs[:, -1] = keys[:, 0]
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -1] = values[:, 0]
        return Batch(inputs, targets, depth.expand_as(inputs))
