"""Linear attention: softmax replaced by a positive feature map, so that the past is one matrix.

Katharopoulos et al. 2020, "Transformers are RNNs", arXiv:2006.16236.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.kernels import fla
from bsbr.interface import (
    MultiHeadAttention,
    State,
    check_heads,
    check_hidden_states,
    next_position,
    position_counter,
    require_positive,
)

EPSILON = 1e-12
"""Added to the normaliser: a query whose features all underflow reads 0, not 0/0, and its gradient stays finite."""


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int = 64) -> Tensor:
    """o_t = φ(q_t)ᵀS_t / φ(q_t)ᵀz_t,  S_t = S_{t-1} + φ(k_t) v_tᵀ,  z_t = z_{t-1} + φ(k_t),  φ = elu + 1.

    q: [batch, heads, time, head_dim]; k, v: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads.
    Returns the shape and dtype of q; sums accumulate in float32 or better. Computed in chunks, quadratic inside
    and through the running sum of chunk states across: O(n·(chunk_size + head_dim)·head_dim), no n×n tensor.
    Raises ValueError if the shapes do not fit or chunk_size is no positive integer. arXiv:2006.16236, eq. 16-20.
    """
    return _chunked(q, k, v, chunk_size, None)[0]


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The recurrence of `linear_attention`, one token after another, in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, dim=1), v.double().repeat_interleave(group, dim=1)
    features_q = torch.where(q > 0, q + 1, q.clamp(max=0).exp())
    features_k = torch.where(k > 0, k + 1, k.clamp(max=0).exp())
    total = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    normaliser = q.new_zeros(*q.shape[:2], q.shape[3])
    outputs = []
    for t in range(q.shape[2]):
        total = total + torch.einsum("bhd,bhe->bhde", features_k[:, :, t], v[:, :, t])
        normaliser = normaliser + features_k[:, :, t]
        numerator = torch.einsum("bhd,bhde->bhe", features_q[:, :, t], total)
        outputs.append(numerator / ((features_q[:, :, t] * normaliser).sum(-1, keepdim=True) + EPSILON))
    return torch.stack(outputs, dim=2)


def _chunked(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`linear_attention` after a state, and the state after it.

    A state is [batch, kv_heads, head_dim, head_dim + 1]: S, and z as its last column. From no state, and where
    nobody reads one because all is a single chunk, none comes back.
    """
    check_heads(q, k, v)
    require_positive(chunk_size=chunk_size)
    time, kv_heads = k.shape[2], k.shape[1]
    if q.shape[2] != time:
        raise ValueError(
            f"q must have as many positions as k and v, got {q.shape[2]} and {time}: to go on from a prefix, use extend"
        )
    size, group = min(chunk_size, time), q.shape[1] // kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)

    # Padding comes after φ, so that a padded key has no features at all.
    keys = _chunks(F.elu(k.to(dtype)) + 1, size)
    # With a column of ones as values, z and the normaliser are one more column of S and of the output.
    values = _chunks(F.pad(v.to(dtype), (0, 1), value=1.0), size)
    # The queries that share a key stand below each other, which spares copies of the keys.
    queries = _chunks(F.elu(q.to(dtype)) + 1, size).unflatten(1, (kv_heads, group)).transpose(2, 3).flatten(3, 4)

    scores = (queries @ keys.mT).unflatten(3, (group, size)).tril().flatten(3, 4)
    sums = scores @ values
    final = None
    if initial is not None or keys.shape[2] > 1:
        states = keys.mT @ values
        before = F.pad(states, (0, 0, 0, 0, 1, -1)).cumsum(2)
        if initial is not None:
            before = before + initial.unsqueeze(2)
        sums = sums + queries @ before
        final = before[:, :, -1] + states[:, :, -1]
    sums = sums.unflatten(3, (group, size)).transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :, :time]
    return (sums[..., :-1] / (sums[..., -1:] + EPSILON)).to(q.dtype), final


def _step(q: Tensor, k: Tensor, v: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """`_chunked` for a single token, by the recurrence itself."""
    keys, values = F.elu(k.to(total.dtype)) + 1, F.pad(v.to(total.dtype), (0, 1), value=1.0)
    total = torch.addcmul(total, keys.mT, values)
    sums = (F.elu(q.to(total.dtype)) + 1).view(*k.shape[:2], -1, k.shape[3]) @ total
    return (sums[..., :-1] / (sums[..., -1:] + EPSILON)).to(q.dtype).view(*q.shape[:3], v.shape[3]), total


def _chunks(x: Tensor, size: int) -> Tensor:
    """[batch, heads, time, dim] -> [batch, heads, chunks, size, dim], contiguous, zeros behind the last token."""
    missing = -x.shape[2] % size
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    return padded.reshape(*x.shape[:2], -1, size, x.shape[3]).contiguous()


class LinearAttention(MultiHeadAttention):
    """`linear_attention` with projections. Its state is S and z, whatever the context: decoding costs O(head_dim²) a token.

    rotary=True turns q and k before φ, which keeps the weights positive but makes them no function of distance alone.
    impl: "torch", or "fla" for the kernel of flash-linear-attention, which needs CUDA; a single token is few enough
    operations to need none.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        chunk_size: int = 64,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        impl: str = "torch",
    ) -> None:
        super().__init__(hidden_dim, num_heads, num_kv_heads=num_kv_heads, rotary=rotary)
        require_positive(chunk_size=chunk_size)
        self.chunk_size = chunk_size
        self.impl = fla.checked(impl)

    @property
    def block_length(self) -> int:
        return self.chunk_size

    def implementation(self, *_: Tensor) -> str:
        return self.impl

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        if self.impl == "fla":
            return fla.linear_attention(q, k, v, EPSILON)[0]
        return linear_attention(q, k, v, chunk_size=self.chunk_size)

    def reference(self, *tensors: Tensor) -> Tensor:
        return linear_attention_reference(*tensors)

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_hidden_states(hidden_states, self.hidden_dim)
        position = next_position(state)
        q, k, v = self.project(hidden_states, position)
        if state is None:
            total = q.new_zeros(
                q.shape[0], self.num_kv_heads, self.head_dim, self.head_dim + 1, dtype=torch.promote_types(q.dtype, torch.float32)
            )
        else:
            total = state["total"]
        final: Tensor | None
        if q.shape[2] == 1:
            attended, final = _step(q, k, v, total)
        elif self.impl == "fla":
            attended, final = fla.linear_attention(q, k, v, EPSILON, total)
        else:
            attended, final = _chunked(q, k, v, self.chunk_size, total)
        assert final is not None
        return self.output(attended), {"total": final, "position": position_counter(position + hidden_states.shape[1])}

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """Per head: the causal pairs of each chunk, 2d + 2(d + 1) a pair; the state behind each chunk but the last and
        the reading of it from each chunk but the first, 2d(d + 1) a token. The 1 beside d is the normaliser."""
        size, dim = min(self.chunk_size, seq_len), self.head_dim
        full, rest = divmod(seq_len, size)
        pairs = full * size * (size + 1) // 2 + rest * (rest + 1) // 2
        written = seq_len - (rest or size)
        read = seq_len - size
        per_query_head = pairs * (4 * dim + 2) + read * 2 * dim * (dim + 1)
        return batch_size * (self.num_heads * per_query_head + self.num_kv_heads * written * 2 * dim * (dim + 1))

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        """S and z, in float32 or better whatever the parameters are in."""
        itemsize = torch.promote_types(self.dtype, torch.float32).itemsize
        return batch_size * self.num_kv_heads * self.head_dim * (self.head_dim + 1) * itemsize
