"""Tests of `impls`, which compares each attention on several backends, and of compiled attentions."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir

from baselines.delta_net import DeltaNetAttention
from bsbr.compiled import CompiledAttention
from evals.cli.jobs import read_job
from evals.config import Comparison
from evals.errors import UsageError
from evals.paths import CONF


def read(*arguments: str) -> Comparison:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return read_job(compose("config", [*arguments, "shape.seq_len=32"]), {})


def test_each_attention_is_a_candidate_on_each_of_its_backends() -> None:
    comparison = read("sweep=backends", "attention=[standard,linear,bsbr]")
    names = [candidate.name for candidate in comparison.candidates]
    assert names == [
        *("standard_torch", "standard_compile"),
        *("linear_torch", "linear_compile", "linear_cpp"),
        *("bsbr_torch", "bsbr_compile", "bsbr_cpp"),
    ]
    assert comparison.relative_to in names
    with torch.device("meta"):
        built = {one.name: one.build(comparison.model) for one in comparison.candidates}
    assert [built[f"linear_{impl}"].impl for impl in ("torch", "cpp")] == ["torch", "cpp"]
    assert built["linear_compile"].implementation() == "compile"
    assert built["linear_compile"].get_submodule("attention").impl == "torch"


def test_the_certificate_is_made_where_a_backend_runs() -> None:
    """A backend that lacks a dtype of the certificate, or takes minutes to compile, is certified as what it computes."""
    by_name = {one.name: one.certified.node for one in read("sweep=backends", "attention=[linear]").candidates}
    assert [by_name[f"linear_{name}"]["impl"] for name in ("torch", "compile", "cpp")] == ["torch", "torch", "auto"]
    assert all(node["_target_"] == "baselines.linear.LinearAttention" for node in by_name.values())


def test_what_cannot_be_compared_is_one_sentence() -> None:
    with pytest.raises(UsageError, match="impls must be null or a list of backends"):
        read("impls=cpp")
    with pytest.raises(UsageError, match="impl=compile compiles forward and attend, but workload=decode calls extend"):
        read("attention.linear.impl=compile", "workload=decode")
    with pytest.raises(UsageError, match=r"impl must be one of auto, torch, triton, cpp, got 'fortran'"):
        read("attention.bsbr.impl=fortran")


def test_a_compiled_attention_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced as for any compiler, but run by torch: generating code would take half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    compiled = CompiledAttention(16, 2, attention=partial(DeltaNetAttention, chunk_size=4, impl="torch")).double()
    attention, x = compiled.attention, torch.randn(2, 11, 16, dtype=torch.float64)
    for one in (compiled, deepcopy(compiled)):
        torch.testing.assert_close(one(x), attention(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled.attend(*compiled.project(x)), attention.attend(*attention.project(x)))
    output, state = compiled.extend(x[:, :7])
    torch.testing.assert_close(torch.cat([output, compiled.extend(x[:, 7:], state)[0]], dim=1), attention(x))
    assert compiled.flops(11) == attention.flops(11)
    assert compiled.state_bytes(11) == attention.state_bytes(11)
