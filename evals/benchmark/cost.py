"""Lower bounds of the cost of one step of a workload, and the costs that a candidate declares, computed without data."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bsbr.interface import Attention, State
from bsbr.model import CausalLM
from evals.benchmark import workloads
from evals.benchmark.modules import Module, attentions_of, build_module, longest_block
from evals.benchmark.traced_reads import storage_key, trace
from evals.benchmark.workloads import forward, make_inputs, state_after
from evals.config import Candidate, Comparison
from evals.errors import one_sentence
from evals.measure.flops import count_flops


class MinimumCost(NamedTuple):
    """Lower bounds of one step, whatever its kernels."""

    flops: int  # of matrix products, causal work only
    moved_bytes: int | None  # parameters, inputs and states that it reads, and its results, each once; None: not traced
    held_bytes: int  # peak of memory above its inputs: its results
    untraced: str = ""  # why its bytes could not be traced


def candidate_costs(comparison: Comparison, candidate: Candidate) -> dict[str, Any]:
    """Computes the costs of a candidate without allocating anything, whatever its size.

    Returns:
        parameter_bytes; state_bytes, of all layers after the sequence; flops, min_bytes and held_bytes, the `MinimumCost` of a
        step; ff_dim, if there is a feed-forward part; and if the bytes could not be traced, a detail that says so.
    """
    model, shape, dtype = comparison.model, comparison.shape, comparison.device.torch_dtype
    with torch.device("meta"):
        module = build_module(comparison, candidate).to(dtype)
    state_bytes = sum(one.state_bytes(shape.seq_len, shape.batch_size) for one in attentions_of(module))
    minimum = minimum_cost(comparison, module)
    costs: dict[str, Any] = {
        "parameter_bytes": sum(parameter.nbytes for parameter in module.parameters()),
        "state_bytes": round(state_bytes),
        "flops": round(minimum.flops),  # an attention may declare them as a float
        "min_bytes": minimum.moved_bytes,
        "held_bytes": minimum.held_bytes,
    }
    if minimum.untraced:
        costs["detail"] = minimum.untraced
    if model.scope != "attention":
        costs["ff_dim"] = model.ff_dim if candidate.ff_dim is None else candidate.ff_dim
    return costs


def minimum_cost(comparison: Comparison, module: Module) -> MinimumCost:
    """Lower bounds of a step of the comparison's workload.

    The module must be on the meta device; its parameters are replaced.

    Returns:
        The bounds. Of an attention whose kernels need data only the FLOPs that it declares; of a user's own workload nothing.
    """
    package, _, name = comparison.workload["_target_"].rpartition(".")
    declared = declared_flops(comparison, module, name)
    if package != workloads.__name__ or name not in MINIMUM_COSTS:
        return MinimumCost(declared, None, 0)
    with FakeTensorMode():
        _move_without_data(module, comparison.device.kind)
        try:
            minimum = MINIMUM_COSTS[name](module, make_inputs(comparison))
        except Exception as error:  # noqa: BLE001  a kernel that needs data, in anybody's code
            return MinimumCost(
                declared, None, 0, f"declared FLOPs alone bound it, its bytes cannot be traced: {one_sentence(error)}"
            )
    # What an attention declares bounds it as well if it does less without data. Of a token, only a whole block's mean is declared.
    return minimum if name == "decode" else minimum._replace(flops=max(minimum.flops, declared))


def declared_flops(comparison: Comparison, module: Module, workload: str) -> int:
    """FLOPs of a step that its attentions declare; 0 for a user's own workload, of which nothing is known."""

    def declared(seq_len: int) -> int:
        return round(sum(one.flops(seq_len, comparison.shape.batch_size) for one in attentions_of(module)))

    seq_len = comparison.shape.seq_len
    if workload in ("prefill", "attention"):
        return declared(seq_len)
    if workload in ("forward_backward", "train_step"):
        return 3 * declared(seq_len)
    if workload == "context_parallel":
        return declared(seq_len) // int(comparison.workload.get("ranks", 1))
    if workload == "decode":
        steps = min(longest_block(module), 2 * seq_len)
        start = seq_len - steps // 2
        return max(0, declared(start + steps) - (declared(start) if start else 0)) // steps
    return 0


def _move_without_data(module: nn.Module, device: str) -> None:
    """Replaces Module.to(device), which torch refuses under FakeTensorMode. Parameters and buffers get a device, but no data."""
    moved: dict[Tensor, Tensor] = {}  # so that a tied weight stays one tensor
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if tensor not in moved:
                new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                moved[tensor] = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
            setattr(part, name, moved[tensor])


# --- one function a workload --------------------------------------------------------------------


def _minimum_of_prefill(module: Module, inputs: Tensor) -> MinimumCost:
    module.eval()
    unneeded = _unneeded_flops(module, inputs)
    with torch.no_grad():
        flops, read_bytes, output = trace(partial(forward, module, inputs), [*module.parameters(), inputs])
    return MinimumCost(flops - unneeded, read_bytes + output.nbytes, output.nbytes)


