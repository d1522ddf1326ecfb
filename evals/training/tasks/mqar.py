"""Multi-query associative recall: many keys whose values are recalled later, at power-law distances."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evals.training.tasks.base import IGNORED, Batch, Split, Task, distinct, require


@dataclass(frozen=True)
class MQAR(Task):
    """Key-value pairs, then every key once more; the target there is its value. Zoology (arXiv:2312.04927), section 4.

    With seq_len=12, num_pairs=2, vocabulary=20 and random_filler=False, pairs (3, 14) and (7, 11):

        Inputs   3 14  7 11  0  0  7  0  0  0  3  0
        Targets  -  -  -  -  -  - 11  -  -  - 14  -       (-: IGNORED)

    The N = num_pairs keys are distinct tokens of 1 … vocabulary/2 − 1, the values distinct tokens of the other half. The queries
    stand at positions 2N + 2g. The gaps g are distinct and drawn one after the other from 0 … (seq_len − 2N)/2 − 1 with
    probability ∝ (g + 1)^(power − 1): repeated bigrams of text, too, are far apart with a probability that falls by a power law.
    chance is 1/N, a value of the example.

    Attributes:
        num_pairs: pairs of an example.
        vocabulary: tokens, half of them keys.
        power: exponent of the gaps' power law; 1 is uniform.
        random_filler: whether all other positions after the pairs are random tokens, which may repeat a key, or 0.

    Raises:
        ValueError: unless seq_len is even, 4·num_pairs ≤ seq_len, and the vocabulary has enough tokens.
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
            f"num_pairs must be at most seq_len / 4 = {self.seq_len // 4}, so that each key can be queried, got {self.num_pairs}",
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
        queries = 2 * pairs + 2 * self._gaps(size, generator)
        inputs = torch.randint(self.vocabulary, (size, n), generator=generator)
        if not self.random_filler:
            inputs.zero_()
        inputs[:, 0 : 2 * pairs : 2] = keys
        inputs[:, 1 : 2 * pairs : 2] = values
        inputs.scatter_(1, queries, keys)
        targets = torch.full((size, n), IGNORED).scatter_(1, queries, values)
        return Batch(inputs, targets, torch.zeros_like(inputs))

    def _gaps(self, size: int, generator: torch.Generator) -> Tensor:
        """Draws distinct gaps [size, num_pairs] one after the other: the largest of log p + Gumbel noise have that distribution."""
        space = (self.seq_len - 2 * self.num_pairs) // 2
        log_p = (self.power - 1) * torch.arange(1, space + 1, dtype=torch.float64).log()
        noise = -(-torch.rand(size, space, generator=generator, dtype=torch.float64).log()).log()
        return (log_p + noise).topk(self.num_pairs, dim=1).indices
