"""What is measured: each workload turns a module and its inputs into the call that is sampled, and says what it must cost.

The module is what the scope asks for: an `Attention` or a `TransformerLayer`, whose inputs are hidden states
[batch, time, hidden_dim], or a `CausalLM`, whose inputs are token ids [batch, time]. What a workload needs only once,
such as reading a context or the state of an optimizer, is done before the first call.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bsbr.interface import Attention, State
from bsbr.model import CausalLM, TransformerLayer, TransformerModel
from evals.config import MATCHED_WITHIN, Comparison, Contestant
from evals.measure import count_flops

F = TypeVar("F", bound=Callable[..., object])
Module = Attention | TransformerLayer | CausalLM


class Work(NamedTuple):
    """The call that is sampled.

    steps: how often a call does what is measured; the latency is the call's time divided by it. tokens: that one step
    goes through.
    """

    call: Callable[[], object]
    tokens: int
    steps: int = 1


def only(**limits: object) -> Callable[[F], F]:
    """Notes on a workload where it can be measured: `scopes`, all that there are; `shortest`, the least seq_len at a scope."""

    def note(workload: F) -> F:
        vars(workload).update(limits)
        return workload

    return note


def prefill(module: Module, inputs: Tensor) -> Work:
    """One forward pass over the whole sequence, without gradients; of a model, with the logits of the next token alone."""
    module.eval()

    @torch.inference_mode()
    def call() -> Tensor:
        return forward(module, inputs)

    return Work(call, tokens_in(inputs))


@only(scopes=("attention",))
def attention(module: Attention, inputs: Tensor) -> Work:
    """The function alone, without gradients: `attend` on tensors that were projected before."""
    module.eval()
    with torch.inference_mode():
        tensors = module.project(inputs)

    @torch.inference_mode()
    def call() -> Tensor:
        return module.attend(*tensors)

    return Work(call, tokens_in(inputs))


@only(shortest={"model": 2})  # its loss is of next tokens
def forward_backward(module: Module, inputs: Tensor) -> Work:
    """One forward pass in training mode and the gradients of all parameters, and of hidden states where those are the inputs.

    What is derived is the next-token loss of a model, and the sum of the outputs of an attention or a layer, which
    as part of a model would have to pass a gradient on to what stands before it.
    """
    backward, forget = _gradients(module, inputs)

    def call() -> None:
        backward()
        forget()

    return Work(call, tokens_in(inputs))


@only(shortest={"model": 2})
def train_step(module: Module, inputs: Tensor) -> Work:
    """`forward_backward`, then a step of AdamW, in one fused kernel, whose moments exist before the first call."""
    backward, forget = _gradients(module, inputs)
    # The batch is always the same: at this rate thousands of steps leave the weights, and with them the time, as they are.
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)

    def call() -> None:
        backward()
        optimizer.step()
        forget()

    call()
    return Work(call, tokens_in(inputs))


def _gradients(module: Module, inputs: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """Makes the gradients of one forward pass, and drops them: a call that left them would begin with what the first did not."""
    module.train()
    inputs = inputs.requires_grad_(inputs.is_floating_point())

    def backward() -> None:
        loss = module.loss(inputs) if isinstance(module, CausalLM) else module(inputs).sum()
        loss.backward()

    def forget() -> None:
        module.zero_grad(set_to_none=True)
        inputs.grad = None

    return backward, forget


def decode(module: Module, inputs: Tensor) -> Work:
    """One token at a time behind a context of `time` tokens, the state warm; of a model, with its logits.

    Some attentions do at one token in a block what the others profit from: BSBR, for instance, mixes its states for a new
    chunk. A median over single tokens would never show that. So a call decodes as many tokens as the longest block has,
    half of them before the context is `time` long and half after, and its time is divided by their number, as the time per
    output token of a serving benchmark is. Where the attention has no blocks, a call is one token. Every call
    starts from the same state, which `extend` leaves as it was: however many samples there are, the context does not drift.
    """
    module.eval()
    token, context = inputs[:, -1:], inputs.shape[1]
    steps = min(period(module), 2 * context)
    with torch.inference_mode():
        state = state_after(module, inputs, context - steps // 2)

    @torch.inference_mode()
    def call() -> tuple[Tensor, State]:
        output, after = module.extend(token, state)
        for _ in range(steps - 1):
            output, after = module.extend(token, after)
        return output, after

    return Work(call, tokens_in(token), steps)


def forward(module: Module, inputs: Tensor) -> Tensor:
    """Outputs for the whole sequence; of a model, the logits of the token that follows it."""
    if isinstance(module, CausalLM):
        return cast(Tensor, module.head(module.model(inputs)[:, -1:]))
    output: Tensor = module(inputs)
    return output


def state_after(module: Module, inputs: Tensor, tokens: int) -> State | None:
    return module.extend(inputs[:, :tokens])[1] if tokens else None


def period(module: Module) -> int:
    """The longest block in it, 1 if no attention in it has any: the class that says nothing of blocks has none."""
    attentions = [part for part in module.modules() if isinstance(part, Attention)]
    return max((one.block_length for one in attentions if type(one).block_length is not Attention.block_length), default=1)


def tokens_in(inputs: Tensor) -> int:
    return inputs.shape[0] * inputs.shape[1]


# --- what a comparison asks for -----------------------------------------------------------------


def prepare(comparison: Comparison, contestant: Contestant) -> Work:
    """The workload's call, on fresh weights and inputs. Meant for a process of its own: it sets threads and seed."""
    device = comparison.device
    torch.set_num_threads(device.threads)
    torch.manual_seed(comparison.sampling.seed)
    module = build(comparison, contestant).to(device.kind, device.torch_dtype)
    workload = instantiate({**comparison.workload, "_partial_": True})
    return cast(Work, workload(module, inputs(comparison)))