def _minimum_of_attention(module: Attention, inputs: Tensor) -> MinimumCost:
    module.eval()
    with torch.no_grad():
        tensors = module.project(inputs)
        _, read_bytes, output = trace(partial(module.attend, *tensors), [*module.parameters(), *tensors])
    return MinimumCost(module.flops(inputs.shape[1], inputs.shape[0]), read_bytes + output.nbytes, output.nbytes)


def _minimum_of_forward_backward(module: Module, inputs: Tensor) -> MinimumCost:
    module.train()
    unneeded = _unneeded_flops(module, inputs, gradients=True)
    inputs = inputs.requires_grad_(inputs.is_floating_point())
    leaves = [*module.parameters(), inputs]

    def run() -> Tensor:
        # A model's loss needs data. What comes before it are the logits of every token that has a next one.
        output: Tensor = module.logits(module.model(inputs)[:, :-1]) if isinstance(module, CausalLM) else module(inputs)
        output.sum().backward()
        return output

    flops, read_bytes, output = trace(run, leaves)
    gradient_bytes = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    return MinimumCost(flops - unneeded, read_bytes + output.nbytes + gradient_bytes, gradient_bytes)


def _minimum_of_train_step(module: Module, inputs: Tensor) -> MinimumCost:
    passes = _minimum_of_forward_backward(module, inputs)
    # AdamW reads and writes two moments of every parameter that has a gradient, and writes the parameter.
    trained_bytes = sum(parameter.nbytes for parameter in module.parameters() if parameter.grad is not None)
    assert passes.moved_bytes is not None
    return passes._replace(moved_bytes=passes.moved_bytes + 5 * trained_bytes)


def _minimum_of_decode(module: Module, inputs: Tensor) -> MinimumCost:
    """Lower bounds of the first two tokens of a block: one-time work may make the first expensive; the second attends to least."""
    module.eval()
    context = _context_up_to_a_block(module, inputs)
    with torch.no_grad():
        state = state_after(module, context, context.shape[1])
        first, state = _minimum_of_token(module, inputs[:, -1:], state)
        second, _ = _minimum_of_token(module, inputs[:, -1:], state)
    flops, moved_bytes, held_bytes = (min(pair) for pair in zip(first, second, strict=True))
    return MinimumCost(flops, moved_bytes, held_bytes)


def _context_up_to_a_block(module: Module, inputs: Tensor) -> Tensor:
    """The context up to the first block that begins within a decoding call, from repeated inputs."""
    block = longest_block(module)
    start = inputs.shape[1] - min(block, 2 * inputs.shape[1]) // 2  # context before the call
    return torch.cat([inputs, inputs], dim=1)[:, : -(-start // block) * block]


def _minimum_of_token(module: Module, token: Tensor, state: State | None) -> tuple[tuple[int, int, int], State]:
    """FLOPs, moved bytes and held bytes of decoding one token, at least, and the state after it."""
    before = state or {}
    flops, read_bytes, (output, after) = trace(
        partial(module.extend, token, state), [*module.parameters(), token, *before.values()]
    )
    old_storages = {storage_key(tensor) for tensor in before.values()}
    changed = [tensor for tensor in after.values() if tensor.is_floating_point() and storage_key(tensor) not in old_storages]
    left_bytes = sum(tensor.nbytes for tensor in (output, *changed))
    return (flops, read_bytes + left_bytes, left_bytes), after


MINIMUM_COSTS: dict[str, Callable[[Any, Tensor], MinimumCost]] = {
    "prefill": _minimum_of_prefill,
    "attention": _minimum_of_attention,
    "forward_backward": _minimum_of_forward_backward,
    "train_step": _minimum_of_train_step,
    "decode": _minimum_of_decode,
}


def _unneeded_flops(module: Module, inputs: Tensor, *, gradients: bool = False) -> int:
    """FLOPs of all attentions as torch counts them, masked halves included, minus those that they declare, causal work only.

    gradients: counts the backward pass, too; the gradient of a matrix product is two more of its size.
    """
    batch_size, seq_len = inputs.shape[:2]
    unneeded = 0
    for attention in attentions_of(module):
        hidden_states = torch.empty(batch_size, seq_len, attention.hidden_dim, device=inputs.device, dtype=attention.dtype)
        with torch.no_grad():
            tensors = attention.project(hidden_states)
        if gradients:
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            counted = count_flops(lambda: attention.attend(*leaves).sum().backward())  # noqa: B023  called at once
        else:
            with torch.no_grad():
                counted = count_flops(partial(attention.attend, *tensors))
        unneeded += counted - (3 if gradients else 1) * attention.flops(seq_len, batch_size)
    return unneeded
