"""BSBR in Triton kernels, forward and backward, for CUDA GPUs of compute capability 8.0 and above.

Importing this package does not import triton; calling `attend` does. `tuning` has the tile sizes of the kernels.
"""

import importlib.util
import os

import torch
from torch import Tensor

from bsbr.inputs import BSBRInputs, BSBROptions

MAX_HEAD_DIM = 256


def attend(inputs: BSBRInputs, options: BSBROptions) -> Tensor:
    """O = softmax(QKᵀ/√d ⊙ M_in) V + g φ(Q) F̄ of a whole sequence; see `bsbr.bsbr_attention`.

    Sums are in float32. The default φ, the unit norm, is computed inside the kernels, or before them if there is a β.
    Pseudo-values (from β), the normalisation of F̄ and the selection of the top_k chunks (a stable sort) are torch operations on
    tensors of chunks.

    Forward memory traffic per head and token, in elements: K and V are read twice, Q once, and o is written once, together 6·d;
    F and F̄ are written and read once each, together 4·d_r·d / chunk_size. With d = d_r = 64 and chunk_size = 128 that is 512
    elements: 16 heads and n = 65536 in bfloat16 move 1.07 GB, of which q, k, v and o are 0.54.

    Args:
        inputs: float16, bfloat16 or float32 tensors whose shapes were checked; they may be views with any strides between rows.
        options: see `BSBROptions`; dropout_p must be 0.

    Returns:
        [batch, heads, time, head_dim], differentiable once in all tensors.

    Raises:
        NotImplementedError: if the kernels do not support the inputs, with the reason from `unsupported`.
    """
    reason = unsupported(inputs, options)
    if reason is not None:
        raise NotImplementedError(reason)
    from bsbr.backends.triton import function  # late, because it imports triton

    return function.attend(inputs, options)


def unsupported(inputs: BSBRInputs, options: BSBROptions) -> str | None:
    """Why the kernels cannot take these inputs, as a sentence; None if they can. Does not import triton."""
    if importlib.util.find_spec("triton") is None:
        return "the kernels need triton, which is not installed: pip install 'bsbr[kernels]'"
    if options.dropout_p:
        return f"the kernels have no dropout, got dropout_p = {options.dropout_p}: use the torch backend for training with it"
    if (inputs.q_features is None) != (inputs.k_features is None):
        return "the kernels take q_features and k_features together or not at all, got one of them"
    q, gain = inputs.q, inputs.gain
    tensors = inputs._replace(beta=None, gain=None).tensors()
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
    d_r = 0 if inputs.q_features is None else inputs.q_features.shape[-1]
    if max(q.shape[-1], d_r) > MAX_HEAD_DIM:
        return f"the kernels take a head_dim and d_r of at most {MAX_HEAD_DIM}, got {q.shape[-1]} and {d_r or q.shape[-1]}"
    return None