def build(comparison: Comparison, contestant: Contestant) -> Module:
    """What the comparison's scope asks for: the attention with its projections, a layer of the decoder, or all of it."""
    model = comparison.model
    if model.scope == "attention":
        return contestant.build(model)
    ff_dim = model.ff_dim if contestant.ff_dim is None else contestant.ff_dim

    def attention(**_: int) -> Attention:
        return contestant.build(model)

    if model.scope == "layer":
        return TransformerLayer(model.hidden_dim, model.num_heads, ff_dim, attention=attention)
    return CausalLM(
        TransformerModel(model.vocab_size, model.hidden_dim, model.num_layers, model.num_heads, ff_dim, attention=attention)
    )


def inputs(comparison: Comparison) -> Tensor:
    shape, model, device = comparison.shape, comparison.model, comparison.device
    size = (shape.batch_size, shape.seq_len)
    if model.scope == "model":
        return torch.randint(model.vocab_size, size, device=device.kind)
    return torch.randn(*size, model.hidden_dim, device=device.kind, dtype=device.torch_dtype)


# --- what it must cost --------------------------------------------------------------------------


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


def cost(comparison: Comparison, contestant: Contestant) -> dict[str, int]:
    """Bytes of parameters and of all layers' states after the sequence; the `Least` that a step costs; the contestant's ff_dim.

    Found on tensors without data: nothing is allocated, whatever the size.
    """
    model, dtype = comparison.model, comparison.device.torch_dtype
    with torch.device("meta"):
        module = build(comparison, contestant).to(dtype)
    attentions = [part for part in module.modules() if isinstance(part, Attention)]
    state_bytes = sum(one.state_bytes(comparison.shape.seq_len, comparison.shape.batch_size) for one in attentions)
    needed = least(comparison, module)
    costs = {
        "parameter_bytes": sum(parameter.nbytes for parameter in module.parameters()),
        "state_bytes": state_bytes,
        "flops": needed.flops,
        "least_bytes": needed.moved_bytes,
        "held_bytes": needed.held_bytes,
    }
    if model.scope != "attention":
        costs["ff_dim"] = model.ff_dim if contestant.ff_dim is None else contestant.ff_dim
    return costs


def unmatched(comparison: Comparison) -> list[str]:
    """What the contestants differ in by more than 1 %, in words, to stand beside a plot of them."""
    return differing({one.name: cost(comparison, one) for one in comparison.contestants}, comparison.relative_to)


def differing(costs: Mapping[str, Mapping[str, float]], relative_to: str) -> list[str]:
    """`unmatched`, from every contestant's parameter_bytes, flops and state_bytes: "parameters 1× to 1.5× (bsbr)".

    The ratios are to `relative_to`, or to the first contestant where it is not among them.
    """
    reference = costs.get(relative_to) or next(iter(costs.values()))
    words = []
    for key, name in (("parameter_bytes", "parameters"), ("flops", "FLOPs"), ("state_bytes", "state")):
        ratios = {one: costs[one][key] / reference[key] for one in costs if reference[key]}
        ends = [end(ratios, key=ratios.__getitem__) for end in (min, max)] if ratios else []
        told = [f"{ratios[one]:.2g}× ({one})" for one in ends if abs(ratios[one] - 1) > MATCHED_WITHIN]
        if told:
            words.append(f"{name} {' to '.join(told if len(told) == 2 else ['1×', *told])}")
    return words


def least(comparison: Comparison, module: Module) -> Least:
    """What a step of the comparison's workload needs of a module without data; NOTHING, of a workload of somebody else's."""
    package, _, name = comparison.workload["_target_"].rpartition(".")
    if package != __name__ or name not in LEAST:
        return NOTHING
    with FakeTensorMode():
        place(module, comparison.device.kind)
        try:
            return LEAST[name](module, inputs(comparison))
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
    context, block = inputs.shape[1], period(module)
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
        if computes(func) and any(isinstance(leaf, Tensor) and leaf.numel() for leaf in tree_leaves(result)):
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
