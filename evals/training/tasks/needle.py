"""A needle in a haystack: one key and its value somewhere in filler, recalled at the end."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evals.training.tasks.base import IGNORED, Batch, Split, Task, distinct, require


@dataclass(frozen=True)
class Needle(Task):
    """Pairs of a key and a value within filler, and at the end one of the keys again; the target there is its value.

    After Kamradt 2023 ("Needle in a haystack", github.com/gkamradt/LLMTest_NeedleInAHaystack), with tokens for sentences.
    With seq_len=9, num_pairs=2, symbols=10 and depths=4, keys are 0 … 9, values 10 … 19, filler 20 … 29:

        Inputs   27 22  4 13  8 16 25 20  4       (the needle is 4 13, at depth 1/3)
        Targets   -  -  -  -  -  -  -  - 13       (-: IGNORED)

    The needle begins at depth·(seq_len − 3), rounded to an even position: depth 0 is the beginning, depth 1 the end, right before
    the query. The other pairs stand anywhere else, so that a model cannot return the only value it has seen. The keys of an
    example are distinct. Targets are grouped by depth, which is drawn uniformly. chance is 1/num_pairs, a value of the example.

    Attributes:
        num_pairs: pairs of an example, the needle among them.
        symbols: number of keys, of values, and of filler tokens.
        depths: number of depths, evenly from 0 to 1.

    Raises:
        ValueError: if seq_len is too short for the pairs, symbols below num_pairs, or depths below 2.
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
        slots = (self.seq_len - 1) // 2  # for a pair each
        depth = torch.randint(self.depths, (size, 1), generator=generator)
        needle = (depth.double() / (self.depths - 1) * (slots - 1)).round().long()
        others = distinct(size, slots - 1, self.num_pairs - 1, generator)
        others += (others >= needle).long()  # skips the needle's slot
        positions = 2 * torch.cat([needle, others], dim=1)
        keys = distinct(size, self.symbols, self.num_pairs, generator)
        values = self.symbols + torch.randint(self.symbols, keys.shape, generator=generator)
        inputs = 2 * self.symbols + torch.randint(self.symbols, (size, self.seq_len), generator=generator)
        inputs.scatter_(1, positions, keys).scatter_(1, positions + 1, values)
        inputs[:, -1] = keys[:, 0]
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -1] = values[:, 0]
        return Batch(inputs, targets, depth.expand_as(inputs))
