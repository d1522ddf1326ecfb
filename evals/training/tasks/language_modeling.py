"""Language modelling of bytes: the next byte of a text, by how much context there was."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from evals.training.tasks.base import Batch, Split, Task, require
from evals.training.tasks.corpus import load_corpus


@dataclass(frozen=True)
class LanguageModeling(Task):
    """Windows of n + 1 bytes from random places of a text, each byte asked after those of its window before it.

    The text: that of a file or folder `path`; of Hugging Face's `dataset` (and its `subset`); of Python's standard library where
    neither is given. Groups are of context length, as powers of two: position t counts for the greatest 2^i ≤ t + 1, and below n.
    accuracy: of all bytes. Its loss in bits is bits per byte. chance: 1/256.
    Raises ValueError if there is no such text, or one of its splits is shorter than a window.
    """

    path: str | None = None
    dataset: str | None = None
    subset: str | None = None

    grouped_by: ClassVar[str | None] = "position"
    unit: ClassVar[str] = "byte"

    def __post_init__(self) -> None:
        require(self.path is None or self.dataset is None, "a text is of task.path or of task.dataset, not of both")
        shortest = min(map(len, self._text.splits.values()))
        require(
            shortest > self.seq_len, f"a split of the text has {shortest} bytes, too few for windows of seq_len={self.seq_len} + 1"
        )

    @property
    def _text(self) -> Any:
        return load_corpus(self.path, self.dataset, self.subset)

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def chance(self) -> float:
        return 1 / 256

    @property
    def groups(self) -> tuple[float, ...]:
        return tuple(2.0**power for power in range(self._powers))

    @property
    def _powers(self) -> int:
        return max(1, (self.seq_len - 1).bit_length())

    def extra_settings(self) -> dict[str, Any]:
        return {"text_sha256": self._text.sha256}

    def batch(self, size: int, generator: torch.Generator, split: Split = "train") -> Batch:
        text = self._text.splits[split]
        starts = torch.randint(len(text) - self.seq_len, (size, 1), generator=generator)
        windows = torch.from_numpy(text[(starts + torch.arange(self.seq_len + 1)).numpy()]).long()
        context = torch.arange(1, self.seq_len + 1).log2().floor().long().clamp(max=self._powers - 1)
        return Batch(windows[:, :-1], windows[:, 1:], context.expand(size, -1))
