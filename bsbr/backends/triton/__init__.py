"""`bsbr.bsbr_attention` in Triton kernels, forward and backward, for CUDA GPUs of compute capability 8.0 and above.

Importing this does not import triton; calling does. See `bsbr.backends.triton.tuning` for the tiles and whether they were measured.
"""

import importlib.util
import os

import torch
from torch import Tensor

MAX_HEAD_DIM = 256


def bsbr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    h: Tensor,
    *,
    chunk_size: int,
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    beta: Tensor | None = None,
    gain: Tensor | None = None,
    chunk_overlap: int = 0,
    top_k: int | None = None,
    normalise: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """O = softmax(QKᵀ/√d ⊙ M_in) V + g φ(Q) F̄, as `bsbr.bsbr_attention`, whose checks of shapes must have passed.

    Arguments and result as there, in float16, bfloat16 or float32, sums in float32; differentiable once in all tensors. Inputs
    may be views with any strides between rows. q_features and k_features come together or not at all: without them φ is
    `unit_norm`, made inside the kernels, or before them where there is a β. What β makes of V, and the norms of `normalise`, are
    torch's work, on tensors of chunks. Of a top_k, which chunks are kept is chosen by torch's stable sort.

    Forward traffic a head and token, in elements: K and V twice, Q once, o once, and F, F̄ written and read once each, 4·d_r·d /
    chunk_size. At d = d_r = 64 and chunk 128 that is 512 elements: 16 heads, n = 65536 and bfloat16 move 1.07 GB, of which 0.54
    are q, k, v and o themselves.

    Raises NotImplementedError with the sentence of `unsupported`.
    """
    reason = unsupported(q, k, v, r, h, q_features=q_features, k_features=k_features, gain=gain, dropout_p=dropout_p)
    if reason is not None:
        raise NotImplementedError(reason)
    from bsbr.backends.triton import function

    return function.bsbr(
        *(q, k, v, r, h),
        chunk_size=chunk_size,
        q_features=q_features,
        k_features=k_features,
        beta=beta,
        gain=gain,
        chunk_overlap=chunk_overlap,
        kept=top_k,
        normalise=normalise,
    )


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    h: Tensor,
    *,
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    gain: Tensor | None = None,
    dropout_p: float = 0.0,
) -> str | None:
    """Why the kernels cannot take these inputs, in a sentence; None if they can. Cheap: no triton is imported."""
    if importlib.util.find_spec("triton") is None:
        return "the kernels need triton, which is not installed: pip install 'bsbr[kernels]'"
    if dropout_p:
        return f"the kernels have no dropout, got dropout_p = {dropout_p}: use the plain path for training with it"
    if (q_features is None) != (k_features is None):
        return "the kernels take q_features and k_features together or not at all, got one of them"
    tensors = [x for x in (q, k, v, r, h, q_features, k_features) if x is not None]
    if {x.dtype for x in tensors} - {q.dtype} or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 or float32, the same for all but gain, got {[str(x.dtype) for x in tensors]}"
    devices = {x.device for x in tensors} | ({q.device} if gain is None else {gain.device})
    if len(devices) > 1:
        return f"the kernels take tensors of one device, got {sorted(map(str, devices))}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        if q.device.type != "cuda":
            return f"the kernels run on a CUDA GPU, got {q.device}; on a CPU only to check them, under TRITON_INTERPRET=1"
        if torch.cuda.get_device_capability(q.device) < (8, 0):
            return f"the kernels need compute capability 8.0 or above, {q.device} has {torch.cuda.get_device_capability(q.device)}"
    d_r = 0 if q_features is None else q_features.shape[-1]
    if max(q.shape[-1], d_r) > MAX_HEAD_DIM:
        return f"the kernels take a head_dim and d_r of at most {MAX_HEAD_DIM}, got {q.shape[-1]} and {d_r or q.shape[-1]}"
    return None
