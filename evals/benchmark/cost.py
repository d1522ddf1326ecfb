"""What a step of a workload must cost at least, and what a candidate declares: found on tensors without data."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bsbr.interface import Attention
from bsbr.model import CausalLM
from evals.benchmark import workloads
from evals.benchmark.workloads import Module, build_module, forward, longest_block, make_inputs, state_after
from evals.config import Candidate, Comparison
from evals.measure.flops import count_flops
from evals.results.unmatched import unmatched_costs


class Least(NamedTuple):
    """What one step cannot do with less of, whatever the kernels.

    flops: of matrix products, causal work only. moved_bytes: the parameters, inputs and states that it reads, once, and
    what is left when it is done, once; from the cache, if all of it fits there. held_bytes: what its peak of memory above
    its inputs must at least come to: what is left when it is done.
    """

    flops: int
    moved_bytes: int
    held_bytes: int


NOTHING = Least(0, 0, 0)


def candidate_costs(comparison: Comparison, candidate: Candidate) -> dict[str, int]:
    """Bytes of parameters and of all layers' states after the sequence; the `Least` that a step costs; the candidate's ff_dim.

    Found on tensors without data: nothing is allocated, whatever the size.
    """
    model, dtype = comparison.model, comparison.device.torch_dtype
    with torch.device("meta"):
        module = build_module(comparison, candidate).to(dtype)
    attentions = [part for part in module.modules() if isinstance(part, Attention)]
    state_bytes = sum(one.state_bytes(comparison.shape.seq_len, comparison.shape.batch_size) for one in attentions)
    needed = least(comparison, module)
    costs = {
        "parameter_bytes": sum(parameter.nbytes for parameter in module.parameters()),
        "state_bytes": round(state_bytes),
        "flops": round(needed.flops),  # whatever type an attention declares them in
        "min_bytes": needed.moved_bytes,
        "held_bytes": needed.held_bytes,
    }
    if model.scope != "attention":
        costs["ff_dim"] = model.ff_dim if candidate.ff_dim is None else candidate.ff_dim
    return costs


def unmatched(comparison: Comparison) -> list[str]:
    """What the candidates differ in by more than 1 %, in words, to stand beside a plot of them."""
    return unmatched_costs({one.name: candidate_costs(comparison, one) for one in comparison.candidates}, comparison.relative_to)


def least(comparison: Comparison, module: Module) -> Least:
    """What a step of the comparison's workload needs of a module without data; NOTHING, of a workload of somebody else's."""
    package, _, name = comparison.workload["_target_"].rpartition(".")
    if package != workloads.__name__ or name not in LEAST:
        return NOTHING
    with FakeTensorMode():
        place(module, comparison.device.kind)
        try:
            return LEAST[name](module, make_inputs(comparison))
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            # Kernels of its own that need data: a bound of nothing is true of them too.
            return NOTHING


def place(module: nn.Module, device: str) -> None:
    """Module.to(device) within FakeTensorMode, where torch refuses it: parameters and buffers that have a device but no data."""
    placed: dict[Tensor, Tensor] = {}  # a tied weight stays one
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if tensor not in placed:
                new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                placed[tensor] = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
            setattr(part, name, placed[tensor])


def _of_prefill(module: Module, inputs: Tensor) -> Least:
    module.eval()
    declared, counted = _attending(module, inputs)
    with torch.no_grad():
        flops, read, output = traced(partial(forward, module, inputs), [*module.parameters(), inputs])
    return Least(flops - counted + declared, read + output.nbytes, output.nbytes)


def _of_attention(module: Attention, inputs: Tensor) -> Least:
    module.eval()
    with torch.no_grad():
        tensors = module.project(inputs)
        _, read, output = traced(partial(module.attend, *tensors), [*module.parameters(), *tensors])
    return Least(module.flops(inputs.shape[1], inputs.shape[0]), read + output.nbytes, output.nbytes)


def _of_forward_backward(module: Module, inputs: Tensor) -> Least:
    module.train()
    declared, counted = _attending(module, inputs, gradients=True)
    inputs = inputs.requires_grad_(inputs.is_floating_point())
    leaves = [*module.parameters(), inputs]

    def run() -> Tensor:
        # A model's loss asks for the data; what comes before it is the logits of every token that has a next one.
        output: Tensor = module.head(module.model(inputs)[:, :-1]) if isinstance(module, CausalLM) else module(inputs)
        output.sum().backward()
        return output

    flops, read, output = traced(run, leaves)
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    return Least(flops - counted + declared, read + output.nbytes + gradients, gradients)


def _of_train_step(module: Module, inputs: Tensor) -> Least:
    passes = _of_forward_backward(module, inputs)
    # AdamW reads and writes two moments of every parameter that has a gradient, and writes the parameter.
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.grad is not None)
    return passes._replace(moved_bytes=passes.moved_bytes + 5 * trained)


def _of_decode(module: Module, inputs: Tensor) -> Least:
    """The cheaper of the first two tokens of a block that the call begins: the first opens it, the second has least to see."""
    module.eval()
    context, block = inputs.shape[1], longest_block(module)
    start = context - min(block, 2 * context) // 2
    longer = torch.cat([inputs, inputs], dim=1)[:, : -(-start // block) * block]
    token, steps = inputs[:, -1:], []
    with torch.no_grad():
        state = state_after(module, longer, longer.shape[1])
        for _ in range(2):
            before = {} if state is None else state
            held = [*module.parameters(), token, *before.values()]
            flops, read, (output, after) = traced(partial(module.extend, token, state), held)
            kept = {storage_key(tensor) for tensor in before.values()}
            new = output.nbytes + sum(t.nbytes for t in after.values() if t.is_floating_point() and storage_key(t) not in kept)
            steps.append(Least(flops, read + new, new))
            state = after
    return Least(*map(min, zip(*steps, strict=True)))


LEAST: dict[str, Callable[[Any, Tensor], Least]] = {
    "prefill": _of_prefill,
    "attention": _of_attention,
    "forward_backward": _of_forward_backward,
    "train_step": _of_train_step,
    "decode": _of_decode,
}


def _attending(module: Module, inputs: Tensor, *, gradients: bool = False) -> tuple[int, int]:
    """The FLOPs of every attend in it as declared, causal work only, and as counted, masked halves included.

    The gradient of a matrix product is two more of its size.
    """
    batch, time = inputs.shape[:2]
    declared = counted = 0
    for one in (part for part in module.modules() if isinstance(part, Attention)):
        with torch.no_grad():
            tensors = one.project(torch.empty(batch, time, one.hidden_dim, device=inputs.device, dtype=one.dtype))
        if gradients:
            counted += count_flops(partial(derive, one, [tensor.detach().requires_grad_() for tensor in tensors]))
        else:
            with torch.no_grad():
                counted += count_flops(partial(one.attend, *tensors))
        declared += (3 if gradients else 1) * one.flops(time, batch)
    return declared, counted


def derive(attention: Attention, tensors: list[Tensor]) -> None:
    attention.attend(*tensors).sum().backward()


def traced(work: Callable[[], Any], held: Iterable[Tensor]) -> tuple[int, int, Any]:
    """The FLOPs of the matrix products in `work`, how many bytes of what is `held` it reads, and what it returns."""
    reads = Reads(held)
    results = []

    def run() -> None:
        results.append(work())

    with reads:
        flops = count_flops(run)
    return flops, sum(reads.bytes.values()), results[0]


class Reads(TorchDispatchMode):
    """How much of each storage in `held` goes into an operation that computes: the most that any one operation takes of it."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = list(held)  # or a later storage might stand where one stood
        self.bytes = {storage_key(tensor): 0 for tensor in self.held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        written = func._schema.is_mutable or any(isinstance(leaf, Tensor) and leaf.numel() for leaf in tree_leaves(result))
        if computes(func) and written:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and storage_key(leaf) in self.bytes:
                    key = storage_key(leaf)
                    self.bytes[key] = max(self.bytes[key], extent(leaf))
        return result


def computes(func: Any) -> bool:
    """Whether an operation needs the elements of its tensors: no view, no new tensor of the same kind, no look-up of rows."""
    name = func.overloadpacket.__name__
    lookup = name in ("embedding", "_embedding_bag", "_embedding_bag_forward_only", "index", "index_select", "gather")
    return not (func.is_view or lookup or name == "_unsafe_view" or name.endswith("_like") or name.startswith("new_"))


def storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def extent(tensor: Tensor) -> int:
    """Bytes of the different elements of a view, at most: rows that are repeated or overlap are read once."""
    elements = span = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
        span += (size - 1) * stride
    return min(elements, span) * tensor.itemsize
