"""A layer of the library's `DynamicCache` that keeps what BSBR needs to decode: one open chunk of keys and values, and states.

Each row of a batch has chunks of its own: padding before it does not count, so they begin where they would without it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from bsbr.convert.retrieval import Retrieval, joined


class StreamingLayer(CacheLayerMixin):
    """What the tokens so far came to. A token costs O((chunk_size + d_r)·head_dim) a head, and a chunk's first one the mixing.

    The prompt is kept as it was until the first token behind it, since most calls of a model are followed by none.
    `update` keeps new keys and values aside, for `attend` to take; what it returns only tells how long the sequence is.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.new: tuple[Tensor, Tensor] | None = None
        self.prompt: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}

    # --- what the library asks of a layer ---

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.lazy_initialization(key_states, value_states)
        self.new = key_states, value_states
        self.seen += key_states.shape[2]
        # T5 reads off the length of its keys how much relative bias it needs.
        length = key_states[:, :, :1].expand(-1, -1, self.seen, -1)
        return length, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.seen, self.new, self.prompt, self.state, self.is_initialized = 0, None, {}, {}, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                "a converted model cannot take back tokens, as assisted decoding would: a chunk that is complete is a state"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for kept in (self.prompt, self.state):
            kept.update({name: change(x) for name, x in kept.items()})

    # --- what attention asks of it ---

    @property
    def empty(self) -> bool:
        """Whether nothing stands before the new tokens."""
        return not self.prompt and not self.state

    def take(self) -> tuple[Tensor, Tensor]:
        """The keys and values of the last `update`."""
        assert self.new is not None
        taken, self.new = self.new, None
        return taken

    def remember(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, chunk_size: int) -> None:
        """The first tokens, moved to the front of their rows; real: [batch, time], None: all are tokens."""
        counts = q.new_full((q.shape[0],), q.shape[2], dtype=torch.int64) if real is None else real.sum(dim=1)
        self.prompt = {"openings": q[:, :, ::chunk_size], "keys": k, "values": v, "position": counts}

    def condense(self, retrieval: Retrieval) -> None:
        """Keeps of a prompt what the tokens after it need, and no more."""
        if self.prompt:
            self.state, self.prompt = condensed(retrieval, self.prompt), {}

    def attend(self, retrieval: Retrieval, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Output of new tokens behind those before, one after the other: [batch, heads, new, head_dim].

        bias: [1, heads, new, all so far], on the softmax's scores.
        """
        self.condense(retrieval)
        past = 0 if bias is None else bias.shape[3] - q.shape[2]
        outputs = []
        for i in range(q.shape[2]):
            token = slice(i, i + 1)
            own = None if bias is None else bias[:, :, token, : past + i + 1]
            attended, self.state = step(retrieval, self.state, q[:, :, token], k[:, :, token], v[:, :, token], own)
            outputs.append(attended)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def condensed(retrieval: Retrieval, prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is left of a prompt for the tokens after it.

    `position` [batch], how many tokens there were; `keys`, `values`, the last of them, at the end of each row; `meta_keys`
    and `states` of complete chunks, in a row those below position // chunk_size; `retrieved`, the open chunk's g F̄ and g F̄'.
    """
    keys, values, position = prompt["keys"], prompt["values"], prompt["position"]
    size, time = retrieval.chunk_size, keys.shape[2]
    meta_keys, states = retrieval.summaries(keys, values, time // size)
    kept = min(time, size + retrieval.chunk_overlap)
    last = (position[:, None] - kept + torch.arange(kept, device=keys.device)).clamp(min=0)
    complete = position // size
    open_ = complete.clamp(max=prompt["openings"].shape[2] - 1)
    opening = _rows(prompt["openings"], open_[:, None])
    return {
        "keys": _rows(keys, last),
        "values": _rows(values, last),
        "position": position,
        "meta_keys": meta_keys,
        "states": states,
        "retrieved": _retrieved(retrieval, opening, meta_keys, states, complete),
    }


def step(
    retrieval: Retrieval, state: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """One token more in every row: [batch, heads, 1, head_dim], and the state after it."""
    size, position = retrieval.chunk_size, state["position"]
    slot = position % size
    after = dict(state)
    opens = (slot == 0) & (position > 0)
    if bool(opens.any()):
        after |= _closed(retrieval, state, opens)
        now = _retrieved(retrieval, q, after["meta_keys"], after["states"], position // size)
        after["retrieved"] = now.where(opens.view(-1, 1, 1, 1), state["retrieved"])
    kept = size + retrieval.chunk_overlap
    keys, values = (torch.cat([state[name], x], dim=2)[:, :, -kept:] for name, x in (("keys", k), ("values", v)))
    distance = torch.arange(keys.shape[2] - 1, -1, -1, device=q.device)
    reach = torch.minimum(slot + retrieval.chunk_overlap, position)
    visible = (distance <= reach[:, None]).view(len(reach), 1, 1, -1)
    mask = visible if bias is None else bias[..., -keys.shape[2] :].where(visible, -torch.inf)
    attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    attended = joined(attended, retrieval.phi_q(q, (position // size).view(-1, 1, 1, 1)) @ after["retrieved"])
    return attended, after | {"keys": keys, "values": values, "position": position + 1}


def _closed(retrieval: Retrieval, state: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The meta keys and states with those of the chunk that just ended in `rows` [batch] of the batch."""
    size = retrieval.chunk_size
    place = state["position"] // size - 1
    ended = retrieval.summaries(state["keys"][:, :, -size:], state["values"][:, :, -size:], 1)
    after = {}
    for name, new in zip(("meta_keys", "states"), ended, strict=True):
        before = state[name]
        room = int(place.max()) + 1 - before.shape[2]
        grown = before if room <= 0 else torch.cat([before, before.new_zeros(*before.shape[:2], room, *before.shape[3:])], dim=2)
        here = (torch.arange(grown.shape[2], device=rows.device) == place[:, None]) & rows[:, None]
        after[name] = new.where(here.view(len(rows), 1, -1, *(1,) * (new.dim() - 3)), grown)
    return after


def _retrieved(retrieval: Retrieval, opening: Tensor, meta_keys: Tensor, states: Tensor, complete: Tensor) -> Tensor:
    """g F̄, g F̄' [batch, heads, d_r, head_dim + 1] of a chunk that `opening` opens, behind `complete` [batch] chunks of its row."""
    visible = (torch.arange(meta_keys.shape[2], device=opening.device) < complete[:, None]).view(len(complete), 1, 1, -1)
    mixed = retrieval.retrieve(opening @ retrieval.meta_query, meta_keys, states, visible)
    return mixed.squeeze(2) * retrieval.gain.view(-1, 1, 1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, heads, time, dim] at index [batch, picked]: [batch, heads, picked, dim]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
