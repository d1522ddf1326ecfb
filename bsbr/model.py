"""The one decoder that every comparison uses: pre-norm transformer layers over any `Attention`.

`BSBRLayer` and `BSBRModel` are that decoder with BSBR inside; `CausalLM` puts a language-model head on it.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bsbr.attention import BSBRAttention
from bsbr.convolution import ShortConvolution
from bsbr.interface import Attention, State, next_position, pack, position_counter, require_positive

BuildAttention = Callable[..., Attention]
"""Called as `build(hidden_dim=..., num_heads=...)` once a layer: a class, a `functools.partial` of one, or a lambda."""


class TransformerLayer(nn.Module):
    """x + dropout(attention(norm(x))), then x + dropout(feed_forward(norm(x))).

    hidden_states: [batch, time, hidden_dim], in and out, 0 at padding. ff_dim is the width inside the feed-forward part;
    conv_size, that of a `ShortConvolution` in front of the attention, None for none.
    Source: Vaswani 2017 (arXiv:1706.03762), with the norms in front as in Xiong 2020 (arXiv:2002.04745).
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
        if attention_mask is not None:
            packed, unpack = pack(hidden_states, attention_mask)
            return unpack(self(packed))
        normed = self.attention_norm(hidden_states)
        if self.convolution is not None:
            normed = self.convolution(normed)
        return self._feed_forward(hidden_states + self.dropout(self.attention(normed)))

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `Attention.extend`: the state is the attention's, and what the convolution needs of the tokens before."""
        normed, before = self.attention_norm(hidden_states), {}
        if self.convolution is not None:
            normed, before["convolved"] = self.convolution.extend(normed, None if state is None else state["convolved"])
        attended, after = self.attention.extend(normed, state)
        return self._feed_forward(hidden_states + self.dropout(attended)), {**after, **before}

    def _feed_forward(self, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states))))


class TransformerModel(nn.Module):
    """Token ids [batch, time] -> hidden states [batch, time, hidden_dim], causal, for sequences of any length.

    Sinusoidal positions are added to the embeddings (Vaswani 2017, section 3.5), computed for the length at
    hand: no table, no maximum. positions=False leaves them out, for attentions that bring their own.
    conv_size: see `TransformerLayer`.
    use_checkpointing=True recomputes each layer in the backward pass instead of keeping its activations.
    Padding is taken out once, here; see `bsbr.interface.pack`.
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
        """input_ids: [batch, time]; attention_mask: [batch, time], nonzero for a token. Outputs at padding are 0."""
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
        """Hidden states of new tokens [batch, new] that follow those `state` has seen, and the state after them.

        The state holds every layer's, under `layers.<i>.`; like theirs it is a value and can be saved.
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
    """Next-token logits over any `TransformerModel`: logits = W h, W the embedding itself where the head is tied.

    tied=False gives the head a weight of its own.
    """

    def __init__(self, model: TransformerModel, *, tied: bool = True) -> None:
        super().__init__()
        self.model = model
        vocab_size, hidden_dim = model.embedding.weight.shape
        self.head = nn.Linear(hidden_dim, vocab_size, bias=False)
        if tied:
            self.head.weight = model.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [batch, time, vocab_size] of the token after each."""
        return cast(Tensor, self.head(self.model(input_ids, attention_mask)))

    def loss(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean of −log p(token t+1 | tokens ≤ t) in nats over the real tokens that have a real token before them.

        Raises ValueError if there is no such token.
        """
        check_input_ids(input_ids)
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        # Packed, "the token before" is the neighbour, whatever padding stood between them.
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
        return self.head(hidden_states), state

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
        """Continues each row of input_ids [batch, time] by max_new_tokens: returns the new tokens [batch, max_new_tokens].

        temperature 0 takes the likeliest token; above, samples from softmax(logits / temperature), from the top_k
        likeliest only where given, with `generator`'s randomness. `state` is a prefix that input_ids continue, such as
        a long document read once by `extend`. Rows are taken as they are, without padding. Dropout follows train/eval mode.
        Raises ValueError for a negative temperature or a max_new_tokens or top_k below 1.
        """
        require_positive(max_new_tokens=max_new_tokens)
        if top_k is not None:
            require_positive(top_k=top_k)
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0 (0 is greedy), got {temperature}")
        tokens = input_ids
        generated = []
        for _ in range(max_new_tokens):
            logits, state = self.extend(tokens, state)
            tokens = _choose(logits[:, -1], temperature, top_k, generator)
            generated.append(tokens)
        return torch.cat(generated, dim=1)


class BSBRLayer(TransformerLayer):
    """A `TransformerLayer` over `BSBRAttention`; `options` are the attention's, `dropout` acts on weights and residuals."""

    def __init__(
        self, hidden_dim: int, num_heads: int, chunk_size: int, ff_dim: int, dropout: float = 0.0, **options: int | bool | None
    ) -> None:
        attention = partial(BSBRAttention, chunk_size=chunk_size, dropout=dropout, **options)  # type: ignore[arg-type]
        super().__init__(hidden_dim, num_heads, ff_dim, attention=attention, dropout=dropout)


class BSBRModel(TransformerModel):
    """A `TransformerModel` over `BSBRAttention`: token ids [batch, time] -> hidden states [batch, time, hidden_dim].

    chunk_size, compression_factor, chunk_overlap, retrieval_top_k and further `options` as in `BSBRAttention`;
    `dropout` acts on attention weights and residuals; the rest as in `TransformerModel`.
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
    """sin(p·base^(−2i/d)) and cos of the same, side by side: positions [time, hidden_dim] for rows start, start + 1, ….

    Vaswani 2017 (arXiv:1706.03762), section 3.5. `like` [batch, time, hidden_dim] gives size, type and device.
    """
    time, hidden_dim = like.shape[1:]
    dims = torch.arange(0, hidden_dim, 2, device=like.device, dtype=torch.float64)
    positions = torch.arange(start, start + time, device=like.device, dtype=torch.float64)
    angles = torch.outer(positions, base ** (-dims / hidden_dim))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :hidden_dim].to(like.dtype)


def check_input_ids(input_ids: Tensor) -> None:
    """Raises ValueError unless input_ids is [batch, time >= 1] of integers."""
    if input_ids.dim() != 2 or input_ids.shape[1] < 1 or input_ids.is_floating_point():
        raise ValueError(f"input_ids must be integers [batch, time >= 1], got {input_ids.dtype} {list(input_ids.shape)}")


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token a row [batch, 1] from logits [batch, vocab_size]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        worst_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)
