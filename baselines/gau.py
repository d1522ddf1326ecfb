"""Gated attention unit with mixed-chunk attention (FLASH): one gated head, quadratic within a chunk and linear across chunks.

Hua et al. 2022, "Transformer Quality in Linear Time", arXiv:2202.10447.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.kernels import gau
from bsbr.backends.selection import check_impl, select
from bsbr.interface import Attention, State, check_hidden_states, next_position, position_counter, require_positive, rotate
from bsbr.precision import without_autocast


def gated_attention_unit(
    u: Tensor, v: Tensor, quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, *, chunk_size: int = 256, impl: str = "auto"
) -> Tensor:
    """Mixed-chunk attention: o_t = u_t ⊙ (Σ_s relu(quad_q_t·quad_k_s / c)² v_s + (1/p) Σ_r (lin_q_t·lin_k_r) v_r).

    s runs over the tokens of t's chunk up to t, and r over the p tokens of all earlier chunks; in the first chunk their term is 0.
    c is chunk_size, also in an incomplete chunk: otherwise earlier outputs would change as the chunk fills. This is
    arXiv:2202.10447, sec. 3.2. The second term is a mean, as in the causal branch of the paper's code, so it does not grow with n.
    The paper's relative position bias is left out: positions come from the decoder or from rotary.

    Args:
        u: [batch, time, value_dim], the gate.
        v: [batch, time, value_dim].
        quad_q, quad_k: [batch, time, key_dim], of the quadratic term.
        lin_q, lin_k: [batch, time, key_dim], of the linear term.
        chunk_size: tokens of a chunk; changes the result.
        impl: "cpp", "torch", or "auto" for C++ where it supports the tensors.

    Returns:
        [batch, time, value_dim] in the dtype of u; sums accumulate in float32 or better. Costs
        O(n·(chunk_size + key_dim)·(key_dim + value_dim)); holds no n×n tensor.

    Raises:
        ValueError: if the shapes do not fit, chunk_size is not a positive integer, or impl is unknown.
        NotImplementedError: if impl="cpp" does not support the tensors.
    """
    backend = select(check_impl(impl, "cpp"), {"cpp": partial(gau.KERNELS.unsupported, u, v, quad_q, quad_k, lin_q, lin_k)})
    return _mixed_chunks(backend, u, v, quad_q, quad_k, lin_q, lin_k, None, chunk_size, 0)[0]


def gated_attention_unit_reference(
    u: Tensor, v: Tensor, quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, *, chunk_size: int = 256
) -> Tensor:
    """`gated_attention_unit` in float64, chunk by chunk, with every pair's weight written out."""
    u, v, quad_q, quad_k, lin_q, lin_k = (x.double() for x in (u, v, quad_q, quad_k, lin_q, lin_k))
    outputs = []
    for border in range(0, u.shape[1], chunk_size):
        chunk = slice(border, border + chunk_size)
        near = (torch.einsum("btd,bsd->bts", quad_q[:, chunk], quad_k[:, chunk]) / chunk_size).clamp(min=0) ** 2
        t = torch.arange(near.shape[1], device=u.device)
        near = near.where(t[None, :] <= t[:, None], 0.0)
        attended = torch.einsum("bts,bse->bte", near, v[:, chunk])
        if border:
            far = torch.einsum("btd,bsd->bts", lin_q[:, chunk], lin_k[:, :border]) / border
            attended = attended + torch.einsum("bts,bse->bte", far, v[:, :border])
        outputs.append(u[:, chunk] * attended)
    return torch.cat(outputs, dim=1)


