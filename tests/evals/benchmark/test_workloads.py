"""The calls of workloads, and their minimum costs, which must not exceed measured costs."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from baselines.standard import StandardAttention
from bsbr.interface import Attention, State
from bsbr.model import CausalLM
from evals.benchmark.cost import candidate_costs
from evals.benchmark.modules import build_module, longest_block
from evals.benchmark.traced_reads import extent
from evals.benchmark.workloads import Work, decode, make_inputs, prepare
from evals.cli.jobs import read_job
from evals.config import Candidate, Comparison
from evals.errors import UsageError
from evals.measure.flops import UNREGISTERED
from evals.measure.memory import peak_allocated_bytes
from evals.paths import CONF

pytestmark = pytest.mark.xdist_group("workloads")
ATTENTIONS = ("standard", "bsbr", "linear", "sliding_window", "sparse", "hopfield", "delta_net", "gau")
WORKLOADS = ("prefill", "attention", "forward_backward", "train_step", "decode")
PLACES = [(w, s) for w in WORKLOADS for s in ("attention", "layer", "model") if w != "attention" or s == "attention"]
MODEL = ("model.hidden_dim=32", "model.num_heads=2", "model.ff_dim=48", "model.vocab_size=50")
TINY = (*MODEL, "device.threads=1", "shape.batch_size=2")
BLOCKS = {"bsbr": "chunk", "linear": "chunk", "delta_net": "chunk", "gau": "chunk", "sliding_window": "window", "sparse": "block"}
SHORT_BLOCKS = tuple(f"attention.{name}.{option}_size=16" for name, option in BLOCKS.items())


@pytest.fixture(scope="module", autouse=True)
def conf() -> Iterator[None]:
    threads = torch.get_num_threads()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    torch.set_num_threads(threads)


@cache
def read(workload: str, scope: str, seq_len: int, *more: str) -> Comparison:
    overrides = (f"workload={workload}", f"model.scope={scope}", f"shape.seq_len={seq_len}")
    return read_job(compose("config", [*TINY, *overrides, *more]))


def candidate(comparison: Comparison, name: str) -> Candidate:
    return next(one for one in comparison.candidates if one.name == name)


def prepared(name: str, workload: str, scope: str, seq_len: int, *more: str) -> tuple[Work, dict[str, int]]:
    comparison = read(workload, scope, seq_len, *more)
    prepared_candidate = candidate(comparison, name)
    return prepare(comparison, prepared_candidate).work, candidate_costs(comparison, prepared_candidate)


def counted(work: Callable[[], object]) -> int:
    """torch's count, and the backward of the CPU's flash kernel, which torch counts as 0: five matrix products."""

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        batch, heads, queries, head_dim = q
        return int(2 * batch * heads * queries * k[2] * (3 * head_dim + 2 * v[3]))

    known = {**UNREGISTERED, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        work()
    return int(counter.get_total_flops())


# --- minimum costs -------------------------------------------------------------------------------


@pytest.mark.parametrize(("workload", "scope"), PLACES)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_declared_is_no_more_than_counted_and_not_much_less(name: str, workload: str, scope: str) -> None:
    work, declared = prepared(name, workload, scope, 109, *SHORT_BLOCKS)
    flops = counted(work.call) / work.steps
    assert 0.2 * flops <= declared["flops"] <= 1.001 * flops
    held = peak_allocated_bytes(work.call)
    assert 0 < declared["held_bytes"] <= held


@pytest.mark.parametrize("seq_len", [1, 2, 17])
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_declared_is_no_more_than_counted_where_blocks_are_not_full(name: str, workload: str, seq_len: int) -> None:
    work, declared = prepared(name, workload, "attention", seq_len)
    assert 0 < declared["flops"] <= 1.001 * counted(work.call) / work.steps
    assert 0 < declared["held_bytes"] <= peak_allocated_bytes(work.call)
    assert declared["min_bytes"] > 0


def test_minimum_costs_of_standard_attention_by_hand() -> None:
    batch, n, dim, layers, ff, vocab = 2, 300, 32, 2, 48, 50
    tokens, pairs = batch * n, n * (n + 1) // 2
    attend, projections = 4 * batch * dim * pairs, 8 * tokens * dim**2
    weights, states = 4 * dim**2, tokens * dim
    fours = {key: 4 * value for key, value in {"weights": weights, "states": states}.items()}

    def least(workload: str, scope: str) -> tuple[int, ...]:
        _, declared = prepared("standard", workload, scope, n, "attention=[standard]")
        return declared["flops"], declared["min_bytes"], declared["held_bytes"]

    assert least("attention", "attention") == (attend, 4 * fours["states"], fours["states"])
    assert least("prefill", "attention") == (attend + projections, fours["weights"] + 2 * fours["states"], fours["states"])
    gradients = fours["weights"] + fours["states"]
    passes = (3 * (attend + projections), gradients + fours["states"] + gradients, gradients)
    assert least("forward_backward", "attention") == passes
    assert least("train_step", "attention") == (passes[0], passes[1] + 5 * fours["weights"], passes[2])
    # A token's projections and its pairs; both caches are read, and their open pages written once more with the token.
    cache = 2 * batch * n * dim
    token_flops = 8 * batch * dim**2 + 4 * batch * dim * (n + 1)
    new = 4 * (batch * dim + 2 * batch * dim * (n - 256 + 1))
    assert least("decode", "attention") == (token_flops, fours["weights"] + 4 * batch * dim + 4 * cache + new, new)

    layer = attend + projections + 4 * tokens * dim * ff
    assert least("prefill", "layer")[0] == layer
    assert least("prefill", "model")[0] == layers * layer + 2 * batch * dim * vocab
    assert least("train_step", "model")[0] == 3 * (layers * layer + 2 * batch * (n - 1) * dim * vocab)


def test_a_token_of_bsbr_reads_its_chunk_and_not_the_states_of_others() -> None:
    short, long = (prepared("bsbr", "decode", "attention", n, "attention.bsbr.chunk_size=16")[1] for n in (160, 1600))
    assert long["state_bytes"] > 5 * short["state_bytes"]
    assert long["min_bytes"] == short["min_bytes"]


@pytest.mark.parametrize(
    ("workload", "flops"),
    [("prefill", 2000), ("attention", 2000), ("forward_backward", 6000), ("train_step", 6000), ("decode", 100)],
)
def test_kernels_that_need_data_are_bounded_by_the_flops_that_they_declare(workload: str, flops: int) -> None:
    comparison = read(workload, "attention", 20)
    costs = candidate_costs(comparison, Candidate("mine", {"_target_": f"{__name__}.NeedsData"}))
    assert (costs["flops"], costs["min_bytes"], costs["held_bytes"]) == (2 * flops, None, 0)  # a batch of two
    assert costs["detail"].startswith("declared FLOPs alone bound it, its bytes cannot be traced: ")
    assert costs["parameter_bytes"] > 0


@pytest.mark.parametrize(
    ("view", "elements"),
    [
        (torch.empty(6, 4), 24),
        (torch.empty(6, 4)[2:5, 1:3], 6),
        (torch.empty(1, 4).expand(6, 4), 4),
        (torch.empty(10).unfold(0, 4, 1), 10),
        (torch.empty(6, 0), 0),
    ],
)
def test_the_extent_of_a_view(view: Tensor, elements: int) -> None:
    assert extent(view) == 4 * elements


# --- the calls ----------------------------------------------------------------------------------


def decoded(work: Work) -> tuple[Tensor, State]:
    return cast(tuple[Tensor, State], work.call())


@pytest.mark.parametrize(("name", "steps"), [("bsbr", 16), ("standard", 1)])
def test_a_decoding_call_goes_through_a_block_around_the_context_and_leaves_its_state(name: str, steps: int) -> None:
    comparison = read("decode", "attention", 40, "attention.bsbr.chunk_size=16")
    torch.manual_seed(0)
    module = build_module(comparison, candidate(comparison, name))
    x = make_inputs(comparison)
    work = decode(module, x)
    assert (work.tokens, work.steps) == (2, steps)
    output, state = decoded(work)
    # One pass over the context and the repeated token gives the same.
    start = 40 - steps // 2
    whole = torch.cat([x[:, :start], x[:, -1:].expand(-1, steps, -1)], dim=1)
    with torch.no_grad():
        truth = module(whole)[:, -1:]
    torch.testing.assert_close(output, truth, rtol=1e-4, atol=1e-5)
    assert int(state["position"]) == start + steps
    again, _ = decoded(work)
    assert torch.equal(again, output)


def test_a_short_context_is_decoded_from_its_beginning() -> None:
    work, _ = prepared("bsbr", "decode", "layer", 3)
    _, state = decoded(work)
    assert work.steps == int(state["position"]) == 6


def test_attentions_without_blocks_have_a_block_of_one_token() -> None:
    comparison = read("decode", "model", 20)
    blocks = {one.name: longest_block(build_module(comparison, one)) for one in comparison.candidates}
    assert blocks == {**dict.fromkeys(("bsbr", "sliding_window", "sparse"), 128), "linear": 64, "delta_net": 64, "gau": 256} | {
        "standard": 1,
        "hopfield": 1,
    }


@pytest.mark.parametrize("scope", ["attention", "layer", "model"])
def test_a_training_step_is_adamw_with_moments_from_the_start(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers: list[torch.optim.AdamW] = []
    adamw = torch.optim.AdamW

    def record_adamw(*arguments: Any, **options: Any) -> torch.optim.AdamW:
        optimizers.append(adamw(*arguments, **options))
        return optimizers[-1]

    monkeypatch.setattr(torch.optim, "AdamW", record_adamw)
    work, _ = prepared("standard", "train_step", scope, 20)
    (optimizer,) = optimizers
    weights = optimizer.param_groups[0]["params"]
    assert all({"exp_avg", "exp_avg_sq"} <= optimizer.state[weight].keys() for weight in weights)
    assert all(weight.grad is None for weight in weights)
    before = [weight.detach().clone() for weight in weights]
    for _ in range(200):
        work.call()
    changes = [float((weight.detach() - old).abs().max()) for weight, old in zip(weights, before, strict=True)]
    assert max(changes) > 0
    assert max(changes) < 1e-3  # timing leaves the weights almost unchanged


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_candidate_has_its_own_ff_dim(scope: str) -> None:
    comparison = read("prefill", scope, 20)
    node = candidate(comparison, "linear").node
    widths = []
    for ff_dim in (None, 7):
        one = Candidate("linear", node, ff_dim)
        layers = [m for m in build_module(comparison, one).modules() if isinstance(m, torch.nn.Linear)]
        widths.append({m.out_features for m in layers} - {32, 50})
        assert candidate_costs(comparison, one)["ff_dim"] == (48 if ff_dim is None else 7)
    assert widths == [{48}, {7}]


class NeedsData(Attention):
    """Reads its elements in Python, as a custom kernel would."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__(hidden_dim, num_heads)
        self.out_proj = torch.nn.Linear(hidden_dim, hidden_dim)

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        return (hidden_states,)

    def attend(self, *tensors: Tensor) -> Tensor:
        return tensors[0] * float(tensors[0].sum())

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self(hidden_states), {}

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return 100 * batch_size * seq_len

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        return 0


