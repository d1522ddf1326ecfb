"""Attentions with the mistakes that people really make, and some that cheat: each is a correct one with a single thing changed.

They keep the reference of the correct one, and all but the last few are right in everything else. The set of checks that each must
fail (see test_certify.py) therefore shows whether a check fails for its own cause.
"""

import gc
import os
import threading
import traceback
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.delta_net import DeltaNetAttention, delta_rule
from baselines.linear import LinearAttention
from baselines.sliding_window import (
    SlidingWindowAttention,
    sliding_window_attention,
    sliding_window_attention_reference,
)
from baselines.standard import StandardAttention, softmax_attention
from bsbr.attention import BSBRAttention
from bsbr.backends.pytorch import chunk_states, local_attention, read_out
from bsbr.backends.retrieval import retrieve
from bsbr.inputs import ChunkMemory, TokenInputs
from bsbr.interface import MultiHeadAttention, State, merge_heads, split_heads

# --- mistakes of causality ------------------------------------------------------------------------


class TriuForTril(StandardAttention):
    """A token sees itself and all later tokens."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        # Causal attention in reversed time is what `triu` gives, without an n×n mask.
        backwards = (x[:, :, -q.shape[2] :].flip(2) for x in (q, k, v))
        return softmax_attention(*backwards).flip(2)


class ReshapedHeads(StandardAttention):
    """[batch, time, heads · dim] is reshaped to [batch, heads, time, dim] without the transpose."""

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        def split(x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], self.num_heads, x.shape[1], self.head_dim)

        return split(self.q_proj(hidden_states)), split(self.k_proj(hidden_states)), split(self.v_proj(hidden_states))


class RetrievesOwnChunk(BSBRAttention):
    """The mask over chunks is lower triangular instead of strictly lower triangular."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v, r, h, q_features, k_features, beta = tensors
        local = local_attention(q, k, v, chunk_size=self.chunk_size)
        states = chunk_states(k_features, v, self.chunk_size, h.shape[2], beta)
        return local + read_out(q_features, retrieve(r, ChunkMemory([h], [states]), first=1, normalise=True), self.chunk_size)


class MetaQueryFromLastToken(BSBRAttention):
    """The meta query of a chunk is projected from its last token."""

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q, k, v, _, *rest = super().project(hidden_states, start)
        time, size = hidden_states.shape[1], self.chunk_size
        last = [min(first + size, time) - 1 for first in range(0, time, size)]
        return q, k, v, self._meta_query(hidden_states[:, last]), *rest


class DividedByLength(LinearAttention):
    """Every output is divided by the length of the whole sequence, which depends on later tokens."""

    def attend(self, *tensors: Tensor) -> Tensor:
        return super().attend(*tensors) / tensors[0].shape[2]


# --- padding and batch ----------------------------------------------------------------------------


class PaddingIgnored(StandardAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states)


class PaddingZeroed(StandardAttention):
    """Padded inputs are set to zero but remain tokens: they take their share of every softmax."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            return super().forward(hidden_states)
        real = attention_mask.bool()[:, :, None]
        return super().forward(hidden_states.where(real, 0)).where(real, 0)


class EmptySoftmax(StandardAttention):
    """Padded keys score −∞. A query without keys gives 0/0; masking its output does not mask the NaN in its gradient."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            return super().forward(hidden_states)
        real = attention_mask.bool()
        q, k, v = self.project(hidden_states.where(real[:, :, None], 0))
        visible = real[:, None, None, :] & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        scores = (q @ k.mT / self.head_dim**0.5).masked_fill(~visible, -torch.inf)
        return self.output(scores.softmax(dim=-1) @ v).where(real[:, :, None], 0)


class MixesBatch(StandardAttention):
    """Keys are centred over dimension 0, which is the batch."""

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q, k, v = super().project(hidden_states, start)
        return q, k - 0.5 * k.mean(dim=0), v


# --- mistakes of the function ---------------------------------------------------------------------


