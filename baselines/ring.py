"""Ring attention: exact softmax attention over a sequence that is sharded across ranks, which pass keys and values in a ring.

Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv:2310.01889. On one rank it is
standard attention.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.kernels.merged_softmax import attention_with_lse
from baselines.standard import StandardAttention
from bsbr.process_group import SequenceGroup


def ring_attention(q: Tensor, k: Tensor, v: Tensor, *, group: SequenceGroup, lengths: Sequence[int]) -> Tensor:
    """Context-parallel softmax attention: this rank's shard of softmax(q kᵀ/√d + causal) v over all ranks' shards in time.

    In each of P steps a rank attends to one shard of keys and values, merges the result by log-sum-exp, and sends the shard to the
    next rank (arXiv:2310.01889, sec. 3). A rank only passes on shards of its future, so in a causal sequence the last rank
    computes the most. Bytes sent: `bsbr.process_group.ring_sent_bytes`.

    Args:
        q: [batch, heads, time, head_dim], this rank's shard.
        k, v: [batch, kv_heads, time, head_dim], this rank's shard.
        group: the ranks that share the sequence.
        lengths: tokens of each rank's shard.

    Returns:
        [batch, heads, time, head_dim] in the dtype of q.

    Raises:
        NotImplementedError: if a gradient is required; there is only a forward pass.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        raise NotImplementedError("ring attention is a forward pass only here: call it under torch.no_grad()")
    next_rank, previous_rank = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    wide = torch.promote_types(q.dtype, torch.float32)
    merged, lse = (x.to(wide) for x in attention_with_lse(q, k, v, is_causal=True))
    shard = [k.contiguous(), v.contiguous()]
    for step in range(1, group.size):
        source = (group.rank - step) % group.size
        received = [tensor.new_empty(*tensor.shape[:2], lengths[source], tensor.shape[3]) for tensor in shard]
        group.exchange({next_rank: shard}, {previous_rank: received})
        shard = received
        if source < group.rank:
            attended, shard_lse = (x.to(wide) for x in attention_with_lse(q, *shard, is_causal=False))
            merged_lse = torch.logaddexp(lse, shard_lse)
            merged = merged * (lse - merged_lse).exp() + attended * (shard_lse - merged_lse).exp()
            lse = merged_lse
    return merged.to(q.dtype)


class RingAttention(StandardAttention):
    """Standard attention; over a sequence that is sharded across ranks, `ring_attention`."""

    def context_parallel_forward(self, hidden_states: Tensor, group: SequenceGroup) -> Tensor:
        """See `Attention.context_parallel_forward`; without dropout. Raises NotImplementedError if a gradient is required."""
        lengths = group.shard_lengths(hidden_states.shape[1], hidden_states.device)
        q, k, v = self.project(hidden_states, sum(lengths[: group.rank]))
        return self.output(ring_attention(q, k, v, group=group, lengths=lengths))
