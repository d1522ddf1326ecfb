"""Text as bytes, from a file, a folder, Hugging Face or Python's standard library, split into train, validation and test."""

import hashlib
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.training.tasks.base import Split

HELD_OUT = {"validation": 0.05, "test": 0.05}
"""Fractions of a text, or of the files of a folder, that are not for training."""


@dataclass(frozen=True)
class Corpus:
    """Bytes of a text's splits, and the digest of all of them in order."""

    splits: Mapping[Split, NDArray[np.uint8]]
    sha256: str


@lru_cache(maxsize=2)
def load_corpus(path: str | None = None, dataset: str | None = None, subset: str | None = None) -> Corpus:
    """Loads a text and splits it.

    A file is cut in order, so the held-out parts are its end. A folder is split by file (see `split_of`). A data set has its own
    splits or is cut like a file.

    Args:
        path: a text file, or a folder of them.
        dataset: name of a Hugging Face data set, if there is no path; without both, the text is Python's standard library.
        subset: of the data set.

    Raises:
        ValueError: if there is no text, or not enough for every split.
        ModuleNotFoundError: if a data set is given and `datasets` is not installed.
    """
    if path is not None:
        source = path
        splits = _read_path(Path(path))
    elif dataset is not None:
        source = dataset
        splits = _read_dataset(dataset, subset)
    else:
        source = sysconfig.get_path("stdlib")
        files = (file for file in Path(source).rglob("*.py") if not {"site-packages", "test", "__pycache__"} & {*file.parts})
        splits = _split_by_file(Path(source), files)
    for name, text in splits.items():
        if not text:
            raise ValueError(f"the text of {source!r} leaves nothing for {name}: give more of it")
    digest = hashlib.sha256(b"".join(splits.values())).hexdigest()
    return Corpus({name: np.frombuffer(text, np.uint8) for name, text in splits.items()}, digest)


def split_of(name: str) -> Split:
    """Split to which a file of a folder belongs, by the digest of its name: adding a file moves no other."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if position < HELD_OUT["validation"]:
        return "validation"
    return "test" if position < HELD_OUT["validation"] + HELD_OUT["test"] else "train"


def _read_path(path: Path) -> dict[Split, bytes]:
    if path.is_file():
        return _cut(path.read_bytes())
    if not path.is_dir():
        raise ValueError(f"path must be a text file or a folder of some, and there is none at {str(path)!r}")
    return _split_by_file(path, (file for file in path.rglob("*") if file.is_file()))


def _cut(text: bytes) -> dict[Split, bytes]:
    """Cuts a text in order: train, validation, test."""
    validation, test = (round(len(text) * (1 - part)) for part in (HELD_OUT["validation"] + HELD_OUT["test"], HELD_OUT["test"]))
    return {"train": text[:validation], "validation": text[validation:test], "test": text[test:]}


def _split_by_file(folder: Path, files: Iterable[Path]) -> dict[Split, bytes]:
    texts: dict[Split, list[bytes]] = {"train": [], "validation": [], "test": []}
    for file in sorted(files):
        texts[split_of(file.relative_to(folder).as_posix())].append(file.read_bytes())
    return {split: b"\n".join(parts) for split, parts in texts.items()}


def _read_dataset(dataset: str, subset: str | None) -> dict[Split, bytes]:
    try:
        from datasets import load_dataset  # an optional dependency
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "task.dataset needs Hugging Face datasets: pip install -c constraints.txt -e '.[datasets]'"
        ) from None
    loaded: Mapping[str, Any] = load_dataset(dataset, subset)
    if "train" not in loaded or "text" not in loaded["train"].column_names:
        raise ValueError(f"dataset {dataset!r} must have a split train with a column text, found {', '.join(loaded)}")
    texts = {name: "\n".join(loaded[name]["text"]).encode() for name in ("train", "validation", "test") if name in loaded}
    return texts if len(texts) == 3 else _cut(texts["train"])  # type: ignore[return-value]
