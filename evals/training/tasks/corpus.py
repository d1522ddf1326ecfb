"""Bytes of text from a file, a folder, Hugging Face or Python's own source, split into train, validation and test."""

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
"""Which part of a text, or of the files of a folder, is for what; the rest is for training."""


@dataclass(frozen=True)
class Corpus:
    """`sha256`: of all bytes of the three splits, in their order."""

    splits: Mapping[Split, NDArray[np.uint8]]
    sha256: str


@lru_cache(maxsize=2)
def load_corpus(path: str | None = None, dataset: str | None = None, subset: str | None = None) -> Corpus:
    """The text at `path`; else of the Hugging Face `dataset` with its `subset`; else of Python's standard library.

    A file is cut in its order: what is held out is its end. A folder, and the standard library, is split by file, by the digest
    of each name. Raises ValueError if there is no text, and ImportError if `datasets` is asked for and not installed.
    """
    if path is not None:
        place = Path(path)
        if place.is_file():
            return _made(_cut(place.read_bytes()), path)
        if not place.is_dir():
            raise ValueError(f"path must be a text file or a folder of some, and there is none at {path!r}")
        return _made(_by_file(place, (one for one in place.rglob("*") if one.is_file())), path)
    if dataset is not None:
        return _made(_hugging_face(dataset, subset), dataset)
    library = Path(sysconfig.get_path("stdlib"))
    sources = (one for one in library.rglob("*.py") if not {"site-packages", "test", "__pycache__"} & {*one.parts})
    return _made(_by_file(library, sources), str(library))


def _made(splits: Mapping[Split, bytes], place: str) -> Corpus:
    for name, text in splits.items():
        if not text:
            raise ValueError(f"the text of {place!r} leaves nothing for {name}: give more of it")
    digest = hashlib.sha256(b"".join(splits.values())).hexdigest()
    return Corpus({name: np.frombuffer(text, np.uint8) for name, text in splits.items()}, digest)


def _cut(text: bytes) -> dict[Split, bytes]:
    validation, test = (round(len(text) * (1 - part)) for part in (HELD_OUT["validation"] + HELD_OUT["test"], HELD_OUT["test"]))
    return {"train": text[:validation], "validation": text[validation:test], "test": text[test:]}


def _by_file(folder: Path, files: Iterable[Path]) -> dict[Split, bytes]:
    texts: dict[Split, list[bytes]] = {"train": [], "validation": [], "test": []}
    for file in sorted(files):
        texts[split_of(file.relative_to(folder).as_posix())].append(file.read_bytes())
    return {split: b"\n".join(parts) for split, parts in texts.items()}


def split_of(name: str) -> Split:
    """Where a file belongs: by its name alone, so that files that come or go move no other."""
    at = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if at < HELD_OUT["validation"]:
        return "validation"
    return "test" if at < HELD_OUT["validation"] + HELD_OUT["test"] else "train"


def _hugging_face(dataset: str, subset: str | None) -> dict[Split, bytes]:
    """Its own splits where it has all three, else its training text, cut."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "task.dataset needs Hugging Face datasets: pip install -c constraints.txt -e '.[datasets]'"
        ) from None
    loaded: Mapping[str, Any] = load_dataset(dataset, subset)
    if "train" not in loaded or "text" not in loaded["train"].column_names:
        raise ValueError(f"dataset {dataset!r} must have a split train with a column text, found {', '.join(loaded)}")
    texts = {name: "\n".join(loaded[name]["text"]).encode() for name in ("train", "validation", "test") if name in loaded}
    return texts if len(texts) == 3 else _cut(texts["train"])  # type: ignore[return-value]
