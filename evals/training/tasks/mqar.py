"""Multi-query associative recall: many keys, asked for their values at power-law distances."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evals.training.tasks.base import IGNORED, Batch, Split, Task, distinct, require


@dataclass(frozen=True)
class MQAR(Task):
    """k₁ v₁ … k_N v_N, then every key once more somewhere behind, where its value is asked: Zoology (arXiv:2312.04927), section 4.

    Keys are N different tokens of 1 … vocab/2 − 1, values N different ones of vocab/2 … vocab − 1. The queries stand at
    2N + 2g, with different gaps g of 0 … (n − 2N)/2 − 1, drawn one after the other with probability ∝ (g + 1)^(power − 1), as
    repeated bigrams of text are far apart with a probability that falls by a power law. All other positions are random
    tokens of the whole vocabulary, or 0 under random_filler=False; nothing is asked there. Random filler may repeat a key.

    num_pairs: N. power: 1 is uniform. accuracy: of the values at the queries. chance: 1/N, a value of this example.
    Raises ValueError unless seq_len is even, 4·num_pairs ≤ seq_len, and there are tokens enough.
    """

    num_pairs: int = 8
    vocabulary: int = 8192
    power: float = 0.01
    random_filler: bool = True

    proportional: ClassVar[tuple[str, ...]] = ("num_pairs",)

    def __post_init__(self) -> None:
        require(self.num_pairs >= 1, f"num_pairs must be at least 1, got {self.num_pairs}")
        require(self.seq_len % 2 == 0, f"mqar needs an even seq_len, got {self.seq_len}")
        require(
            4 * self.num_pairs <= self.seq_len,
            f"num_pairs must be at most seq_len / 4 = {self.seq_len // 4}, so that each key can be asked, got {self.num_pairs}",
        )
        require(
            self.vocabulary // 2 > self.num_pairs,
            f"vocabulary must be above 2·num_pairs + 1 = {2 * self.num_pairs + 1}, half of it keys, got {self.vocabulary}",
        )
        require(self.power > 0, f"power must be above 0, got {self.power}")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / self.num_pairs

    def batch(self, size: int, generator: torch.Generator, split: Split = "train") -> Batch:
        n, pairs, half = self.seq_len, self.num_pairs, self.vocabulary // 2
        keys = 1 + distinct(size, half - 1, pairs, generator)
        values = half + distinct(size, self.vocabulary - half, pairs, generator)
        positions = 2 * pairs + 2 * self._gaps(size, generator)
        inputs = torch.randint(self.vocabulary, (size, n), generator=generator)
        if not self.random_filler:
            inputs.zero_()
        inputs[:, 0 : 2 * pairs : 2] = keys
        inputs[:, 1 : 2 * pairs : 2] = values
        inputs.scatter_(1, positions, keys)
        targets = torch.full((size, n), IGNORED).scatter_(1, positions, values)
        return Batch(inputs, targets, torch.zeros_like(inputs))

    def _gaps(self, size: int, generator: torch.Generator) -> Tensor:
        """Different gaps [size, num_pairs], drawn one after the other: the largest of log p + Gumbel noise are just that."""
        space = (self.seq_len - 2 * self.num_pairs) // 2
        log_p = (self.power - 1) * torch.arange(1, space + 1, dtype=torch.float64).log()
        noise = -(-torch.rand(size, space, generator=generator, dtype=torch.float64).log()).log()
        return (log_p + noise).topk(self.num_pairs, dim=1).indices
