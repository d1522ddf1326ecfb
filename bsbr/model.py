"""The decoder that every comparison uses: pre-norm transformer layers over any `Attention`.

`BSBRLayer` and `BSBRModel` are that decoder over BSBR; `CausalLM` adds a language-model head to a decoder.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bsbr.attention import BSBRAttention
from bsbr.convolution import ShortConvolution
from bsbr.interface import Attention, State, next_position, position_counter, position_waves, require_positive
from bsbr.padding import pack, token_mask

BuildAttention = Callable[..., Attention]
"""A function called as `build(hidden_dim=..., num_heads=...)` once a layer: a class, a `functools.partial` of one, or a lambda."""


class TransformerLayer(nn.Module):
    """One decoder layer: x ← x + dropout(attention(norm(x))), then x ← x + dropout(feed_forward(norm(x))).

    From arXiv:1706.03762, with the norms before the sublayers as in arXiv:2002.04745. With conv_size, the attention's
    input is convolution(norm(x)).

    Args:
        hidden_dim: width of the hidden states.
        num_heads: heads of the attention.
        ff_dim: inner width of the feed-forward sublayer.
        attention: function that builds the attention.
        dropout: dropout probability of the output of each sublayer.
        conv_size: taps of a `ShortConvolution`; None for no convolution.

    Raises:
        ValueError: if a size is not a positive integer.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        ff_dim: int,
        *,
        attention: BuildAttention,
        dropout: float = 0.0,
        conv_size: int | None = None,
    ) -> None:
        super().__init__()
        require_positive(ff_dim=ff_dim)
        self.attention = attention(hidden_dim=hidden_dim, num_heads=num_heads)
        self.convolution = None if conv_size is None else ShortConvolution(hidden_dim, conv_size)
        self.attention_norm = nn.LayerNorm(hidden_dim)
        self.feed_forward_norm = nn.LayerNorm(hidden_dim)
        self.feed_forward = nn.Sequential(nn.Linear(hidden_dim, ff_dim), nn.GELU(), nn.Linear(ff_dim, hidden_dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[batch, time, hidden_dim] -> the same shape, 0 at padding; attention_mask as in `Attention.forward`."""
        if attention_mask is not None:
            packed, unpack = pack(hidden_states, attention_mask)
            return unpack(self(packed))
        normed = self.attention_norm(hidden_states)
        if self.convolution is not None:
            normed = self.convolution(normed)
        return self._feed_forward(hidden_states + self.dropout(self.attention(normed)))

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `Attention.extend`; the state is that of the attention, with the last inputs of the convolution."""
        normed, convolution_state = self.attention_norm(hidden_states), {}
        if self.convolution is not None:
            last_inputs = None if state is None else state["convolved"]
            normed, convolution_state["convolved"] = self.convolution.extend(normed, last_inputs)
        attended, attention_state = self.attention.extend_in_segments(normed, state)
        return self._feed_forward(hidden_states + self.dropout(attended)), {**attention_state, **convolution_state}

    def _feed_forward(self, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states))))