@pytest.mark.parametrize(
    ("positions", "added", "rotary"), [("sinusoidal", True, False), ("rotary", False, True), ("none", False, False)]
)
def test_positions_come_from_the_decoder_or_from_every_attention(positions: str, added: bool, rotary: bool) -> None:
    comparison = read("prefill", "model", 8, f"model.positions={positions}", "+attention.gau.rotary=false")
    assert comparison.settings.get("positions", "sinusoidal") == positions
    for one in comparison.candidates:
        model = build_module(comparison, one)
        assert isinstance(model, CausalLM)
        assert model.model.positions == added
        assert [layer.attention.rotary for layer in model.model.layers] == [
            rotary and one.name != "gau"
        ] * 2  # gau's option says false


class WithoutPositions(StandardAttention):
    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__(hidden_dim, num_heads)


def test_an_attention_without_rotary_positions_is_refused_with_advice() -> None:
    overrides = ("model.scope=model", "model.positions=rotary", "attention=[standard]")
    node = f"+attention.mine={{_target_: {__name__}.WithoutPositions}}"
    with pytest.raises(UsageError, match=r"^attention 'mine' cannot be built: it has no option rotary, .*=sinusoidal or none$"):
        read_job(compose("config", [*overrides, node]))
    assert read_job(compose("config", [*overrides[:1], *overrides[2:], node, "model.positions=none"])).model.positions == "none"