def _mixed_chunks(
    backend: str,
    u: Tensor,
    v: Tensor,
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    past: Tensor | None,
    chunk_size: int,
    chunks_before: int,
) -> tuple[Tensor, Tensor | None]:
    """`gated_attention_unit` of tokens that begin at a chunk boundary, and Σ lin_k vᵀ over all complete chunks.

    Args:
        backend: "cpp" or "torch".
        u, v: [batch, time, value_dim].
        quad_q, quad_k, lin_q, lin_k: [batch, time, key_dim].
        past: [batch, key_dim, value_dim], Σ lin_k vᵀ over earlier chunks; None at the start of a sequence.
        chunk_size: tokens of a chunk.
        chunks_before: number of earlier chunks.

    Returns:
        [batch, time, value_dim] in the dtype of u, and the new past, which is None if `past` is None.
    """
    if u.dim() != 3 or u.shape != v.shape or u.shape[1] < 1:
        raise ValueError(f"u and v must both be [batch, time >= 1, value_dim], got u {list(u.shape)}, v {list(v.shape)}")
    shapes = [list(x.shape) for x in (quad_q, quad_k, lin_q, lin_k)]
    if quad_q.dim() != 3 or quad_q.shape[:2] != u.shape[:2] or shapes != [shapes[0]] * 4:
        raise ValueError(
            "quad_q, quad_k, lin_q and lin_k must all be [batch, time, key_dim] with the batch and time of u, "
            f"got {shapes} and u {list(u.shape)}"
        )
    require_positive(chunk_size=chunk_size)
    if past is not None and past.shape != (expected := (u.shape[0], quad_q.shape[2], u.shape[2])):
        raise ValueError(f"the state must be [batch, key_dim, value_dim] = {list(expected)}, got {list(past.shape)}")
    tensors = u, v, quad_q, quad_k, lin_q, lin_k, past
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None)
    outputs = (_CPP if backend == "cpp" else _all_chunks)(*tensors, chunk_size, chunks_before, differentiated)
    return (outputs, None) if isinstance(outputs, Tensor) else (outputs[0], outputs[1])


@without_autocast
def _all_chunks(
    u: Tensor,
    v: Tensor,
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    past: Tensor | None,
    chunk_size: int,
    chunks_before: int,
    _: bool,
) -> gau.Outputs:
    """`_mixed_chunks` by torch operations, all chunks at once: the output, and with a state `past` the new one."""
    time, size = v.shape[1], min(chunk_size, v.shape[1])
    dtype = torch.promote_types(v.dtype, torch.float32)
    v, quad_q, quad_k, lin_q, lin_k = (_to_chunks(x.to(dtype), size) for x in (v, quad_q, quad_k, lin_q, lin_k))
    attended = _quadratic_term(quad_q, quad_k, v, chunk_size)
    chunks = v.shape[1]
    final = None
    if past is not None or chunks > 1:
        written = lin_k.mT @ v
        # The extra columns keep the stride over chunks from being a power of two, with which every addition of cumsum misses
        # the cache: five times slower.
        before = F.pad(written.flatten(2), (0, 16, 1, -1)).cumsum(1)[..., :-16].view_as(written)
        if past is not None:
            before = before + past.unsqueeze(1)
        tokens_before = torch.arange(chunks_before, chunks_before + chunks, device=v.device, dtype=dtype) * chunk_size
        attended = attended + (lin_q / tokens_before.clamp(min=1).view(-1, 1, 1)) @ before
        final = before[:, -1] + written[:, -1] if time % chunk_size == 0 else before[:, -1].clone()
    out = (u * attended.flatten(1, 2)[:, :time]).to(u.dtype)
    return out if past is None or final is None else (out, final)


_CPP = gau.attention(_all_chunks)
"""`_all_chunks` in C++, chunk after chunk."""


@without_autocast
def _open_chunk(
    u: Tensor,
    v: Tensor,
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    chunk_size: int,
    past: Tensor,
    chunks_before: int,
) -> tuple[Tensor, Tensor]:
    """`_mixed_chunks` of the last tokens of a chunk, of which v, quad_k and lin_k hold all tokens so far.

    Nothing is padded, so that a single token stays cheap.
    """
    dtype = past.dtype
    v, quad_q, quad_k, lin_q, lin_k = (x.to(dtype) for x in (v, quad_q, quad_k, lin_q, lin_k))
    attended = _quadratic_term(quad_q, quad_k, v, chunk_size) + lin_q @ past / max(chunks_before * chunk_size, 1)
    if v.shape[1] == chunk_size:
        past = past + lin_k.mT @ v
    return (u * attended).to(u.dtype), past