class TransformerModel(nn.Module):
    """A causal decoder: token ids [batch, time] -> hidden states [batch, time, hidden_dim], for sequences of any length.

    Padding is removed once, before the first layer; see `bsbr.padding.pack`.

    Args:
        vocab_size: number of token ids.
        num_layers: number of layers.
        hidden_dim, num_heads, ff_dim, attention, dropout, conv_size: see `TransformerLayer`; dropout also acts on embeddings.
        positions: whether `sinusoids` are added to the embeddings; False for attentions that encode positions, such as rotary ones.
        use_checkpointing: whether the backward pass recomputes each layer instead of storing its activations.

    Raises:
        ValueError: if a size is not a positive integer.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        ff_dim: int,
        *,
        attention: BuildAttention,
        dropout: float = 0.0,
        conv_size: int | None = None,
        positions: bool = True,
        use_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        require_positive(vocab_size=vocab_size, hidden_dim=hidden_dim, num_layers=num_layers)
        self.embedding = nn.Embedding(vocab_size, hidden_dim)
        nn.init.normal_(self.embedding.weight, std=hidden_dim**-0.5)
        self.layers = nn.ModuleList(
            TransformerLayer(hidden_dim, num_heads, ff_dim, attention=attention, dropout=dropout, conv_size=conv_size)
            for _ in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.positions = positions
        self.use_checkpointing = use_checkpointing

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Computes the hidden states after the last norm.

        Args:
            input_ids: integers [batch, time].
            attention_mask: [batch, time], 1 or True for a token, 0 or False for padding.

        Returns:
            [batch, time, hidden_dim], 0 at padding.

        Raises:
            ValueError: if input_ids are not integers [batch, time >= 1], or the mask has another shape or other values.
        """
        check_input_ids(input_ids)
        if attention_mask is None:
            return self._forward(input_ids)
        packed, unpack = pack(input_ids, attention_mask)
        return unpack(self._forward(packed))

    def _forward(self, input_ids: Tensor) -> Tensor:
        hidden_states = self._embed(input_ids, 0)
        for layer in self.layers:
            if self.use_checkpointing and torch.is_grad_enabled():
                hidden_states = checkpoint(layer, hidden_states, use_reentrant=False)
            else:
                hidden_states = layer(hidden_states)
        return cast(Tensor, self.final_norm(hidden_states))

    def extend(self, input_ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Hidden states of new tokens [batch, new] that follow those of `state`, and the state after them.

        The entries of layer i's state have the prefix `layers.<i>.`. See `bsbr.interface.State`.
        """
        check_input_ids(input_ids)
        position = next_position(state)
        hidden_states = self._embed(input_ids, position)
        after: State = {"position": position_counter(position + input_ids.shape[1])}
        for index, layer in enumerate(self.layers):
            prefix = f"layers.{index}."
            before = None if state is None else {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
            hidden_states, layer_state = cast(TransformerLayer, layer).extend(hidden_states, before)
            after |= {prefix + key: tensor for key, tensor in layer_state.items()}
        return self.final_norm(hidden_states), after

    def _embed(self, input_ids: Tensor, start: int) -> Tensor:
        embedded: Tensor = self.embedding(input_ids) * self.embedding.embedding_dim**0.5
        if self.positions:
            embedded = embedded + sinusoids(embedded, start)
        return cast(Tensor, self.dropout(embedded))


class CausalLM(nn.Module):
    """Language model: next-token logits W h of a decoder's hidden states h.

    Args:
        model: the decoder.
        tied: whether W is the embedding matrix, and `head` None; otherwise `head` has a W of its own.
    """

    def __init__(self, model: TransformerModel, *, tied: bool = True) -> None:
        super().__init__()
        self.model = model
        vocab_size, hidden_dim = model.embedding.weight.shape
        # One parameter under two names would come apart in to_empty and load_state_dict(assign=True).
        self.head = None if tied else nn.Linear(hidden_dim, vocab_size, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [batch, time, vocab_size] of the token after each token; arguments as in `TransformerModel.forward`."""
        return self.logits(self.model(input_ids, attention_mask))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """W h: [..., hidden_dim] -> [..., vocab_size]."""
        return F.linear(hidden_states, self.model.embedding.weight if self.head is None else self.head.weight)

    def loss(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean of −log p(token t+1 | tokens ≤ t) in nats, over the real tokens that have a real token before them.

        Args:
            input_ids, attention_mask: see `TransformerModel.forward`.

        Raises:
            ValueError: if there is no such token.
        """
        check_input_ids(input_ids)
        if attention_mask is None:
            real = torch.ones_like(input_ids, dtype=torch.bool)
        else:
            real = token_mask(attention_mask, input_ids.shape)
        # In the packed rows the token before a token is its neighbour, whatever padding was between them.
        ids, _ = pack(input_ids, real)
        lengths = real.sum(dim=1, keepdim=True)
        has_target = torch.arange(1, ids.shape[1], device=ids.device) < lengths
        if not has_target.any():
            raise ValueError(f"the loss needs a sequence of at least 2 tokens, the longest has {int(lengths.max())}")
        logits = self(ids)[:, :-1]
        return F.cross_entropy(logits[has_target].to(torch.promote_types(logits.dtype, torch.float32)), ids[:, 1:][has_target])

    def extend(self, input_ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits [batch, new, vocab_size] for new tokens, and the state after them; see `TransformerModel.extend`."""
        hidden_states, state = self.model.extend(input_ids, state)
        return self.logits(hidden_states), state

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        state: State | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues each row of tokens. Rows have no padding; dropout follows train or eval mode.

        Args:
            input_ids: [batch, time].
            max_new_tokens: how many tokens to add.
            state: state of a prefix that input_ids continue, as `extend` returned it.
            temperature: 0 takes the most likely token; above 0, tokens are sampled from softmax(logits / temperature).
            top_k: number of most likely tokens to sample from; None for all.
            generator: random generator of the samples.

        Returns:
            The new tokens [batch, max_new_tokens].

        Raises:
            ValueError: for a temperature that is negative or not finite, or max_new_tokens or top_k below 1.
        """
        require_positive(max_new_tokens=max_new_tokens)
        if top_k is not None:
            require_positive(top_k=top_k)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be a finite number of at least 0 (0 is greedy), got {temperature}")
        tokens = input_ids
        generated = []
        for _ in range(max_new_tokens):
            logits, state = self.extend(tokens, state)
            tokens = _sample(logits[:, -1], temperature, top_k, generator)
            generated.append(tokens)
        return torch.cat(generated, dim=1)


class BSBRLayer(TransformerLayer):
    """A `TransformerLayer` over `BSBRAttention`.

    Args:
        hidden_dim, num_heads, ff_dim: see `TransformerLayer`.
        chunk_size: see `BSBRAttention`.
        dropout: dropout probability of attention weights and of the output of each sublayer.
        **options: further options of `BSBRAttention`.
    """

    def __init__(
        self, hidden_dim: int, num_heads: int, chunk_size: int, ff_dim: int, dropout: float = 0.0, **options: int | bool | None
    ) -> None:
        attention = partial(BSBRAttention, chunk_size=chunk_size, dropout=dropout, **options)  # type: ignore[arg-type]
        super().__init__(hidden_dim, num_heads, ff_dim, attention=attention, dropout=dropout)


class BSBRModel(TransformerModel):
    """A `TransformerModel` over `BSBRAttention`: token ids [batch, time] -> hidden states [batch, time, hidden_dim].

    Args:
        vocab_size, hidden_dim, num_layers, num_heads, ff_dim, conv_size, positions, use_checkpointing: see `TransformerModel`.
        chunk_size, compression_factor: see `BSBRAttention`.
        dropout: dropout probability of attention weights, embeddings and the output of each sublayer.
        **options: further options of `BSBRAttention`, such as chunk_overlap and retrieval_top_k.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        chunk_size: int,
        ff_dim: int,
        dropout: float = 0.0,
        compression_factor: int | None = None,
        *,
        conv_size: int | None = None,
        positions: bool = True,
        use_checkpointing: bool = False,
        **options: int | bool | None,
    ) -> None:
        super().__init__(
            vocab_size,
            hidden_dim,
            num_layers,
            num_heads,
            ff_dim,
            attention=partial(
                BSBRAttention,
                chunk_size=chunk_size,
                compression_factor=compression_factor,
                dropout=dropout,
                **options,  # type: ignore[arg-type]
            ),
            dropout=dropout,
            conv_size=conv_size,
            positions=positions,
            use_checkpointing=use_checkpointing,
        )


def sinusoids(like: Tensor, start: int = 0, *, base: float = 10_000.0) -> Tensor:
    """Sinusoidal positions: sin(p·base^(−2i/d)) for all i, then the cosines (arXiv:1706.03762, section 3.5).

    They are computed and not looked up, so there is no longest sequence.

    Args:
        like: [batch, time, hidden_dim = d], which gives sizes, dtype and device.
        start: p of row 0.
        base: base of the frequencies.

    Returns:
        [time, hidden_dim].
    """
    cos, sin = position_waves(like, start, base)
    return torch.cat([sin, cos], dim=-1)[:, : like.shape[2]]


def check_input_ids(input_ids: Tensor) -> None:
    """Raises ValueError unless input_ids is [batch, time >= 1] of integers."""
    if input_ids.dim() != 2 or input_ids.shape[1] < 1 or input_ids.is_floating_point():
        raise ValueError(f"input_ids must be integers [batch, time >= 1], got {input_ids.dtype} {list(input_ids.shape)}")


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token of each row [batch, 1] from logits [batch, vocab_size]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        worst_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The largest logit becomes 0, so that no quotient overflows; a smaller temperature than `tiny` rounds to 0.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    probabilities = torch.softmax(logits, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)
