"""Checks of cost: peak memory, FLOPs and state size are what the attention declares."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bsbr.interface import Attention
from evals.certification.subject import Subject
from evals.measure.flops import count_flops
from evals.measure.memory import peak_allocated_bytes, retained_bytes

KEPT_BYTES = 64
"""Counters, such as a step's number, may stay behind."""


def memory(subject: Subject) -> str | None:
    """With four times the tokens, peak memory grows as n^1.1 at most, forward and backward: there is no n×n tensor."""
    (dtype,) = subject.dtypes(torch.float32)
    attention = subject.in_dtype(dtype)
    # From 16 blocks on: before, an attention that selects among earlier blocks still has fewer of them than it selects.
    lengths = max(1024, 16 * subject.block) * torch.tensor([1, 4])
    for name, work in (("a forward pass", _forward), ("a forward and backward pass", _forward_backward)):
        peaks = []
        for time in lengths.tolist():
            x = subject.inputs(time, dtype=dtype)
            peaks.append(peak_allocated_bytes(partial(work, attention, x), subject.device))
        growth, allowed = peaks[1] / peaks[0], 4**1.1
        if not growth <= allowed:
            sizes = f"from {peaks[0]:,} bytes at n={lengths[0]} to {peaks[1]:,} at n={lengths[1]}"
            return f"the peak memory of {name} grows {growth:.1f}× {sizes}, allowed {allowed:.1f}×"
    return None


def flops(subject: Subject) -> str | None:
    """The declared FLOPs are between a fifth of the counted FLOPs and all of them, and grow with length as those do.

    All matrix products that ran are counted, masked halves included; only causal work is declared. Torch cannot count the products
    of a custom GPU kernel: if it counts none on a GPU, the check passes.
    """
    (dtype,) = subject.dtypes(torch.float32)
    attention = subject.in_dtype(dtype)
    lengths = (4 * subject.block + 3, 16 * subject.block + 3)
    ratios = []
    for time in lengths:
        tensors = attention.project(subject.inputs(time, dtype=dtype))
        counted, declared = count_flops(partial(attention.attend, *tensors)), attention.flops(time)
        unseen = counted == 0 and subject.device != "cpu"
        ratio = 1.0 if declared == counted == 0 or unseen else declared / max(counted, 1)
        if not 0.2 <= ratio <= 1.05:
            return f"flops({time}) declares {declared:,}, in matrix products that ran were counted {counted:,}"
        if attention.flops(time, batch_size=3) != 3 * declared:
            return f"flops({time}, batch_size=3) is {attention.flops(time, batch_size=3):,}, not three times {declared:,}"
        ratios.append(ratio)
    growth = ratios[1] / ratios[0]
    if not 0.75 <= growth <= 1 / 0.75:
        return f"from n={lengths[0]} to n={lengths[1]} the declared FLOPs grow {growth:.2f} times as much as those counted"
    return None


def projections(subject: Subject) -> str | None:
    """`project` and `output` cost what projections cost and look no further than a block, so that no work hides there.

    Their matrix products use each parameter twice per token at most, and grow as the number of tokens. Changing the first token
    changes at most a quarter of what they return for 16 blocks.
    """
    (dtype,) = subject.dtypes(torch.float32)
    attention = subject.in_dtype(dtype)
    parameters = sum(parameter.numel() for parameter in attention.parameters())
    lengths = (4 * subject.block + 3, 16 * subject.block + 3)
    flops_per_token: dict[str, list[float]] = {"project": [], "output": []}
    for time in lengths:
        x = subject.inputs(time, dtype=dtype)
        attended = attention.attend(*attention.project(x))
        for name, work in (("project", partial(attention.project, x)), ("output", partial(attention.output, attended))):
            flops_per_token[name].append(count_flops(work) / time)
    for name, (short, long) in flops_per_token.items():
        if long > 4 * parameters or long > 1.1 * short:
            return (
                f"{name} runs {long:,.0f} FLOPs of matrix products per token at n={lengths[1]} and {short:,.0f} at n={lengths[0]}: "
                f"projections take {4 * parameters:,} at most at any length; its other work belongs in attend"
            )
    first = torch.cat([subject.inputs(1, seed=1, dtype=dtype), x[:, 1:]], dim=1)
    for name, before, after in (
        ("project", attention.project(x), attention.project(first)),
        ("output", [attention.output(attended)], [attention.output(_with_other_first_token(attended, lengths[1]))]),
    ):
        changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
        share = changed / sum(tensor.numel() for tensor in after)
        if share > 0.25:
            return (
                f"changing the first of {lengths[1]} tokens changes {share:.0%} of what {name} returns: its work belongs in attend"
            )
    return None


def _with_other_first_token(attended: Tensor, time: int) -> Tensor:
    """A copy whose first token is negated; an equal copy if no dimension is the time."""
    copy = attended.clone()
    dims = [dim for dim, size in enumerate(copy.shape) if size == time]
    if dims:
        copy.select(dims[0], 0).neg_()
    return copy


def retention(subject: Subject) -> str | None:
    """A call keeps nothing but what it returns: outputs that are remembered, and states outside of the state, stay in memory."""
    (dtype,) = subject.dtypes(torch.float32)
    attention = subject.in_dtype(dtype)
    time = subject.block + 1
    works: dict[str, Callable[[Tensor], object]] = {
        "forward": attention,
        "extend": attention.extend,
        "a backward pass": partial(_forward_backward, attention),
    }
    for name, work in works.items():
        inputs = [subject.inputs(time, batch=2, seed=seed, dtype=dtype) for seed in range(4)]
        with torch.set_grad_enabled(name == "a backward pass"):
            for x in inputs[:3]:  # one-time work, and memories of a few inputs fill up
                work(x)
            kept = retained_bytes(partial(work, inputs[3]), subject.device)
        if kept > KEPT_BYTES:
            return f"{name} keeps {kept:,} bytes that it does not return (n={time})"
    return None


def state_size(subject: Subject) -> str | None:
    """`state_bytes` is what the state holds, up to 64 bytes of counters; a view holds all of the tensor that it views."""
    for dtype in subject.dtypes(torch.float32, torch.bfloat16):
        attention = subject.in_dtype(dtype)
        for time in subject.lengths:
            _, state = attention.extend(subject.inputs(time, batch=2, dtype=dtype))
            storages = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, state.values())}
            held, declared = sum(storages.values()), attention.state_bytes(time, batch_size=2)
            if not declared <= held <= declared + 64:
                return f"state_bytes({time}, batch_size=2) declares {declared:,} bytes, the state holds {held:,} ({dtype})"
    return None


def _forward(attention: Attention, x: Tensor) -> None:
    with torch.no_grad():
        attention(x)


def _forward_backward(attention: Attention, x: Tensor) -> None:
    x.requires_grad_()
    torch.autograd.grad(attention(x).sum(), x)
