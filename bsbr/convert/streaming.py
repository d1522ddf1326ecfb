"""Decoding state of a converted attention, as a layer of transformers' `DynamicCache`.

It holds the last keys and values, and one state per complete chunk. Each row of a batch has its own chunks, counted from the row's
first token after padding.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from bsbr.convert.retrieval import Retrieval, normalized_sum


class StreamingLayer(CacheLayerMixin):
    """Cache layer of one converted attention.

    A token costs O((chunk_size + chunk_overlap + d_r)·head_dim) per head; a chunk's first token also mixes all chunk states. A
    prompt's keys and values are stored first, and turned into a state when the first token follows, because most calls of a model
    are not followed by decoding.

    The library's attention passes new keys and values to `update`, and the tensors that it returns to the attention function. These
    are placeholders of the right length; `attention` reads the new keys and values from `take_new`.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0
        self.new: tuple[Tensor, Tensor] | None = None
        self.prompt: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}

    # --- the library's interface of a cache layer -------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.lazy_initialization(key_states, value_states)
        self.new = key_states, value_states
        self.num_tokens += key_states.shape[2]
        # T5 computes its relative bias for the length of these keys.
        keys_of_full_length = key_states[:, :, :1].expand(-1, -1, self.num_tokens, -1)
        return keys_of_full_length, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.num_tokens, self.new, self.prompt, self.state, self.is_initialized = 0, None, {}, {}, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                "a converted model cannot take back tokens, as assisted decoding would: a chunk that is complete is a state"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for tensors in (self.prompt, self.state):
            tensors.update({name: change(x) for name, x in tensors.items()})

    # --- the interface to the attention function --------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether there are no tokens before the new ones."""
        return not self.prompt and not self.state

    def take_new(self) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of the last `update`, and clears them."""
        assert self.new is not None
        new, self.new = self.new, None
        return new

    def store_prompt(self, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor | None, chunk_size: int) -> None:
        """Stores the first tokens.

        Args:
            q: [batch, heads, time, head_dim], with the tokens of each row moved to its front.
            k, v: [batch, kv_heads, time, head_dim], likewise.
            token_mask: [batch, time], True for tokens; None if all are tokens.
            chunk_size: tokens of a chunk.
        """
        counts = q.new_full((q.shape[0],), q.shape[2], dtype=torch.int64) if token_mask is None else token_mask.sum(dim=1)
        self.prompt = {"openings": q[:, :, ::chunk_size], "keys": k, "values": v, "position": counts}

    def summarize_prompt(self, retrieval: Retrieval) -> None:
        """Replaces a stored prompt by the state that later tokens need."""
        if self.prompt:
            self.state, self.prompt = state_after_prompt(retrieval, self.prompt), {}

    def attend(self, retrieval: Retrieval, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of new tokens that follow the stored ones, token by token.

        Args:
            retrieval: the learned parts.
            q: [batch, heads, new, head_dim].
            k, v: [batch, kv_heads, new, head_dim].
            bias: [1, heads, new, all tokens so far], added to the scores; None for 0.

        Returns:
            [batch, heads, new, head_dim].
        """
        self.summarize_prompt(retrieval)
        past = 0 if bias is None else bias.shape[3] - q.shape[2]
        outputs = []
        for i in range(q.shape[2]):
            token = slice(i, i + 1)
            token_bias = None if bias is None else bias[:, :, token, : past + i + 1]
            attended, self.state = decode_token(retrieval, self.state, q[:, :, token], k[:, :, token], v[:, :, token], token_bias)
            outputs.append(attended)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def state_after_prompt(retrieval: Retrieval, prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    """Decoding state after a prompt.

    Args:
        retrieval: the learned parts.
        prompt: as `StreamingLayer.store_prompt` stores it.

    Returns:
        `position` [batch], the number of tokens of each row; `keys` and `values`, the last tokens, at the end of each row;
        `meta_keys` and `states` of complete chunks, of which a row has position // chunk_size; `retrieved`, g F̄ and g F̄' of the
        incomplete chunk.
    """
    keys, values, position = prompt["keys"], prompt["values"], prompt["position"]
    size, time = retrieval.chunk_size, keys.shape[2]
    meta_keys, states = retrieval.summarize_chunks(keys, values, time // size)
    num_local = min(time, size + retrieval.chunk_overlap)
    local = (position[:, None] - num_local + torch.arange(num_local, device=keys.device)).clamp(min=0)
    complete_chunks = position // size
    last_opening = complete_chunks.clamp(max=prompt["openings"].shape[2] - 1)
    opening = _gather_time(prompt["openings"], last_opening[:, None])
    return {
        "keys": _gather_time(keys, local),
        "values": _gather_time(values, local),
        "position": position,
        "meta_keys": meta_keys,
        "states": states,
        "retrieved": _retrieve_for_chunk(retrieval, opening, meta_keys, states, complete_chunks),
    }


def decode_token(
    retrieval: Retrieval, state: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention of one more token in every row, [batch, heads, 1, head_dim], and the state after it."""
    size, position = retrieval.chunk_size, state["position"]
    offset = position % size
    after = dict(state)
    begins_chunk = (offset == 0) & (position > 0)
    if bool(begins_chunk.any()):
        after |= _with_completed_chunk(retrieval, state, begins_chunk)
        retrieved = _retrieve_for_chunk(retrieval, q, after["meta_keys"], after["states"], position // size)
        after["retrieved"] = retrieved.where(begins_chunk.view(-1, 1, 1, 1), state["retrieved"])
    num_local = size + retrieval.chunk_overlap
    keys, values = (torch.cat([state[name], x], dim=2)[:, :, -num_local:] for name, x in (("keys", k), ("values", v)))
    distance = torch.arange(keys.shape[2] - 1, -1, -1, device=q.device)
    reach = torch.minimum(offset + retrieval.chunk_overlap, position)
    visible = (distance <= reach[:, None]).view(len(reach), 1, 1, -1)
    mask = visible if bias is None else bias[..., -keys.shape[2] :].where(visible, -torch.inf)
    attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    q_features = retrieval.map_queries(q, (position // size).view(-1, 1, 1, 1))
    attended = normalized_sum(attended, q_features @ after["retrieved"])
    return attended, after | {"keys": keys, "values": values, "position": position + 1}


def _with_completed_chunk(retrieval: Retrieval, state: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Meta keys and states, with those of the chunk that was just completed in `rows` [batch, boolean] of the batch."""
    size = retrieval.chunk_size
    index = state["position"] // size - 1
    completed = retrieval.summarize_chunks(state["keys"][:, :, -size:], state["values"][:, :, -size:], 1)
    after = {}
    for name, new in completed._asdict().items():
        before = state[name]
        missing = int(index.max()) + 1 - before.shape[2]
        grown = before
        if missing > 0:
            grown = torch.cat([before, before.new_zeros(*before.shape[:2], missing, *before.shape[3:])], dim=2)
        is_target = (torch.arange(grown.shape[2], device=rows.device) == index[:, None]) & rows[:, None]
        after[name] = new.where(is_target.view(len(rows), 1, -1, *(1,) * (new.dim() - 3)), grown)
    return after


def _retrieve_for_chunk(
    retrieval: Retrieval, first_query: Tensor, meta_keys: Tensor, states: Tensor, complete_chunks: Tensor
) -> Tensor:
    """g F̄ and g F̄' of a chunk with this first query, after `complete_chunks` [batch] chunks: [batch, heads, d_r, head_dim + 1]."""
    visible = torch.arange(meta_keys.shape[2], device=first_query.device) < complete_chunks[:, None]
    visible = visible.view(len(complete_chunks), 1, 1, -1)
    mixed = retrieval.retrieve(first_query @ retrieval.meta_query, meta_keys, states, visible)
    return mixed.squeeze(2) * retrieval.gain.view(-1, 1, 1)


def _gather_time(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [batch, heads, time, dim] at index [batch, picked]: [batch, heads, picked, dim]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
