"""What every task is: options that make examples, and what the accuracy on them means."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

IGNORED = -100
"""The target of a position at which nothing is asked: `torch.nn.functional.cross_entropy`'s own ignore_index."""

Split = Literal["train", "validation", "test"]


class Batch(NamedTuple):
    """Examples [batch, time] of token ids: at position t the model has seen inputs up to t, and targets[t] is asked.

    targets: IGNORED where nothing is asked. groups: at every position, which of `Task.groups` a target there counts for.
    """

    inputs: Tensor
    targets: Tensor
    groups: Tensor


@dataclass(frozen=True)
class Task(ABC):
    """A task at one length: its fields are its options, and `dataclasses.replace(task, seq_len=…)` is the same one longer.

    proportional: the options that `part` divides too, down to 1, as they are as much as the length has room for.

    accuracy: the part of the targets that are the likeliest token of all the vocabulary.
    """

    seq_len: int

    grouped_by: ClassVar[str | None] = None
    """What tells one group of targets from another, as a column of the table; None: there is one group."""

    proportional: ClassVar[tuple[str, ...]] = ()

    unit: ClassVar[str] = "token"
    """What one target is: of a byte, the loss is told in bits, too."""

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def chance(self) -> float:
        """The accuracy of who knows the form of the examples and remembers nothing of this one."""

    @abstractmethod
    def batch(self, size: int, generator: torch.Generator, split: Split = "train") -> Batch:
        """`size` examples: the same for the same options and state of the generator. `split` matters where data are finite."""

    @property
    def groups(self) -> tuple[float, ...]:
        """The values of `grouped_by`, in order."""
        return (0.0,)

    def part(self, divisor: int) -> Self:
        """The same task at a `divisor`-th of the length, which a curriculum begins with. Raises ValueError if there is none."""
        require(self.seq_len % divisor == 0, f"training.curriculum must divide seq_len = {self.seq_len}, which {divisor} does not")
        fewer = {option: max(1, getattr(self, option) // divisor) for option in self.proportional}
        return replace(self, seq_len=self.seq_len // divisor, **fewer)

    def facts(self) -> dict[str, Any]:
        """What the examples depend on besides the options, such as a digest of a text."""
        return {}


def generator(*words: object) -> torch.Generator:
    """A generator whose state follows from these words alone, such as a seed, a split and the number of a batch."""
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def distinct(size: int, choices: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers of 0 … choices − 1, in random order, in each of `size` rows: [size, count]."""
    return torch.rand(size, choices, generator=generator).topk(count, dim=1).indices


def require(condition: bool, words: str) -> None:
    """Raises ValueError with these words unless the condition holds."""
    if not condition:
        raise ValueError(words)
