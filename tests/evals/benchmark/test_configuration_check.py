"""What is timed is checked in the configuration in which it is timed: cheats that the certificate passes are found there."""

import gc
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from bsbr import Attention
from evals.benchmark.configuration_check import ConfigurationCheck
from evals.benchmark.cost import candidate_costs
from evals.benchmark.untimed import difference_from_untimed, keep_call
from evals.benchmark.workloads import prepare
from evals.certification.certificate import certify
from evals.cli.jobs import read_job
from evals.config import Comparison
from evals.measure.clock import CpuClock
from evals.paths import CONF
from tests.evals import wrong_attentions as wrong

pytestmark = pytest.mark.xdist_group("configuration_check")
TINY = ("model.hidden_dim=32", "model.num_heads=2", "model.ff_dim=48", "model.vocab_size=50", "device.threads=1")


@pytest.fixture(scope="module", autouse=True)
def conf() -> Iterator[None]:
    threads = torch.get_num_threads()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    torch.set_num_threads(threads)


def read(*overrides: str) -> Comparison:
    return read_job(compose("config", [*TINY, *overrides]))


def of(cls: type[Attention], *overrides: str) -> Comparison:
    """A comparison whose first candidate is `cls`."""
    node = f"+attention.mine={{_target_: {cls.__module__}.{cls.__qualname__}}}"
    return read("attention=[standard]", node, "relative_to=standard", *overrides)


def finding(comparison: Comparison, *, after_calls: int = 0) -> tuple[str, str]:
    """What is found wrong with the last candidate, and what it is certified as."""
    candidate = comparison.candidates[-1]
    check = ConfigurationCheck(prepare(comparison, candidate), comparison, candidate)
    check.first_call()
    check.keep_first()
    check.change_late_inputs()
    check.second_call()
    return check.finding(candidate_costs(comparison, candidate)["flops"], 1), check.certified_as()


LONG, TRAINING = "shape.seq_len=600", "workload=forward_backward"
CHEATS: list[tuple[type[Attention], tuple[str, ...], str]] = [
    (wrong.ForgetsMaskWhenLong, (LONG,), "causality: changing the inputs from 303 on changes output 0 "),
    (wrong.ForgetsMaskWhenLong, (LONG, "workload=attention"), "causality: changing the inputs from 303 on changes output 0 "),
    (wrong.ForgetsMaskWhenLong, (LONG, "model.scope=model", "model.num_layers=2"), "streaming: output 599 "),
    (wrong.ForgetsMaskWhenLong, (LONG, TRAINING), "causality: changing the inputs from 303 on changes output 0 "),
    (wrong.ForgetsMaskInTraining, ("shape.seq_len=64", TRAINING), "causality: changing the inputs from 35 on changes output 0 "),
    (
        wrong.MixesLargeBatches,
        ("shape.seq_len=64", "shape.batch_size=8"),
        "certified first outputs: output ",
    ),
    (wrong.DropsOldestPage, ("workload=decode", LONG), "streaming: output 600 "),
    (wrong.SeesLateWindowWhenLong, (LONG,), "streaming: output 300 |certified first outputs"),
    (wrong.SkipsLateQueriesWhenLong, (LONG,), "streaming: output 450 "),
    (wrong.CopiesItemsOfLargeBatches, ("shape.seq_len=64", "shape.batch_size=8"), "certified first outputs: output 0 "),
    (
        wrong.CopiesItemsOfLargeBatches,
        ("shape.seq_len=64", "shape.batch_size=8", "workload=decode"),
        "streaming: output 64 .*differs from a pass over all 65 tokens",
    ),
    (wrong.DecodesEveryEighthWhenLong, (LONG, "workload=decode"), "streaming: output 568 "),
    (wrong.RoundsWhenLong, (LONG,), "certified first outputs: output 0 "),
    (
        wrong.DetachesKeysWhenLong,
        (LONG, TRAINING),
        "gradients: the gradient by an input of the first 199 outputs is off the certified",
    ),
    (wrong.RemembersLastInput, (LONG,), "causality: changing the inputs from 303 on changes no output"),
    (wrong.DetachesLateTokensWhenLong, (LONG, TRAINING), "slope: the slope of the loss along a random direction is off"),
    (wrong.LooksBack560, (LONG,), "reference: output 584 .* differs from the reference over all 600 tokens"),
    (wrong.LooksBack560, (LONG, TRAINING), "reference: output 584 "),
    (wrong.LooksBack560, (LONG, "model.scope=layer"), "reference: output 584 "),
    (wrong.LooksBack560, (LONG, "workload=decode"), "reference: output "),
    (wrong.RemembersByAddress, (LONG,), "causality: changing the inputs from 303 on changes no output"),
    (wrong.WorksInBackground, (LONG,), "no overwriting: what a call has returned changes afterwards|causality"),
    (wrong.CentresInPlace, ("shape.seq_len=64",), "no overwriting: a call changes its input"),
    (wrong.LazyByAttribute, ("shape.seq_len=64",), "plain tensors: a call returns a tensor with attributes .detach.: "),
    (wrong.DeclaresWorkOfMany, (LONG,), "FLOPs: a step declares .*, in matrix products that ran were counted"),
]