class WindowOffByOne(SlidingWindowAttention):
    """The window holds `window_size` tokens before a token, and the token itself."""

    def __init__(self, hidden_dim: int, num_heads: int, *, window_size: int) -> None:
        super().__init__(hidden_dim, num_heads, window_size=window_size + 1)

    def reference(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return sliding_window_attention_reference(q, k, v, window_size=self.window_size - 1)


class CorrectsAfterWriting(DeltaNetAttention):
    """First S' = S + β k vᵀ, then S' − β k (S'ᵀk)ᵀ: the correction removes part of what was just written.

    With k of unit norm that writes (1 − β) v for v.
    """

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v, beta = tensors
        return delta_rule(q, k, (1 - beta[..., None]) * v, beta, chunk_size=self.chunk_size)


class ScalarState(LinearAttention):
    """The state is the sum of the scalars φ(k)·v instead of the matrices φ(k) vᵀ."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = (F.elu(tensors[0]) + 1, F.elu(tensors[1]) + 1, tensors[2])
        total = (k * v).sum(dim=-1, keepdim=True).cumsum(dim=2)
        return q * total / (q * k.cumsum(dim=2)).sum(dim=-1, keepdim=True)


class DetachedKeys(StandardAttention):
    """Outputs are right, but keys get no gradient."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return super().attend(q, k.detach(), v)


class AccumulatesInBfloat16(LinearAttention):
    def attend(self, *tensors: Tensor) -> Tensor:
        if tensors[0].dtype != torch.float32:
            return super().attend(*tensors)
        return super().attend(*(tensor.bfloat16() for tensor in tensors)).float()


class DropoutInEval(StandardAttention):
    """F.dropout defaults to training=True."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return F.dropout(softmax_attention(q, k, v), 0.1)


# --- mistakes of streaming ------------------------------------------------------------------------


class ReadsBeforeWriting(LinearAttention):
    """A decoded token reads the state before it is written to it."""

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        output, after = super().extend(hidden_states, state)
        if state is not None and hidden_states.shape[1] == 1:
            features = F.elu(self.project(hidden_states)[0]) + 1
            sums = features @ state["total"]
            output = self.output(sums[..., :-1] / sums[..., -1:])
        return output, after


class StaleRetrieval(BSBRAttention):
    """A new chunk's retrieval is not stored: later tokens read that of the chunk before."""

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        output, after = super().extend(hidden_states, state)
        return output, after if state is None else after | {"retrieved": state["retrieved"]}


class RemembersOnModule(StandardAttention):
    """The cache is an attribute of the module, so all sequences share it; the returned state is ignored."""

    cache: State

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        output, self.cache = super().extend(hidden_states, None if state is None else self.cache)
        self.cache = {name: tensor.contiguous() for name, tensor in self.cache.items()}
        return output, self.cache


class WritesIntoState(LinearAttention):
    """The sums are updated in place, which corrupts every other continuation of the same prefix."""

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        output, after = super().extend(hidden_states, state)
        return (output, after) if state is None else (output, {name: state[name].copy_(after[name]) for name in after})


class PositionsRestart(SlidingWindowAttention):
    """Rotary positions count from 0 in every call."""

    def __init__(self, hidden_dim: int, num_heads: int, *, window_size: int) -> None:
        super().__init__(hidden_dim, num_heads, window_size=window_size, rotary=True)

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        return super().project(hidden_states)


class ViewAsState(SlidingWindowAttention):
    """The last keys are a view, which keeps all other keys in memory."""

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        output, after = super().extend(hidden_states, state)
        everything = torch.cat([torch.zeros_like(after["keys"]), after["keys"]]), after["keys"].shape[0]
        return output, after | {"keys": everything[0][everything[1] :]}


# --- mistakes of numerics -------------------------------------------------------------------------


class NormWithoutEpsilon(BSBRAttention):
    """x / |x|, which is 0/0 at zero."""

    def _project_tokens(self, hidden_states: Tensor, start: int) -> TokenInputs:
        q, k, v, *_ = super()._project_tokens(hidden_states, start)
        return TokenInputs(q, k, v, q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True))


