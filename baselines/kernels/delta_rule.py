"""The delta rule, with or without decay, in C++ on a CPU.

A key head is computed from its first chunk to its last, with the state in the cache of a core. `baselines.delta_net` and
`baselines.gated_delta_net` have the definitions and the torch forms.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baselines.kernels.recurrent import check_inputs
from bsbr.backends.cpp.calls import Kernels
from bsbr.backends.cpp.differentiable import Differentiable

KERNELS = Kernels(Path(__file__).with_name("delta_rule.cpp"), "bsbr_delta_rule")
"""The functions of delta_rule.cpp."""

CHUNK = 32
"""Tokens that C++ solves together, at most: work within a chunk grows with its square, and the cache next to a core is small."""

SEGMENT = 8
"""Chunks from one stored state to the next, as in delta_rule.cpp. The backward pass computes those between again."""

COLUMNS = 32
"""A multiple of the columns in which C++ stores a state, on any processor."""

CACHED_STATES = 2**17
"""Numbers of all states that a core works on in turn, at most: half a megabyte in float32."""

TorchForm = Callable[..., tuple[Tensor, Tensor | None]]
"""(chunk_size, initial, q, k, v, beta[, log_alpha]) -> the output, and the final state, which may be None if `initial` is."""


class DeltaRule:
    """The delta rule on the backends "cpp" and "torch".

    Args:
        torch_form: the rule by torch operations. C++ leaves second derivatives to it.
    """

    def __init__(self, torch_form: TorchForm) -> None:
        self._torch_form = torch_form
        self._kernel = Differentiable(_forward, _backward, self._torch_outputs)

    def __call__(self, backend: str, chunk_size: int, initial: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Computes the rule after the state `initial`.

        Args:
            backend: "cpp", if it supports the tensors, or "torch".
            chunk_size: tokens solved together, at most.
            initial: [batch, kv_heads, head_dim, value_dim]; None for 0.
            tensors: q [batch, heads, time, head_dim]; k [batch, kv_heads, time, head_dim] and v, the same with value_dim; beta,
                and log_alpha if the state decays, [batch, kv_heads, time].

        Returns:
            The output [batch, heads, time, value_dim]; the final state, shaped as `initial`, which may be None if `initial` is.

        Raises:
            ValueError: if a shape does not fit, or chunk_size is not a positive integer.
        """
        q, k, v, *per_token = tensors
        check_inputs(q, k, v, chunk_size, **dict(zip(("beta", "log_alpha"), per_token, strict=False)))
        shape = (*k.shape[:2], k.shape[3], v.shape[3])
        if initial is not None and initial.shape != shape:
            raise ValueError(f"the state must be [batch, kv_heads, head_dim, value_dim] = {list(shape)}, got {list(initial.shape)}")
        if backend == "torch":
            return self._torch_form(chunk_size, initial, *tensors)
        state = None if initial is None else initial.to(q)
        differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, initial) if x is not None)
        outputs = self._kernel(min(chunk_size, CHUNK, q.shape[2]), differentiated, state, *tensors)
        return (outputs, None) if isinstance(outputs, Tensor) else (outputs[0], outputs[1])

    def _torch_outputs(self, chunk_size: int, _: bool, initial: Tensor | None, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        out, final = self._torch_form(chunk_size, initial, *tensors)
        return out if initial is None or final is None else (out, final)


def flops(seq_len: int, chunk_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """FLOPs of the delta rule, chunk after chunk, for one sequence. Decays are elementwise; masked pairs are not counted.

    Symbols as in delta_rule.cpp; d = head_dim; a chunk has c tokens.

    - Per key head and chunk: tril(K Kᵀ, −1) and the substitution cost c (c − 1) d each.
    - Per query head and chunk: tril(Q Kᵀ) and its product with E cost c (c + 1) d each.
    - Each chunk but the first: K S per key head and Q S per query head cost 2 c d² each.
    - Each chunk but the last: Kᵀ E per key head costs 2 c d².

    Args:
        chunk_size: as the option; the least work is that of `CHUNK` tokens or fewer.
    """
    size = min(chunk_size, CHUNK, seq_len)
    full, rest = divmod(seq_len, size)
    lengths = [size] * full + [rest] * bool(rest)
    pairs = 2 * head_dim * sum(c * (c + 1) for c in lengths)
    strict_pairs = 2 * head_dim * sum(c * (c - 1) for c in lengths)
    reads = 2 * (seq_len - size) * head_dim**2
    writes = 2 * (seq_len - lengths[-1]) * head_dim**2
    return num_heads * (pairs + reads) + num_kv_heads * (strict_pairs + reads + writes)


# --- operators ----------------------------------------------------------------------------------


class RuleSizes(NamedTuple):
    """`RuleSizes` of delta_rule.cpp."""

    batch: int
    heads: int
    kv_heads: int
    time: int
    chunk_size: int
    head_dim: int
    value_dim: int
    parts: int
    together: int
    backward: bool


@KERNELS.operator(
    "delta_rule(int chunk_size, Tensor? initial, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_alpha, Tensor(a!) out, "
    "Tensor(b!)? final, Tensor(c!)? starts) -> int"
)
def _delta_rule(chunk_size: int, initial: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> int:
    """Writes the output and, if they are given, the final state and the states at the start of segments."""
    beta, log_alpha, out, final, starts = rest
    heads, threads = k.shape[0] * k.shape[1], torch.get_num_threads()
    # Where heads are few, several cores share the value columns of a head; where they are many, a core takes several heads.
    parts = max(1, threads // max(1, heads))
    together = next((n for n in range(k.shape[1], 1, -1) if _fit_together(n, q, k, v, threads)), 1)
    sizes = _sizes(q, k, v, chunk_size, parts, together, backward=False)
    return KERNELS.call("delta_rule", sizes, q, k, v, *_columns(beta, log_alpha), initial, out, final, starts)


@KERNELS.operator(
    "delta_rule_backward(int chunk_size, Tensor? initial, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_alpha, "
    "Tensor starts, Tensor? final, Tensor d_out, Tensor? d_final, Tensor(a!)? d_initial, Tensor(b!) d_q, Tensor(c!) d_k, "
    "Tensor(d!) d_v, Tensor(e!) d_beta, Tensor(f!)? d_log_alpha) -> int"
)
def _delta_rule_backward(chunk_size: int, initial: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> int:
    """Writes the gradients."""
    beta, log_alpha, starts, final, d_out, d_final, d_initial, d_q, d_k, d_v, d_beta, d_log_alpha = rest
    tensors = d_out, q, k, v, *_columns(beta, log_alpha), initial, starts, final, d_final, d_q, d_k, d_v
    sizes = _sizes(q, k, v, chunk_size, 1, 1, backward=True)
    return KERNELS.call("delta_rule_backward", sizes, *tensors, *_columns(d_beta, d_log_alpha), d_initial)


def _fit_together(number: int, q: Tensor, k: Tensor, v: Tensor, threads: int) -> bool:
    """Whether tasks of `number` key heads divide evenly over heads and threads, and their states fit a core's cache.

    The rows of such heads are neighbours in memory, which is read faster than rows that are far apart.
    """
    batch, kv_heads = k.shape[:2]
    evenly = kv_heads % number == 0 and batch * kv_heads // number % threads == 0
    return evenly and number * q.shape[3] * v.shape[3] <= CACHED_STATES


def _sizes(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, parts: int, together: int, *, backward: bool) -> RuleSizes:
    batch, heads, time, head_dim = q.shape
    return RuleSizes(batch, heads, k.shape[1], time, chunk_size, head_dim, v.shape[3], parts, together, backward)


def _columns(*per_token: Tensor | None) -> tuple[Tensor | None, ...]:
    """[batch, heads, time, 1], as C++ takes tensors."""
    return tuple(None if x is None else x.unsqueeze(3) for x in per_token)


def _forward(
    chunk_size: int, differentiated: bool, initial: Tensor | None, *tensors: Tensor
) -> tuple[Tensor | tuple[Tensor, ...], tuple[Tensor, ...]]:
    q, k, v, beta, *decay = tensors
    out = _empty_like_heads(q, v.shape[3])
    final = None if initial is None else torch.empty_like(initial, memory_format=torch.contiguous_format)
    starts = None
    if differentiated:
        segments = -(-q.shape[2] // (chunk_size * SEGMENT))
        starts = q.new_empty(*k.shape[:2], segments, k.shape[3] * (-(-v.shape[3] // COLUMNS) * COLUMNS))
    torch.ops.bsbr_delta_rule.delta_rule(chunk_size, initial, q, k, v, beta, *(decay or (None,)), out, final, starts)
    saved = tuple(x for x in (starts, final) if x is not None)
    return (out if final is None else (out, final)), saved


def _backward(arguments: tuple[Any, ...], saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    chunk_size, _, initial, q, k, v, beta, *decay = arguments
    starts, final = saved if len(saved) == 2 else (*saved, None)
    d_out, d_final = gradients if len(gradients) == 2 else (*gradients, None)
    d_heads = [_empty_like_heads(x, x.shape[3]) for x in (q, k, v)]
    d_initial, d_beta, *d_decay = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in (initial, beta, *decay)
    )
    given = chunk_size, initial, q, k, v, beta, *(decay or (None,)), starts, final, d_out, d_final
    torch.ops.bsbr_delta_rule.delta_rule_backward(*given, d_initial, *d_heads, d_beta, *(d_decay or (None,)))
    return None, None, d_initial, *d_heads, d_beta, *d_decay


def _empty_like_heads(x: Tensor, dim: int) -> Tensor:
    """Uninitialised [batch, heads, time, dim], stored as [batch, time, heads · dim]: joining the heads is then no copy."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], dim).transpose(1, 2)