def _quadratic_term(quad_q: Tensor, quad_k: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    """Σ_s relu(quad_q_t·quad_k_s / c)² v_s over a chunk, for queries at the last positions of the keys: [..., new, value_dim].

    quad_q: [..., new, key_dim]; quad_k: [..., all, key_dim]; v: [..., all, value_dim].
    """
    scores = (quad_q @ quad_k.mT).tril(quad_k.shape[-2] - quad_q.shape[-2])
    return (scores / chunk_size).relu().square() @ v


def _to_chunks(x: Tensor, size: int) -> Tensor:
    """[batch, time, dim] -> [batch, chunks, size, dim], with zeros after the last token."""
    chunks = -(-x.shape[1] // size)
    missing = chunks * size - x.shape[1]
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    return padded.reshape(x.shape[0], chunks, size, x.shape[2])


class GatedAttentionUnit(Attention):
    """Gated attention unit: u, v, z = SiLU(x W); four scales and offsets of z give the queries and keys of `gated_attention_unit`.

    The layer has a single head by design; the gate compensates for that. In the paper it replaces both attention and feed-forward,
    hence about 3·hidden_dim·value_dim parameters. The decoding state is Σ lin_k vᵀ of the complete chunks, and the keys and
    values of the incomplete one.

    Args:
        hidden_dim: width of the layer.
        num_heads: not used; part of the contract of `Attention`.
        chunk_size: as in `gated_attention_unit`.
        key_dim: width of queries and keys (the paper's s).
        value_dim: width of values and gate (the paper's e); None for 2·hidden_dim.
        rotary: whether all queries and keys are rotated by their positions, as in the paper.
        impl: see `Attention`.

    Raises:
        ValueError: if a size is not a positive integer, or key_dim is odd with rotary.
    """

    backends = ("cpp",)
    bounded_state = True

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        chunk_size: int = 256,
        key_dim: int = 128,
        value_dim: int | None = None,
        rotary: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(hidden_dim, num_heads, impl=impl)
        value_dim = 2 * hidden_dim if value_dim is None else value_dim
        require_positive(chunk_size=chunk_size, key_dim=key_dim, value_dim=value_dim)
        if rotary and key_dim % 2:
            raise ValueError(f"rotary=True needs an even key_dim, got {key_dim}")
        self.chunk_size, self.key_dim, self.value_dim, self.rotary = chunk_size, key_dim, value_dim, rotary
        self.u_proj = nn.Linear(hidden_dim, value_dim, bias=False)
        self.v_proj = nn.Linear(hidden_dim, value_dim, bias=False)
        self.z_proj = nn.Linear(hidden_dim, key_dim, bias=False)
        # The paper draws from N(0, 0.02²). Without its position bias, scores would then be about 1e-12 after squaring, with
        # gradients too small to leave that range; so the scales begin at 1.
        self.scale = nn.Parameter(torch.ones(4, key_dim))
        self.offset = nn.Parameter(torch.zeros(4, key_dim))
        self.out_proj = nn.Linear(value_dim, hidden_dim, bias=False)

    @property
    def block_length(self) -> int:
        return self.chunk_size

    def unsupported(self, backend: str, *tensors: Tensor) -> str | None:
        return gau.KERNELS.unsupported(*tensors) if backend == "cpp" else None

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        # In place where autograd does not need the projections: no second tensor of each is written.
        in_place = not torch.is_grad_enabled()
        u, v, z = (F.silu(projection(hidden_states), in_place) for projection in (self.u_proj, self.v_proj, self.z_proj))
        heads = [torch.addcmul(offset, z, scale) for scale, offset in zip(self.scale, self.offset, strict=True)]
        if self.rotary:
            heads = [rotate(head, start) for head in heads]
        return u, v, *heads

    def attend(self, *tensors: Tensor) -> Tensor:
        u, v, quad_q, quad_k, lin_q, lin_k = tensors
        backend = self.select_backend(*tensors)
        return _mixed_chunks(backend, u, v, quad_q, quad_k, lin_q, lin_k, None, self.chunk_size, 0)[0]

    def reference(self, *tensors: Tensor) -> Tensor:
        u, v, quad_q, quad_k, lin_q, lin_k = tensors
        return gated_attention_unit_reference(u, v, quad_q, quad_k, lin_q, lin_k, chunk_size=self.chunk_size)

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_hidden_states(hidden_states, self.hidden_dim)
        position, new = next_position(state), hidden_states.shape[1]
        u, v, quad_q, quad_k, lin_q, lin_k = self.project(hidden_states, position)
        past: Tensor | None
        if state is None:
            dtype = torch.promote_types(u.dtype, torch.float32)
            past = u.new_zeros(u.shape[0], self.key_dim, self.value_dim, dtype=dtype)
        else:
            past = state["past"]
            v, quad_k, lin_k = (torch.cat([state[name], x], dim=1) for name, x in (("v", v), ("quad_k", quad_k), ("lin_k", lin_k)))
        size, (chunks_before, open_tokens) = self.chunk_size, divmod(position, self.chunk_size)
        pieces = []
        # First the tokens of the open chunk, or a single token, then the chunks after it.
        head = 1 if new == 1 else min(new, -position % size)
        if head:
            chunk = u[:, :head], v[:, :size], quad_q[:, :head], quad_k[:, :size], lin_q[:, :head], lin_k[:, :size]
            gated, past = _open_chunk(*chunk, size, past, chunks_before)
            pieces.append(gated)
        if head < new:
            first = open_tokens + head  # of v, quad_k and lin_k
            chunks = u[:, head:], v[:, first:], quad_q[:, head:], quad_k[:, first:], lin_q[:, head:], lin_k[:, first:]
            gated, past = _mixed_chunks(self.select_backend(*chunks, past), *chunks, past, size, chunks_before + bool(head))
            pieces.append(gated)
        completed = (open_tokens + new) // size * size
        open_chunk = {"v": v, "quad_k": quad_k, "lin_k": lin_k}
        if completed:
            # Copies, so that a state holds no more than it needs.
            open_chunk = {name: x[:, completed:].clone() for name, x in open_chunk.items()}
        assert past is not None
        gated = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return self.output(gated), {"past": past, **open_chunk, "position": position_counter(position + new)}

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """FLOPs of the matrix products.

        A causal pair inside a chunk costs 2(key_dim + value_dim). Adding a token to Σ lin_k vᵀ (all chunks but the last) and
        reading Σ lin_k vᵀ by a token (all chunks but the first) cost 2·key_dim·value_dim each.
        """
        size = min(self.chunk_size, seq_len)
        full, rest = divmod(seq_len, size)
        pairs = full * size * (size + 1) // 2 + rest * (rest + 1) // 2
        written, read = seq_len - (rest or size), seq_len - size
        return batch_size * 2 * (pairs * (self.key_dim + self.value_dim) + (written + read) * self.key_dim * self.value_dim)

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        """Bytes of Σ lin_k vᵀ, in float32 or better, and of the open chunk's v, quad_k and lin_k, in the parameters' dtype."""
        past = self.key_dim * self.value_dim * torch.promote_types(self.dtype, torch.float32).itemsize
        open_chunk = seq_len % self.chunk_size * (2 * self.key_dim + self.value_dim) * self.dtype.itemsize
        return batch_size * (past + open_chunk)