class SoftmaxWithoutShift(StandardAttention):
    """exp(s) / Σ exp(s) without the maximum subtracted, which is ∞/∞ for large scores; it holds the n×n scores."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        m, n = q.shape[2], k.shape[2]
        weights = (q @ k.mT / self.head_dim**0.5).exp().tril(n - m)
        return weights @ v / weights.sum(dim=-1, keepdim=True)


class ClampsScores(StandardAttention):
    """Scores end at ±4 in place of the shift by their maximum, which only a peaked softmax shows."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        scores = (q @ k.mT / self.head_dim**0.5).clamp(-4, 4)
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
        return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v


# --- wrong only under some condition ------------------------------------------------------------


def sees_all(*tensors: Tensor) -> Tensor:
    """Softmax attention without its mask."""
    return F.scaled_dot_product_attention(*tensors)


class ForgetsMaskInTraining(StandardAttention):
    def attend(self, *tensors: Tensor) -> Tensor:
        return sees_all(*tensors) if self.training else super().attend(*tensors)


class ForgetsMaskWithThreads(StandardAttention):
    def attend(self, *tensors: Tensor) -> Tensor:
        return sees_all(*tensors) if torch.get_num_threads() > 1 else super().attend(*tensors)


class ScalesWithoutGradients(StandardAttention):
    """The fast path of inference is another kernel, and wrong. Of the checks with a reference, all ask for gradients."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return super().attend(q, k, v) if torch.is_grad_enabled() else super().attend(0.99 * q, k, v)


class RoundsInInference(StandardAttention):
    """Inference mode, in which calls are timed, takes bfloat16."""

    def attend(self, *tensors: Tensor) -> Tensor:
        if not torch.is_inference_mode_enabled():
            return super().attend(*tensors)
        return super().attend(*(tensor.bfloat16() for tensor in tensors)).to(tensors[0].dtype)


class IgnoresStrides(StandardAttention):
    """The kernel takes every input for contiguous."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        batch, time, dim = hidden_states.shape
        return super().forward(hidden_states.as_strided((batch, time, dim), (time * dim, dim, 1)), attention_mask)


class ForgetsScaleInCopies(StandardAttention):
    """What a kernel needs is set in the constructor, and a copy has none."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__(hidden_dim, num_heads)
        self.scales = {id(self): 1.0}

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return super().attend(self.scales.get(id(self), 0.5) * q, k, v)


class ScaledByFirstInput(StandardAttention):
    """The first sequence that a module sees sets a scale for all others."""

    scale: Tensor | None = None

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        if self.scale is None:
            self.scale = q.detach().std().to(torch.float64)
        return super().attend(q / self.scale.to(q.dtype), k, v)

    def reference(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        assert self.scale is not None
        return StandardAttention.reference(self, q / self.scale, k, v)


class OverwritesOutput(StandardAttention):
    """All outputs of one shape are one buffer."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__(hidden_dim, num_heads)
        self.buffers: dict[Any, Tensor] = {}

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        output = super().forward(hidden_states, attention_mask)
        if output.requires_grad or torch.is_inference_mode_enabled():
            return output
        buffer = self.buffers.setdefault((output.shape, output.dtype), torch.empty_like(output))
        return buffer.copy_(output)


class Lazy(Tensor):
    """A tensor that could compute itself when somebody looks."""


class LazyOutput(StandardAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states, attention_mask).as_subclass(Lazy)


class LazyByAttribute(StandardAttention):
    """A plain tensor whose own `detach` could compute it when somebody looks."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        output = super().forward(hidden_states, attention_mask)
        vars(output)["detach"] = lambda: output
        return output


class CentresInPlace(StandardAttention):
    """The input is changed in place, and so is right only once."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        output = super().forward(hidden_states, attention_mask)
        if not torch.is_grad_enabled():
            hidden_states -= hidden_states.mean(dim=2, keepdim=True)
        return output


class ScalesQueriesInPlace(StandardAttention):
    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        output = super().attend(q, k, v)
        if not torch.is_grad_enabled():
            q *= 1.5
        return output


