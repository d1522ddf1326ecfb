"""Pages of a key-value cache: tensors that follow each other along time, most of which one decoding state shares with the next."""

from collections.abc import Mapping

import torch
from torch import Tensor

SMALLEST_PAGE, LARGEST_PAGE = 256, 1024
"""Tokens in a page: powers of two. Smaller pages mean less to copy for a token, larger ones fewer pages to attend to."""


def page_lengths(time: int) -> list[int]:
    """Lengths of the pages of `time` tokens: the largest pages, then the halves of them that fit, then the open page.

    A new token copies the open page only. Now and then equal pages merge into one of twice the length, as the digits of a binary
    counter carry, so every token is copied log₂(LARGEST_PAGE / SMALLEST_PAGE) more times, however long the context.
    """
    lengths, rest, length = [LARGEST_PAGE] * (time // LARGEST_PAGE), time % LARGEST_PAGE, LARGEST_PAGE // 2
    while length >= SMALLEST_PAGE:
        if rest & length:
            lengths.append(length)
        length //= 2
    return lengths + [rest % SMALLEST_PAGE] * (rest % SMALLEST_PAGE > 0)


def append_to_pages(pages: list[Tensor], new: Tensor) -> list[Tensor]:
    """Pages of `page_lengths` with `new` [batch, heads, time, dim] after the last token; unchanged pages are the same tensors."""
    before = [page.shape[2] for page in pages]
    after = page_lengths(sum(before) + new.shape[2])
    same = 0
    while same < len(before) and before[same] == after[same]:
        same += 1
    changed = torch.cat([*pages[same:], new], dim=2) if same < len(pages) else new
    if same + 1 == len(after):
        return [*pages[:same], changed.contiguous()]
    # Cloned: a page that is a view would keep all of `changed` alive.
    cut = changed.split(after[same:], dim=2)
    return [*pages[:same], *(page.clone(memory_format=torch.contiguous_format) for page in cut)]


def state_pages(state: Mapping[str, Tensor] | None, name: str) -> list[Tensor]:
    """The pages `name.0`, `name.1`, … of a decoding state."""
    pages: list[Tensor] = []
    while state is not None and (page := state.get(f"{name}.{len(pages)}")) is not None:
        pages.append(page)
    return pages
