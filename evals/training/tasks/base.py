"""The contract of a task: options that generate examples, and what the accuracy on them means.

A task of your own is a frozen dataclass that subclasses `Task`, and a YAML in `conf/task/` with its `_target_` and options.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

IGNORED = -100
"""Target of a position that does not count: the default `ignore_index` of `torch.nn.functional.cross_entropy`."""

Split = Literal["train", "validation", "test"]


class Batch(NamedTuple):
    """Examples of a task. At position t a model has read `inputs` up to and including t, and predicts `targets[t]`.

    Attributes:
        inputs: [batch, time] token ids.
        targets: [batch, time] token ids; IGNORED at positions that do not count.
        groups: [batch, time] indices into `Task.groups`: the group under which a target is reported.
    """

    inputs: Tensor
    targets: Tensor
    groups: Tensor

    @property
    def target_mask(self) -> Tensor:
        """[batch, time] bool: positions whose target counts."""
        return self.targets != IGNORED

    def split(self, count: int) -> "list[Batch]":
        """Cuts the examples into `count` batches, whose sizes differ by at most one."""
        return [Batch(*tensors) for tensors in zip(*(tensor.tensor_split(count) for tensor in self), strict=True)]


@dataclass(frozen=True)
class Task(ABC):
    """A task at one length. Its fields are its options, and `dataclasses.replace(task, seq_len=…)` changes its length.

    A subclass checks its options in `__post_init__` and raises ValueError with one sentence (see `require`).
    Accuracy is the fraction of targets that are the likeliest token of the whole vocabulary.

    Attributes:
        seq_len: tokens of an example.
        grouped_by: quantity by which targets are reported in groups, as a column of the table; None means one group of all.
        proportional: options that `shortened` divides along with the length, down to 1.
        unit: what one token is. With `byte`, losses are also reported in bits.
    """

    seq_len: int

    grouped_by: ClassVar[str | None] = None
    proportional: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "token"

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens, inputs and targets together."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of a model that knows how examples are made and remembers nothing of this one."""

    @abstractmethod
    def batch(self, size: int, generator: torch.Generator, split: Split = "train") -> Batch:
        """Generates examples.

        Args:
            size: number of examples.
            generator: the only source of randomness; the same state gives the same examples.
            split: part of the data, for tasks whose data are finite.
        """

    @property
    def groups(self) -> tuple[float, ...]:
        """Values of `grouped_by`, in order."""
        return (0.0,)

    def shortened(self, divisor: int) -> Self:
        """The same task at a fraction of the length, as a curriculum begins with.

        Args:
            divisor: of the length, and of the `proportional` options.

        Raises:
            ValueError: if the length is not a multiple of the divisor, or too short for the task.
        """
        require(self.seq_len % divisor == 0, f"training.curriculum must divide seq_len = {self.seq_len}, which {divisor} does not")
        options = {option: max(1, getattr(self, option) // divisor) for option in self.proportional}
        return replace(self, seq_len=self.seq_len // divisor, **options)

    def extra_settings(self) -> dict[str, Any]:
        """Facts besides the options on which the examples depend, such as the digest of a text; columns of the table."""
        return {}


def generator(*parts: object) -> torch.Generator:
    """Makes a generator whose state depends on these parts alone, such as a split, a seed and the number of a step."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def distinct(size: int, choices: int, count: int, generator: torch.Generator) -> Tensor:
    """Draws [size, count] integers from 0 … choices − 1, distinct within each row, in random order."""
    return torch.rand(size, choices, generator=generator).topk(count, dim=1).indices


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)