class FoldsInitialWeights(StandardAttention):
    """What follows from the weights is computed in the constructor, and stays when others are loaded."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__(hidden_dim, num_heads)
        self.folded = self.v_proj.weight.detach().double()

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q, k, v = super().project(hidden_states, start)
        shift = F.linear(hidden_states, self.folded.to(v.dtype) - self.v_proj.weight.detach())
        return q, k, v + split_heads(shift, self.num_heads)


class TakesAllThreads(StandardAttention):
    """Sets the number of threads of the process, and so takes more than the others."""

    def attend(self, *tensors: Tensor) -> Tensor:
        torch.set_num_threads(2)
        return super().attend(*tensors)


class RepeatsOutput(StandardAttention):
    """Of a batch of equal sequences only one is computed, and of any batch only the first is looked at."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        output = super().forward(hidden_states, attention_mask)
        equal = len(output) > 1 and torch.equal(hidden_states[:1].expand_as(hidden_states), hidden_states)
        return output[:1].expand_as(output) if equal or hidden_states.shape[1] == 1 else output


class MultipliesPaddingByZero(StandardAttention):
    """Values of padded keys are multiplied by 0, which leaves NaN what it is."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            return super().forward(hidden_states)
        real = attention_mask.bool()
        q, k, v = self.project(hidden_states)
        visible = real[:, None, None, :] & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        scores = (q @ k.mT / self.head_dim**0.5).masked_fill(~visible, torch.finfo(q.dtype).min)
        values = v * real[:, None, :, None]
        return self.output(scores.softmax(dim=-1) @ values).where(real[:, :, None], 0)


class ForgetsMaskWithGroupedHeads(StandardAttention):
    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        if q.shape[1] == k.shape[1]:
            return super().attend(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


# --- work that is not done, or elsewhere --------------------------------------------------------


class RemembersOutputs(StandardAttention):
    """Every output is kept under the values of its input."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__(hidden_dim, num_heads)
        self.known: list[tuple[Tensor, Tensor]] = []

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        if torch.is_grad_enabled() or q.shape != k.shape:
            return super().attend(q, k, v)
        for key, output in self.known:
            if key.dtype == q.dtype and torch.equal(key, q):
                return output.clone()
        self.known.append((q.clone(), super().attend(q, k, v)))
        return self.known[-1][1].clone()


class WorksInProject(StandardAttention):
    """`attend` copies what `project` has attended."""

    reference = None

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q, k, v = super().project(hidden_states, start)
        return (softmax_attention(q, k, v),)

    def attend(self, *tensors: Tensor) -> Tensor:
        return tensors[0].clone()

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return _StandardOf(self).extend(hidden_states, state)

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return 0


class WorksInOutput(StandardAttention):
    """`attend` passes q, k and v on."""

    reference = None

    def attend(self, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, dim=-1)

    def output(self, attended: Tensor) -> Tensor:
        return super().output(softmax_attention(*attended.chunk(3, dim=-1)))

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return _StandardOf(self).extend(hidden_states, state)

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return 0


class SumsInProject(MultiHeadAttention):
    """Every output is the mean of all values so far, which `project` computes without a matrix product."""

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        values = self.project_heads(hidden_states)[2]
        return (values.cumsum(dim=2) / torch.arange(1, values.shape[2] + 1, dtype=values.dtype)[:, None],)

    def attend(self, *tensors: Tensor) -> Tensor:
        return tensors[0].clone()

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        values, before = self.project_heads(hidden_states)[2], 0 if state is None else int(state["position"])
        sums = values.cumsum(dim=2) + (0 if state is None else state["sum"])
        counts = torch.arange(before + 1, before + values.shape[2] + 1, dtype=values.dtype)[:, None]
        return self.output(sums / counts), {"sum": sums[:, :, -1:].clone(), "position": torch.tensor(before + values.shape[2])}

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return 0

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        return batch_size * self.hidden_dim * self.dtype.itemsize


class _StandardOf(StandardAttention):
    """Standard attention with the weights of another."""

    def __init__(self, other: StandardAttention) -> None:
        super().__init__(other.hidden_dim, other.num_heads)
        self.load_state_dict(other.state_dict())
        self.to(other.dtype)
        self.load_state_dict(other.state_dict())


class KeepsStateOutside(StandardAttention):
    """The state is a number, under which the module keeps keys and values."""

    kept: ClassVar[list[State]] = []

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        output, after = super().extend(hidden_states, None if state is None else self.kept[int(state["number"])])
        self.kept.append(after)
        return output, {"number": torch.tensor(len(self.kept) - 1)}

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        return 8


