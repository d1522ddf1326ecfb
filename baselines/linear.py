"""Linear attention: a positive feature map replaces the softmax, so that one matrix holds the past.

Katharopoulos et al. 2020, "Transformers are RNNs", arXiv:2006.16236.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.kernels import fla, linear
from baselines.kernels.recurrent import RecurrentAttention, check_inputs, group_queries, to_chunks, ungroup_outputs
from bsbr.backends.selection import check_impl, select
from bsbr.precision import without_autocast

EPSILON = 1e-24
"""Added to the normaliser, so that a query with features of 0 (underflow) has output 0, not 0/0, and a finite gradient. It is small
beside the product of two features of −20."""


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int = 64, impl: str = "auto") -> Tensor:
    """Linear attention: S_t = S_{t-1} + φ(k_t) v_tᵀ,  z_t = z_{t-1} + φ(k_t),  o_t = φ(q_t)ᵀS_t / φ(q_t)ᵀz_t,  φ = elu + 1.

    This is arXiv:2006.16236, eq. 16-20.

    Args:
        q: [batch, heads, time, head_dim].
        k, v: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads; v may have another head_dim.
        chunk_size: tokens computed together; changes the speed, not the result.
        impl: "cpp", "torch", or "auto" for the first of them that supports the tensors.

    Returns:
        [batch, heads, time, head_dim of v] in the dtype of q; sums accumulate in float32 or better. Costs
        O(n·(chunk_size + head_dim)·head_dim) per head; holds no n×n tensor.

    Raises:
        ValueError: if the shapes do not fit, chunk_size is not a positive integer, or `impl` is unknown.
        NotImplementedError: if `impl` names a backend that does not support the tensors.
    """
    backend = select(check_impl(impl, "cpp"), {"cpp": partial(linear.KERNELS.unsupported, q, k, v)})
    return _attention_after(None, q, k, v, chunk_size, backend)[0]


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The recurrence of `linear_attention`, token by token, in float64."""
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


def _features(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1, as e^min(x, 0) + max(x, 0): elu(x) itself is −1 in float32 from x = −17 on, and the sum 0."""
    return x.clamp(max=0).exp() + x.relu()


def _attention_after(
    initial: Tensor | None, q: Tensor, k: Tensor, v: Tensor, chunk_size: int, backend: str
) -> tuple[Tensor, Tensor | None]:
    """`linear_attention` after the state `initial`, and the final state, which is None if `initial` is.

    A state is [batch, kv_heads, head_dim of k, head_dim of v + 1]: S, and z as its last column.
    """
    check_inputs(q, k, v, chunk_size)
    if initial is not None and initial.shape != (expected := (*k.shape[:2], k.shape[3], v.shape[3] + 1)):
        raise ValueError(f"the state must be {list(expected)} for these keys and values, got {list(initial.shape)}")
    outputs = (_cpp if backend == "cpp" else _chunkwise)(q, k, v, initial, chunk_size)
    return (outputs, None) if isinstance(outputs, Tensor) else (outputs[0], outputs[1])


@without_autocast
def _chunkwise(q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, chunk_size: int) -> linear.Outputs:
    """The output, and after a state `initial` the final state: all chunks at once."""
    time, kv_heads = k.shape[2], k.shape[1]
    size, group = min(chunk_size, time), q.shape[1] // kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    # Padding comes after φ, so that a padded key has no features at all.
    keys = to_chunks(_features(k.to(dtype)), size)
    # A column of ones in the values makes z the last column of S, and the normaliser the last column of the sums.
    values = to_chunks(F.pad(v.to(dtype), (0, 1), value=1.0), size)
    queries = group_queries(to_chunks(_features(q.to(dtype)), size), kv_heads)

    scores = (queries @ keys.mT).unflatten(3, (group, size)).tril().flatten(3, 4)
    sums = scores @ values
    if initial is not None or keys.shape[2] > 1:
        states = keys.mT @ values
        before = F.pad(states, (0, 0, 0, 0, 1, -1)).cumsum(2)
        if initial is not None:
            before = before + initial.unsqueeze(2)
        sums = sums + queries @ before
    out = _normalised(ungroup_outputs(sums, group, time)).to(q.dtype)
    return out if initial is None else (out, before[:, :, -1] + states[:, :, -1])


_cpp = linear.attention(_chunkwise, EPSILON)
"""`_chunkwise` in C++, chunk after chunk."""


def _normalised(sums: Tensor) -> Tensor:
    """Divides the sums over values by the normaliser in their last column."""
    return sums[..., :-1] / (sums[..., -1:] + EPSILON)


class LinearAttention(RecurrentAttention):
    """Linear attention layer: `linear_attention` between projections.

    rotary=True rotates q and k before φ. So weights stay positive, but they do not depend on positions through distance alone.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary, chunk_size, impl: as in `RecurrentAttention`.
    """

    backends = ("cpp",)

    @property
    def value_columns(self) -> int:
        return self.head_dim + 1  # S, then z

    def unsupported(self, backend: str, *tensors: Tensor) -> str | None:
        return linear.KERNELS.unsupported(*tensors) if backend == "cpp" else None

    def attend_after(self, total: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = tensors
        backend = self.select_backend(*tensors, *([] if total is None else [total]))
        if backend == "fla":
            return fla.linear_attention(_features(q), _features(k), v, EPSILON, total)
        return _attention_after(total, q, k, v, self.chunk_size, backend)

    @without_autocast
    def step(self, total: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = tensors
        keys, values = _features(k.to(total.dtype)), F.pad(v.to(total.dtype), (0, 1), value=1.0)
        total = torch.addcmul(total, keys.mT, values)
        queries = _features(q.to(total.dtype)).view(*k.shape[:2], q.shape[1] // k.shape[1], k.shape[3])
        sums = queries @ total
        return _normalised(sums).to(q.dtype).view(*q.shape[:3], v.shape[3]), total

    def reference(self, *tensors: Tensor) -> Tensor:
        return linear_attention_reference(*tensors)

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """FLOPs of the matrix products, with d = head_dim and one more value column for the normaliser.

        Per query head, 2d + 2(d + 1) for each causal pair inside a chunk and 2d(d + 1) for each token after the first chunk, which
        reads the state. Per key head, 2d(d + 1) for each token before the last chunk, which is added to the state.
        """
        size, dim = min(self.chunk_size, seq_len), self.head_dim
        full, rest = divmod(seq_len, size)
        pairs = full * size * (size + 1) // 2 + rest * (rest + 1) // 2
        written = seq_len - (rest or size)
        read = seq_len - size
        per_query_head = pairs * (4 * dim + 2) + read * 2 * dim * (dim + 1)
        return batch_size * (self.num_heads * per_query_head + self.num_kv_heads * written * 2 * dim * (dim + 1))
