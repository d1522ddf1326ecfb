"""Ring attention (Liu 2023): exact softmax attention over a sequence that is cut across ranks, keys and values going round.

On one rank it is standard attention.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.standard import StandardAttention
from bsbr.process_group import SequenceGroup


def ring_attention(q: Tensor, k: Tensor, v: Tensor, *, group: SequenceGroup, lengths: Sequence[int]) -> Tensor:
    """softmax(q kᵀ/√d + causal) v of the concatenation in time of all ranks' arguments: this rank's stretch of it.

    arXiv:2310.01889, section 3: in each of P steps a rank attends to one stretch of keys and values, merges the result by
    the softmax's own denominators (log-sum-exp), and hands the stretch on to the next rank. Stretches that lie in a
    rank's future are handed on only, so that of a causal sequence the last rank has the most to do.

    q: [batch, heads, time, head_dim]; k, v: [batch, kv_heads, time, head_dim], of this rank's stretch; lengths: all ranks'.
    Returns the shape of q. Without gradients. Sent: see `bsbr.process_group.ring_sent_bytes`.
    Raises NotImplementedError where a gradient is asked for.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        raise NotImplementedError("ring attention is a forward pass only here: call it under torch.no_grad()")
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    merged, logarithm = _attend(q, k, v, causal=True)
    held = [k.contiguous(), v.contiguous()]
    for step in range(1, group.size):
        source = (group.rank - step) % group.size
        arriving = [tensor.new_empty(*tensor.shape[:2], lengths[source], tensor.shape[3]) for tensor in held]
        group.exchange({after: held}, {before: arriving})
        held = arriving
        if source < group.rank:
            attended, another = _attend(q, *held, causal=False)
            total = torch.logaddexp(logarithm, another)
            merged = merged * (logarithm - total).exp().unsqueeze(-1) + attended * (another - total).exp().unsqueeze(-1)
            logarithm = total
    return merged.to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ/√d) v and the log-sum-exp of its scores [batch, heads, time], by torch's kernels, which have no public name."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if q.device.type == "cpu":
        attended, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    else:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
        attended, logarithm = found[0], found[1][:, :, : q.shape[2]]  # whose rows are padded
    wide = torch.promote_types(q.dtype, torch.float32)
    return attended.to(wide), logarithm.to(wide)


class RingAttention(StandardAttention):
    """Standard attention, and `ring_attention` where its sequence is cut across group."""

    def context_parallel_forward(self, hidden_states: Tensor, group: SequenceGroup) -> Tensor:
        """See `Attention.context_parallel_forward`. Without gradients, and without dropout."""
        lengths = group.shard_lengths(hidden_states.shape[1], hidden_states.device)
        q, k, v = self.project(hidden_states, sum(lengths[: group.rank]))
        return self.output(ring_attention(q, k, v, group=group, lengths=lengths))