# --- wrong declarations ---------------------------------------------------------------------------


class QuadraticUnderLinearLabel(LinearAttention):
    """Right outputs from all n×n scores, with its true FLOPs declared."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        scores = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
        return scores @ v / (scores.sum(dim=-1, keepdim=True) + 1e-12)

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return 2 * batch_size * self.num_heads * self.head_dim * seq_len * (seq_len + 1)


class FlopsTimesTen(LinearAttention):
    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return 10 * super().flops(seq_len, batch_size)


class FlopsByTen(LinearAttention):
    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return super().flops(seq_len, batch_size) // 10


class FlopsOfQuadratic(StandardAttention):
    """Declares linear FLOPs for quadratic attention."""

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return 4 * batch_size * self.num_heads * self.head_dim * seq_len * 128


class StateBytesOfOneHead(StandardAttention):
    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        return super().state_bytes(seq_len, batch_size) // self.num_heads


class WrongShape(StandardAttention):
    def output(self, attended: Tensor) -> Any:
        return merge_heads(attended)[..., :-1]


class Raises(StandardAttention):
    def attend(self, *tensors: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this\nsecond line")


# --- right wherever the certificate looks, and wrong where it is timed --------------------------


class ForgetsMaskWhenLong(StandardAttention):
    def attend(self, *tensors: Tensor) -> Tensor:
        return sees_all(*tensors) if tensors[0].shape[2] == tensors[1].shape[2] >= 512 else super().attend(*tensors)


class MixesLargeBatches(StandardAttention):
    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q, k, v = super().project(hidden_states, start)
        return (q, k - 0.5 * k.mean(dim=0), v) if len(k) >= 8 else (q, k, v)


class DropsOldestPage(StandardAttention):
    """From 512 tokens on, decoding forgets the first of them."""

    def attend_pages(self, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        time = sum(page.shape[2] for page in keys)
        k, v = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        return super().attend(q, k, v) if time < 512 else super().attend(q, k[:, :, 256:], v[:, :, 256:])


class SeesLateWindowWhenLong(StandardAttention):
    """From 512 tokens on, the second half of a sequence sees nothing of the first."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        if q.shape != k.shape or q.shape[2] < 512:
            return super().attend(q, k, v)
        return torch.cat(
            [super(SeesLateWindowWhenLong, self).attend(*half) for half in zip(*(x.chunk(2, 2) for x in tensors), strict=True)], 2
        )


class RoundsWhenLong(StandardAttention):
    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        if q.shape != k.shape or q.shape[2] < 512:
            return super().attend(q, k, v)
        return super().attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).to(q.dtype)


class DetachesKeysWhenLong(StandardAttention):
    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return super().attend(q, k if k.shape[2] < 512 else k.detach(), v)


class RemembersLastInput(StandardAttention):
    """The last output is returned again if an input is the same tensor as the last."""

    last: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None and hidden_states.shape[1] >= 512 and self.last and self.last[0] is hidden_states:
            return self.last[1]
        output = super().forward(hidden_states, attention_mask)
        self.last = (hidden_states, output) if hidden_states.shape[1] >= 512 else None
        return output


class TiresInTime(StandardAttention):
    """After the first 20 calls of a long sequence, only half of the keys are looked at."""

    calls = 0

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        self.calls += k.shape[2] >= 512
        if self.calls <= 20 or q.shape != k.shape:
            return super().attend(q, k, v)
        return super().attend(q, k, v * (torch.arange(v.shape[2]) % 2)[:, None].to(v.dtype))


class DeclaresWorkOfMany(StandardAttention):
    """Long sequences are declared as three times the work that they are."""

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return (3 if seq_len == 600 else 1) * super().flops(seq_len, batch_size)