@pytest.mark.parametrize(("cls", "overrides", "message"), CHEATS, ids=lambda value: getattr(value, "__name__", None))
def test_a_cheat_is_found_in_the_configuration_that_is_timed(
    cls: type[Attention], overrides: tuple[str, ...], message: str
) -> None:
    assert re.match(message, finding(of(cls, *overrides))[0])


@pytest.mark.parametrize("cls", [wrong.DropsOldestPage, wrong.RemembersLastInput])
def test_the_certificate_alone_passes_these_cheats(cls: Any) -> None:
    assert [str(found) for found in certify(partial(cls, 16, 2)) if not found.passed] == []


@pytest.mark.parametrize("workload", ["prefill", "attention", "forward_backward", "train_step", "decode"])
@pytest.mark.parametrize(
    "options", [("shape.batch_size=2",), ("model.scope=layer", "device.dtype=bfloat16"), ("model.scope=model",)]
)
def test_right_attentions_are_certified_in_their_configuration(workload: str, options: tuple[str, ...]) -> None:
    if workload == "attention" and any("scope" in option for option in options):
        return
    comparison = read(f"workload={workload}", "shape.seq_len=150", "attention=[bsbr]", "attention.bsbr.chunk_size=16", *options)
    found, certified_as = finding(comparison)
    assert found == ""
    assert certified_as.startswith("2×150 float32, 1 threads, " if "batch" in options[0] else "1×150 ")
    assert (" gradients," in certified_as) == (workload in ("forward_backward", "train_step"))


# --- timed calls ----------------------------------------------------------------------------------


SKIPPING = (wrong.TiresInTime, wrong.SkipsWithoutCollector, wrong.SkipsUnderTheClock, wrong.SkipsInItsProcess)


@pytest.mark.parametrize(
    ("cls", "workload", "different"),
    [
        *((cls, "prefill", True) for cls in SKIPPING),
        (wrong.StandardAttention, "train_step", False),
        (wrong.StandardAttention, "decode", False),
        (wrong.RemembersOutputs, "prefill", False),
        (wrong.RemembersLastInput, "prefill", True),
        (wrong.TiresInTime, "forward_backward", True),
    ],
)
def test_a_timed_call_returns_what_an_untimed_one_does(
    cls: type[Attention], workload: str, different: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = of(cls, LONG, f"workload={workload}")
    candidate = comparison.candidates[-1]
    prepared = prepare(comparison, candidate)
    clock = CpuClock(prepared.work.call, prepared.renew)
    clock.first_call()
    for _ in range(25):
        clock.time_slice(1e-9)
    keep_call(tmp_path / "call", prepared, clock.returned)
    # As in the other process, which has timed nothing.
    gc.enable()
    monkeypatch.setattr(wrong.SkipsInItsProcess, "calls", {})
    assert bool(difference_from_untimed(comparison, candidate, tmp_path / "call", 1)) == different


def first_input_of_another_process(comparison: Comparison) -> torch.Tensor:
    """The input of the first call elsewhere."""
    prepared = prepare(comparison, comparison.candidates[0])
    prepared.renew()
    return prepared.read


@pytest.mark.parametrize("options", [(), ("workload=attention",), ("workload=decode",), ("model.scope=model",)])
def test_every_call_reads_a_new_input_in_the_same_memory(options: tuple[str, ...]) -> None:
    comparison = read("attention=[linear]", "shape.seq_len=40", *options)
    prepared = prepare(comparison, comparison.candidates[0])
    assert prepared.work.outputs is not None
    read_before, address, outputs = prepared.read.clone(), prepared.read.data_ptr(), []
    seen = [read_before]
    for _ in range(5):
        outputs.append(prepared.work.outputs(prepared.work.call()).clone())
        prepared.renew()
        assert prepared.read.data_ptr() == address
        assert not any(torch.equal(prepared.read, earlier) for earlier in seen)
        seen.append(prepared.read.clone())
    assert all(not torch.equal(outputs[0], later) for later in outputs[1:])
    assert not torch.equal(first_input_of_another_process(comparison), seen[1])
    if read_before.is_floating_point():
        torch.testing.assert_close(prepared.read.abs(), read_before.abs())  # as random as before
