"""Pages of a key-value cache: tensors that follow each other along time. Successive decoding states share most of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

SMALLEST_PAGE, LARGEST_PAGE = 256, 1024
"""Tokens in a page, powers of two. With smaller pages a new token copies less; with larger ones there are fewer pages to read."""


def page_lengths(time: int) -> list[int]:
    """Lengths of the pages of `time` tokens: pages of LARGEST_PAGE, then smaller powers of two, then the open page.

    A new token copies the open page only. Two pages of equal length merge into one, as bits carry in a binary counter, so every
    token is copied log₂(LARGEST_PAGE / SMALLEST_PAGE) more times at any context length.
    """
    lengths, rest, length = [LARGEST_PAGE] * (time // LARGEST_PAGE), time % LARGEST_PAGE, LARGEST_PAGE // 2
    while length >= SMALLEST_PAGE:
        if rest & length:
            lengths.append(length)
        length //= 2
    return lengths + [rest % SMALLEST_PAGE] * (rest % SMALLEST_PAGE > 0)


def append_to_pages(pages: list[Tensor], new: Tensor) -> list[Tensor]:
    """Appends `new` [batch, heads, time, dim] to pages of `page_lengths`; unchanged pages stay the same tensors."""
    before = [page.shape[2] for page in pages]
    after = page_lengths(sum(before) + new.shape[2])
    same = 0
    while same < len(before) and before[same] == after[same]:
        same += 1
    changed = torch.cat([*pages[same:], new], dim=2) if same < len(pages) else new
    if same + 1 == len(after):
        return [*pages[:same], changed.contiguous()]
    # Cloned: a page that is a view would keep all of `changed` in memory.
    cut = changed.split(after[same:], dim=2)
    return [*pages[:same], *(page.clone(memory_format=torch.contiguous_format) for page in cut)]


def state_pages(state: Mapping[str, Tensor] | None, name: str) -> list[Tensor]:
    """The pages `name.0`, `name.1`, … of a decoding state."""
    pages: list[Tensor] = []
    while state is not None and (page := state.get(f"{name}.{len(pages)}")) is not None:
        pages.append(page)
    return pages
