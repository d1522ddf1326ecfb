"""Tests that hold for every attention: segments, backends, derivatives, sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.delta_net import DeltaNetAttention, delta_rule, delta_rule_reference
from baselines.gated_delta_net import GatedDeltaNetAttention, gated_delta_rule, gated_delta_rule_reference
from baselines.gau import GatedAttentionUnit
from baselines.gla import GatedLinearAttention
from baselines.hopfield import HopfieldAttention, hopfield_attention, hopfield_attention_reference
from baselines.kda import KimiDeltaAttention
from baselines.linear import LinearAttention, linear_attention, linear_attention_reference
from baselines.mamba2 import Mamba2Attention
from baselines.ring import RingAttention
from baselines.sliding_window import SlidingWindowAttention, sliding_window_attention, sliding_window_attention_reference
from baselines.sparse import SparseAttention, sparse_attention, sparse_attention_reference
from baselines.standard import StandardAttention, softmax_attention, softmax_attention_reference
from bsbr import Attention, BSBRAttention, interface
from evals.certification.subject import randomize_zero_parameters
from evals.measure.memory import peak_allocated_bytes

BLOCK = 6
BUILDERS: dict[str, tuple[type[Attention], dict[str, Any]]] = {
    "standard": (StandardAttention, {}),
    "hopfield": (HopfieldAttention, {}),
    "ring": (RingAttention, {}),
    "bsbr": (BSBRAttention, {"chunk_size": BLOCK}),
    "bsbr, overlap and top 2": (BSBRAttention, {"chunk_size": BLOCK, "chunk_overlap": BLOCK + 1, "retrieval_top_k": 2}),
    "linear": (LinearAttention, {"chunk_size": BLOCK}),
    "delta_net": (DeltaNetAttention, {"chunk_size": BLOCK}),
    "gated_delta_net": (GatedDeltaNetAttention, {"chunk_size": BLOCK}),
    "sliding_window": (SlidingWindowAttention, {"window_size": BLOCK}),
    "sparse": (SparseAttention, {"block_size": BLOCK, "summary_size": 2}),
    "gau": (GatedAttentionUnit, {"chunk_size": BLOCK, "key_dim": 8}),
    "mamba2": (Mamba2Attention, {"chunk_size": BLOCK}),
    "retention": (Mamba2Attention, {"chunk_size": BLOCK, "decay": "constant"}),
    "gla": (GatedLinearAttention, {"chunk_size": BLOCK}),
    "kda": (KimiDeltaAttention, {"chunk_size": BLOCK}),
}
every_attention = pytest.mark.parametrize("name", BUILDERS)
BOUNDED = [name for name, (cls, _) in BUILDERS.items() if cls.bounded_state]
KEEP_ALL = {"standard", "hopfield", "ring"}


def build(name: str, **more: Any) -> Attention:
    cls, options = BUILDERS[name]
    if cls is GatedAttentionUnit:
        more.pop("num_kv_heads", None)
    torch.manual_seed(0)
    return randomize_zero_parameters(cls(16, 4, **options, **more)).double().eval()


def hidden(time: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, time, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


# --- segments -----------------------------------------------------------------------------------


def test_every_attention_but_those_that_keep_all_keys_has_a_bounded_state() -> None:
    assert set(BUILDERS) - set(BOUNDED) == KEEP_ALL


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("more", [{}, {"num_kv_heads": 2, "rotary": True}], ids=str)
def test_segments_change_nothing(monkeypatch: pytest.MonkeyPatch, name: str, more: dict[str, Any]) -> None:
    monkeypatch.setattr(interface, "SEGMENT", 2 * BLOCK - 1)
    attention, calls = build(name, **more), []
    assert attention.segment_length == 2 * BLOCK
    attention.out_proj.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape[1]))
    whole_segment = 2 * BLOCK
    for time, parts in (
        (whole_segment, [whole_segment]),
        (whole_segment + 1, [whole_segment, 1]),
        (2 * whole_segment, [whole_segment] * 2),
        (3 * whole_segment + 11, [whole_segment] * 3 + [11]),
    ):
        x, mask = hidden(time), torch.ones(2, time)
        mask[0, 1::3], mask[1, :5] = 0, 0
        whole, padded = attention(x).detach(), attention(x, mask).detach()  # with gradients: in one piece
        assert calls == [time, time]
        calls.clear()
        with torch.no_grad():
            assert_close(attention(x), whole)
            assert calls == parts
            assert_close(attention(x, mask), padded)
        calls.clear()


@pytest.mark.parametrize("name", BOUNDED)
def test_a_state_is_extended_in_segments_that_end_at_block_boundaries(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(interface, "SEGMENT", 2 * BLOCK)
    attention, x, calls = build(name), hidden(7 * BLOCK + 5), []
    whole, final = attention.extend(x)
    _, state = attention.extend(x[:, :4])
    extend = attention.extend
    monkeypatch.setattr(attention, "extend", lambda x, state=None: calls.append(x.shape[1]) or extend(x, state))
    with torch.no_grad():
        output, after = attention.extend_in_segments(x[:, 4:], state)
    assert calls == [2 * BLOCK - 4, 2 * BLOCK, 2 * BLOCK, BLOCK + 5]
    assert_close(output, whole[:, 4:])
    assert after.keys() == final.keys()
    for key, tensor in after.items():
        assert_close(tensor, final[key])


@every_attention
@pytest.mark.parametrize("new", [1, BLOCK + 1])
def test_a_state_of_any_strides_continues_alike(name: str, new: int) -> None:
    attention, x = build(name), hidden(2 * BLOCK + 3 + new)
    with torch.no_grad():
        _, state = attention.extend(x[:, :-new])
        expected, after = attention.extend(x[:, -new:], state)
        for layout in (lambda s: s.mT.contiguous().mT, lambda s: s.transpose(0, 1).contiguous().transpose(0, 1)):
            strided = {key: layout(s) if s.dim() > 1 else s for key, s in state.items()}
            found, found_after = attention.extend(x[:, -new:], strided)
            assert_close(found, expected)
            for key, tensor in after.items():
                assert_close(found_after[key], tensor)


@every_attention
@pytest.mark.parametrize("new", [1, 4])
def test_a_state_of_mixed_dtypes_is_right_or_refused(name: str, new: int) -> None:
    attention, x = build(name), hidden(2 * BLOCK + new)
    with torch.no_grad():
        _, state = attention.extend(x[:, :-new])
        expected, _ = attention.extend(x[:, -new:], state)
        for key in (key for key, s in state.items() if s.is_floating_point()):
            try:
                found, _ = attention.extend(x[:, -new:], state | {key: state[key].float()})
            except (ValueError, RuntimeError, NotImplementedError):
                continue
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", BOUNDED)
def test_the_peak_grows_as_output_and_state_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(interface, "SEGMENT", 8 * BLOCK)
    attention = build(name)
    lengths = (32 * BLOCK, 64 * BLOCK)
    with torch.no_grad():
        inputs = [hidden(time) for time in lengths]
        attention(inputs[0])  # compiles or loads code at most once
        peaks = [peak_allocated_bytes(lambda x=x: attention(x)) for x in inputs]
    output = 2 * 16 * 8 * (lengths[1] - lengths[0])
    state = attention.state_bytes(lengths[1], 2) - attention.state_bytes(lengths[0], 2)
    # A state that grows is copied when it is extended.
    assert peaks[1] - peaks[0] <= 1.02 * output + 3 * state


# --- backends -----------------------------------------------------------------------------------


@every_attention
def test_impl_is_an_option_of_every_attention(name: str) -> None:
    tensors = build(name).project(hidden(2 * BLOCK + 1))
    cls = BUILDERS[name][0]
    assert build(name, impl="torch").implementation(*tensors) == "torch"
    assert build(name).implementation(*tensors) == ("cpp" if "cpp" in cls.backends else "torch")
    known = ", ".join(("auto", "torch", *cls.backends, *cls.explicit_backends))
    with pytest.raises(ValueError, match=f"^impl must be one of {known}, got 'fortran'$"):
        build(name, impl="fortran")


@every_attention
def test_a_default_device_is_not_that_of_the_tensors(name: str) -> None:
    """torch.set_default_device("cuda") on a machine with one GPU; meta stands for it, since reading a tensor there fails."""
    attention, x = build(name), hidden(2 * BLOCK + 1)
    expected = attention(x)
    _, state = attention.extend(x[:, :-2])
    with torch.device("meta"):
        assert_close(attention(x), expected)
        assert_close(attention.extend(x[:, -2:], state)[0], expected[:, -2:])
        with torch.no_grad():
            _, state = attention.extend(x[:, :-2])
            assert_close(attention.extend(x[:, -2:], state)[0], expected[:, -2:])


@every_attention
def test_sizes_can_be_computed_without_memory(name: str) -> None:
    attention, x = build(name).to("meta"), hidden(2 * BLOCK + 1).to("meta")
    output, state = attention.extend(x)
    assert attention(x, torch.ones(2, x.shape[1], device="meta")).shape == output.shape == x.shape
    assert attention.extend(x[:, :1], state)[0].is_meta


@pytest.mark.parametrize("name", [name for name, (cls, _) in BUILDERS.items() if cls.backends])
def test_a_named_backend_that_cannot_run_raises(name: str) -> None:
    backend = BUILDERS[name][0].backends[-1]
    attention = build(name, impl=backend).to(torch.bfloat16)
    with pytest.raises(NotImplementedError, match=f"impl='{backend}' was asked for: .*bfloat16.*; impl='torch' takes every input"):
        attention(hidden(2 * BLOCK + 1).to(torch.bfloat16))


# --- derivatives --------------------------------------------------------------------------------


@every_attention
@pytest.mark.parametrize("new", [1, BLOCK + 3])
@pytest.mark.parametrize("prefix", [BLOCK, 2 * BLOCK + 2])
def test_the_gradient_by_a_state_is_its_slope(name: str, prefix: int, new: int) -> None:
    """With frozen weights, as in tuning a prefix: only the state is a leaf."""
    attention, x = build(name).requires_grad_(False), hidden(prefix + new, batch=1)
    _, state = attention.extend(x[:, :prefix])
    leaves = {key: t.clone().requires_grad_() for key, t in state.items() if t.is_floating_point() and t.numel()}

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        output, after = attention.extend(x[:, prefix:], {**state, **leaves})
        return output.square().sum() + sum(t.square().sum() for t in after.values() if t.is_floating_point())

    gradients = torch.autograd.grad(loss(leaves), [*leaves.values()], allow_unused=True, materialize_grads=True)
    for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        direction, step = torch.randn(leaf.shape, dtype=leaf.dtype, generator=torch.Generator().manual_seed(1)), 1e-5
        with torch.no_grad():
            above, below = (loss({**leaves, key: leaf + sign * step * direction}) for sign in (1, -1))
        slope = (above - below).item() / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-6), key


@every_attention
@pytest.mark.parametrize("time", [1, BLOCK, 2 * BLOCK + 3])
def test_every_parameter_has_a_gradient_at_any_length(name: str, time: int) -> None:
    """DistributedDataParallel fails on the step after one in which a parameter had none."""
    attention = build(name).train()
    attention(hidden(time)).square().sum().backward()
    assert [parameter for parameter, value in attention.named_parameters() if value.grad is None] == []


@every_attention
@pytest.mark.parametrize("time", [BLOCK, 2 * BLOCK + 3])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning", "ignore:`torch.jit.script` is deprecated")
def test_transforms_are_right(name: str, time: int) -> None:
    attention, x = build(name), hidden(time)
    direction = hidden(time, seed=1)

    def loss(x: Tensor) -> Tensor:
        output: Tensor = attention(x).square().sum()
        return output

    def slopes(function: Callable[[Tensor], Tensor]) -> Tensor:
        step = 1e-5
        with torch.enable_grad():
            return (function(x + step * direction) - function(x - step * direction)) / (2 * step)

    def gradient(x: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(loss(x := x.detach().requires_grad_()), x)
        return found

    def batched(as_batch: bool) -> Tensor:
        output = attention(y := x.clone().requires_grad_())
        rows = torch.stack([direction, x])
        if as_batch:
            return torch.autograd.grad(output, y, rows, is_grads_batched=True)[0]
        return torch.stack([torch.autograd.grad(output, y, row, retain_graph=True)[0] for row in rows])

    transforms: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "vhp": (lambda: torch.autograd.functional.vhp(loss, x, direction)[1], lambda: slopes(gradient)),
        "func.grad": (lambda: torch.func.grad(loss)(x), lambda: gradient(x)),
        "vmap": (lambda: torch.vmap(lambda row: attention(row[None])[0])(x), lambda: attention(x)),
        "gradients of a batch": (lambda: batched(True), lambda: batched(False)),
        "jvp": (lambda: torch.func.jvp(loss, (x,), (direction,))[1], lambda: slopes(lambda x: loss(x).detach())),
    }
    for transform, (found, expected) in transforms.items():
        torch.testing.assert_close(found(), expected(), rtol=1e-5, atol=1e-5, msg=lambda m, t=transform: f"{t}: {m}")


# --- sizes ----------------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any], int]] = {
    "standard": (softmax_attention, softmax_attention_reference, {}, 0),
    "hopfield": (hopfield_attention, hopfield_attention_reference, {"num_steps": 2}, 0),
    "sliding_window": (sliding_window_attention, sliding_window_attention_reference, {"window_size": 3}, 0),
    "sparse": (sparse_attention, sparse_attention_reference, {"block_size": 4, "summary_size": 2}, 0),
    "linear": (linear_attention, linear_attention_reference, {}, 0),
    "delta_net": (delta_rule, delta_rule_reference, {}, 1),
    "gated_delta_net": (gated_delta_rule, gated_delta_rule_reference, {}, 2),
}
"""A function, its reference, its options, and how many tensors [batch, kv_heads, time] it takes beside q, k and v."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_shapes_give_the_right_output_or_one_sentence(name: str) -> None:
    function, reference, options, per_token = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)

    def pick(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=generator))]

    right = 0
    for _ in range(120):
        batch, heads, kv_heads, time, dim = pick(0, 1, 2), pick(1, 2, 4), pick(1, 2), pick(1, 3, 9), pick(1, 4, 17)
        shapes = [
            [batch, heads, time, dim],
            *([batch, kv_heads, time, dim] for _ in range(2)),
            *[[batch, kv_heads, time]] * per_token,
        ]
        for _ in range(pick(0, 0, 1, 2)):  # breaks a size, or the rank
            shape = shapes[pick(*range(len(shapes)))]
            place = pick(*range(-1, len(shape)))
            if place < 0:
                shape[:] = shape[pick(1, 4) :]
            elif shape:
                shape[place] = pick(0, 1, 2, 5)
        tensors = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        tensors[1] = tensors[1] / tensors[1].norm(dim=-1, keepdim=True).clamp(min=1) if tensors[1].dim() else tensors[1]
        tensors[4:] = [-x for x in tensors[4:]]  # a logarithm of a decay
        which = pick(*range(len(tensors)))
        if pick(0, 0, 0, 1):
            tensors[which] = tensors[which].mT.contiguous().mT if tensors[which].dim() > 1 else tensors[which].long()
        elif pick(0, 0, 0, 1):
            tensors[which] = tensors[which].to((torch.int64, torch.float32)[pick(0, 1)])
        elif tensors[which].dim() == 4 and pick(0, 1):
            tensors[which] = tensors[which][:, :1].expand(tensors[which].shape)
        described = [f"{x.dtype} {list(x.shape)} {x.stride()}" for x in tensors]
        try:
            output = function(*tensors, **options)
        except (ValueError, NotImplementedError) as error:
            assert len(str(error)) > 20, described  # noqa: PT017
            assert "\n" not in str(error), described  # noqa: PT017
            continue
        except Exception as error:  # noqa: BLE001
            pytest.fail(f"{described}: {type(error).__name__}: {error}")
        right += 1
        assert output.shape == (*tensors[0].shape[:3], tensors[2].shape[3]), described
        if output.numel():
            torch.testing.assert_close(
                output, reference(*tensors, **options), rtol=0, atol=1e-10, msg=lambda m, d=described: f"{d}: {m}"
            )
    assert right > 20