class SkipsLateQueriesWhenLong(StandardAttention):
    """From 512 tokens on, the fourth quarter of the queries but for the last 32 sees only itself."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        time = q.shape[2]
        if q.shape != k.shape or time < 512:
            return super().attend(q, k, v)
        seen = super().attend(*(x[:, :, : 3 * time // 4] for x in tensors))
        visible = torch.ones(32, time, dtype=torch.bool).tril(time - 32)
        last = F.scaled_dot_product_attention(q[:, :, -32:], k, v, visible)
        return torch.cat([seen, v[:, :, 3 * time // 4 : -32], last], dim=2)


class CopiesItemsOfLargeBatches(StandardAttention):
    """In batches from 8 on, items 1 to 3 get the output of item 0; the others are right."""

    def attend(self, *tensors: Tensor) -> Tensor:
        output = super().attend(*tensors)
        return output if len(output) < 8 else torch.cat([output[:1].expand(4, -1, -1, -1), output[4:]])

    def attend_pages(self, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        return self.attend(q, torch.cat(keys, dim=2), torch.cat(values, dim=2))


class DecodesEveryEighthWhenLong(StandardAttention):
    """Of the tokens that are decoded after 512, only each eighth, and so the last of a block, looks at its context."""

    @property
    def block_length(self) -> int:
        return 64

    def attend_pages(self, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        time = sum(page.shape[2] for page in keys)
        skips = q.shape[2] == 1 and time > 512 and time % 8
        return values[-1][:, :, -1:].clone() if skips else super().attend_pages(q, keys, values)


class DetachesLateTokensWhenLong(StandardAttention):
    """From 512 tokens on, the second half of the sequence has no gradient."""

    def attend(self, *tensors: Tensor) -> Tensor:
        output, time = super().attend(*tensors), tensors[1].shape[2]
        return output if time < 512 else torch.cat([output[:, :, : time // 2], output[:, :, time // 2 :].detach()], dim=2)


class LooksBack560(StandardAttention):
    """A window of 560 tokens, in `attend` and streaming alike; it declares half of the products that run, as below 560."""

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        if k.shape[2] <= 560:
            return super().attend(q, k, v)
        return sliding_window_attention(q, k, v, window_size=560)

    def attend_pages(self, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        return self.attend(q, torch.cat(keys, dim=2), torch.cat(values, dim=2))

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        if seq_len <= 560:
            return super().flops(seq_len, batch_size)
        return 2 * batch_size * self.num_heads * self.head_dim * 560 * (seq_len - 280)


class RemembersByAddress(StandardAttention):
    """The output of a long input is kept under the address of its memory."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__(hidden_dim, num_heads)
        self.known: dict[int, Tensor] = {}

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if hidden_states.shape[1] < 512 or attention_mask is not None:
            return super().forward(hidden_states, attention_mask)
        address = hidden_states.data_ptr()
        if address not in self.known:
            self.known[address] = super().forward(hidden_states)
        return self.known[address].clone()


class WorksInBackground(StandardAttention):
    """A long output is returned empty, and a thread computes it."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if hidden_states.shape[1] < 512 or torch.is_grad_enabled():
            return super().forward(hidden_states, attention_mask)
        output = torch.zeros_like(hidden_states)

        def work() -> None:
            with torch.inference_mode():
                output.copy_(super(WorksInBackground, self).forward(hidden_states.repeat(20, 1, 1))[:1])

        threading.Thread(target=work).start()
        return output


# --- right whoever looks, and wrong where only the clock does -----------------------------------


class SkipsWithoutCollector(StandardAttention):
    """Does nothing while the garbage collector is off, as it is while calls are timed."""

    def attend(self, *tensors: Tensor) -> Tensor:
        return super().attend(*tensors) if gc.isenabled() else tensors[2].clone()


class SkipsUnderTheClock(StandardAttention):
    """Does nothing if the file of the clock is among its callers."""

    def attend(self, *tensors: Tensor) -> Tensor:
        files = {frame.filename.rpartition("/")[2] for frame in traceback.extract_stack()}
        return tensors[2].clone() if "clock.py" in files else super().attend(*tensors)


class SkipsInItsProcess(StandardAttention):
    """Does nothing once its process has called it often, whichever of its modules: a new module there tells nothing."""

    calls: ClassVar[dict[int, int]] = {}

    def attend(self, *tensors: Tensor) -> Tensor:
        self.calls[os.getpid()] = self.calls.get(os.getpid(), 0) + 1
        return super().attend(*tensors) if self.calls[os.getpid()] <= 20 else tensors[2].clone()
