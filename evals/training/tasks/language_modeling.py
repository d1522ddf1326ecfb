"""Language modeling of bytes: predict the next byte of a text, by how much context there is."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from evals.training.tasks.base import Batch, Split, Task, require
from evals.training.tasks.corpus import Corpus, load_corpus


@dataclass(frozen=True)
class LanguageModeling(Task):
    """Windows of seq_len + 1 bytes from random positions of a text; every byte but the first is a target.

    With seq_len=4 and the window "def m":

        Inputs   d e f ␣
        Targets  e f ␣ m
        Groups   1 2 2 2       (bytes of context)

    Targets are grouped by the length of their context, rounded down to a power of two below seq_len. The loss in bits is bits
    per byte. chance is 1/256.

    Attributes:
        path: a text file, or a folder of them.
        dataset: name of a Hugging Face data set; without it and a path, the text is Python's standard library.
        subset: of the data set.

    Raises:
        ValueError: if there is no such text, or if one of its splits is shorter than a window.
    """

    path: str | None = None
    dataset: str | None = None
    subset: str | None = None

    grouped_by: ClassVar[str | None] = "position"
    unit: ClassVar[str] = "byte"

    def __post_init__(self) -> None:
        require(self.path is None or self.dataset is None, "a text is of task.path or of task.dataset, not of both")
        shortest = min(map(len, self._corpus.splits.values()))
        require(
            shortest > self.seq_len, f"a split of the text has {shortest} bytes, too few for windows of seq_len={self.seq_len} + 1"
        )

    @property
    def _corpus(self) -> Corpus:
        return load_corpus(self.path, self.dataset, self.subset)

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def chance(self) -> float:
        return 1 / 256

    @property
    def groups(self) -> tuple[float, ...]:
        return tuple(2.0**power for power in range(max(1, (self.seq_len - 1).bit_length())))

    def extra_settings(self) -> dict[str, Any]:
        return {"text_sha256": self._corpus.sha256}

    def batch(self, size: int, generator: torch.Generator, split: Split = "train") -> Batch:
        text = self._corpus.splits[split]
        starts = torch.randint(len(text) - self.seq_len, (size, 1), generator=generator)
        windows = torch.from_numpy(text[(starts + torch.arange(self.seq_len + 1)).numpy()]).long()
        groups = torch.arange(1, self.seq_len + 1).log2().floor().long().clamp(max=len(self.groups) - 1)
        return Batch(windows[:, :-1], windows[:, 1:], groups.expand(size, -1))
