"""The certificate passes correct attentions and fails wrong ones, each in the check of its error."""

import inspect
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from torch import Tensor

from baselines.delta_net import DeltaNetAttention
from baselines.standard import StandardAttention
from bsbr import Attention, BSBRAttention
from evals.certification.certificate import certify
from evals.certification.checks import CHECKS
from evals.certify import main
from evals.paths import ROOT
from tests.evals import wrong_attentions as wrong
from tests.evals.benchmark.test_configuration_check import CHEATS, SKIPPING
from tests.evals.commands import call, typed

NEED_CUDA = {"linear_fla", "delta_net_fla", "gated_delta_net_fla", "sliding_window_flex", "sparse_flex", "standard_cudnn"}
SHIPPED = [path for path in sorted((ROOT / "conf" / "attention").glob("*.yaml")) if path.stem != "modern"]  # names others


def failures(build: Any) -> dict[str, str]:
    """Details of the checks that fail, by name."""
    return {finding.check: finding.detail for finding in certify(build) if not finding.passed}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_attention_passes_or_needs_cuda(path: Path) -> None:
    (node,) = yaml.safe_load(path.read_text()).values()
    build = partial(instantiate, node, hidden_dim=64, num_heads=2)
    if path.stem in NEED_CUDA:
        with pytest.raises(NotImplementedError, match=r"CUDA|does not support backward on CPU"):
            failures(build)
    else:
        assert failures(build) == {}


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_overlap": 5, "num_kv_heads": 2},
        {"compression_factor": 4, "retrieval_top_k": 2},
        {"chunk_overlap": 37, "rotary": True},
        {"meta_projections": True, "meta_pooling": "last"},
    ],
    ids=str,
)
def test_bsbr_passes_with_its_options(options: dict[str, Any]) -> None:
    assert failures(partial(BSBRAttention, 64, 4, chunk_size=24, **options)) == {}


def test_bsbr_in_chunks_of_one_token_fails_for_its_n_by_n_weights() -> None:
    # By torch: of products that are this small, C++ computes mostly padding, and its FLOPs are not those declared.
    assert set(failures(partial(BSBRAttention, 16, 2, chunk_size=1, chunk_states="sum", impl="torch"))) == {"memory"}


# --- the wrong ones -----------------------------------------------------------------------------

BSBR, LINEAR, WINDOW = {"chunk_size": 64}, {"chunk_size": 16}, {"window_size": 16}
FUTURE = {"causality", "padding", "streaming"}
"""An attention that sees the future also sees padding on the right, and cannot be streamed."""

WRONG: list[tuple[type[Attention], dict[str, Any], set[str], str, str]] = [
    # class, options, all checks that must fail, the check that names the cause, and its message
    (wrong.TriuForTril, {}, FUTURE | {"parity"}, "causality", "changing the inputs after 0 changes output 0 "),
    (wrong.ReshapedHeads, {}, FUTURE, "causality", "changing the inputs after 0 changes output 0 "),
    (wrong.RetrievesOwnChunk, BSBR, FUTURE | {"parity"}, "causality", "changing the inputs after 0 changes output 0 "),
    (wrong.MetaQueryFromLastToken, BSBR, FUTURE, "causality", "changing the inputs after 128 changes output 128 "),
    (
        wrong.DividedByLength,
        LINEAR,
        {"padding", "streaming", "parity"},
        "padding",
        "9 padded positions to the left change output 0 ",
    ),
    (wrong.PaddingIgnored, {}, {"padding"}, "padding", "33 padded positions to the left change output 0 .* \\(n=1\\)"),
    (wrong.PaddingZeroed, {}, {"padding"}, "padding", "33 padded positions to the left change output 0 .* \\(n=1\\)"),
    (wrong.EmptySoftmax, {}, {"finite"}, "finite", "a row that is all padding: a gradient by .* with NaN"),
    (wrong.MixesBatch, {}, {"batch"}, "batch", "item 0 of a batch of 3 differs from itself alone in output 1 "),
    (wrong.WindowOffByOne, WINDOW, {"parity"}, "parity", "attend is off its reference by .* in torch.float64 \\(n=17, "),
    (wrong.CorrectsAfterWriting, LINEAR, {"parity", "streaming"}, "parity", "attend is off its reference by .* in torch.float64"),
    (wrong.ScalarState, LINEAR, {"parity", "streaming", "finite", "flops"}, "parity", "attend is off its reference by .* \\(n=1, "),
    (wrong.DetachedKeys, {}, {"parity"}, "parity", "the gradient of attend by its tensor 1 is off its reference by 1.0e"),
    (wrong.AccumulatesInBfloat16, LINEAR, {"parity"}, "parity", "attend is off its reference by .* in torch.float32"),
    (
        wrong.DropoutInEval,
        {},
        FUTURE | {"determinism", "contract", "parity", "batch", "conditions"},
        "determinism",
        "two calls on the same input differ in eval mode",
    ),
    (wrong.ReadsBeforeWriting, LINEAR, {"streaming"}, "streaming", r"extend over \[1, 1, 1, 1, … 15 pieces\] .* in output 1 "),
    (wrong.StaleRetrieval, BSBR, {"streaming"}, "streaming", r"extend over \[1, 1, .* differs from forward in output 65 "),
    (wrong.RemembersOnModule, {}, {"streaming", "retention"}, "streaming", "the state used a second time"),
    (wrong.WritesIntoState, LINEAR, {"streaming"}, "streaming", "extend by 1 tokens after 1 changes the state it is given: total"),
    (wrong.PositionsRestart, WINDOW, {"streaming"}, "streaming", "differs from forward in output 1 "),
    (
        wrong.ViewAsState,
        WINDOW,
        {"state_size"},
        "state_size",
        "state_bytes.1, batch_size=2. declares 256 bytes, the state holds 392",
    ),
    (wrong.NormWithoutEpsilon, {**BSBR, "impl": "torch"}, {"finite", "padding"}, "finite", "inputs that are all 0: .* NaN"),
    (wrong.SoftmaxWithoutShift, {}, {"parity", "finite", "memory"}, "finite", "inputs of size 1e3: an output with NaN"),
    (
        wrong.QuadraticUnderLinearLabel,
        LINEAR,
        {"memory"},
        "memory",
        r"grows 15\.\d× from .* at n=1024 .* allowed 4.6×",
    ),
    (wrong.FlopsTimesTen, LINEAR, {"flops"}, "flops", r"flops\(67\) declares .* counted"),
    (wrong.FlopsByTen, LINEAR, {"flops"}, "flops", r"flops\(67\) declares .* counted"),
    (wrong.FlopsOfQuadratic, {}, {"flops"}, "flops", "declares .* counted"),
    (wrong.StateBytesOfOneHead, {}, {"state_size"}, "state_size", "declares 128 bytes, the state holds 264"),
    (wrong.ForgetsMaskInTraining, {}, {"conditions"}, "conditions", "training mode without dropout changes output 0 "),
    (wrong.ForgetsMaskWithThreads, {}, {"conditions"}, "conditions", "a second thread changes output 0 "),
    (
        wrong.ScalesWithoutGradients,
        {},
        {"conditions", "causality", "parity", "streaming"},
        "conditions",
        "computing gradients changes output 1 ",
    ),
    (wrong.RoundsInInference, {}, {"conditions"}, "conditions", "inference mode changes output "),
    (wrong.IgnoresStrides, {}, {"conditions"}, "conditions", "an input that lies in memory time first changes output "),
    (wrong.ForgetsScaleInCopies, {}, {"conditions"}, "conditions", "a deep copy changes output 1 "),
    (
        wrong.ScaledByFirstInput,
        {},
        {"conditions", "parity", "streaming"},
        "conditions",
        "training mode without dropout changes output 1 ",  # that one is a new module
    ),
    (wrong.OverwritesOutput, {}, {"conditions"}, "conditions", "a second call overwrites what the first returned: output 0 "),
    (wrong.LazyOutput, {}, {"contract"}, "contract", "forward returns a Lazy: only a plain tensor"),
    (wrong.RepeatsOutput, {}, {"contract", "batch", "streaming"}, "contract", "forward returns a view that repeats its elements"),
    (wrong.MultipliesPaddingByZero, {}, {"padding"}, "padding", "33 padded positions .* change output 0 "),
    (
        wrong.ForgetsMaskWithGroupedHeads,
        {"num_kv_heads": 1},
        FUTURE | {"parity"},
        "causality",
        "changing the inputs after 0 changes output 0 ",
    ),
    (wrong.ClampsScores, {}, {"parity", "memory"}, "parity", "attend is off its reference by .* for large inputs"),
    (wrong.LooksBack560, {}, {"parity"}, "parity", r"attend is off its reference by .* for long inputs \(n=600, "),
    (wrong.LazyByAttribute, {}, {"contract"}, "contract", "forward returns a tensor with attributes of its own: detach"),
    (
        wrong.CentresInPlace,
        {},
        {"determinism", "contract", "padding", "streaming", "batch", "conditions"},
        "contract",
        r"forward changes its input \(n=1\)",
    ),
    (wrong.ScalesQueriesInPlace, {}, {"contract"}, "contract", r"attend changes its tensor 0 \(n=1\)"),
    (wrong.FoldsInitialWeights, {}, {"conditions"}, "conditions", "a module that has loaded its weights changes output 0 "),
    (wrong.TakesAllThreads, {}, {"conditions"}, "conditions", "a call changes torch's number of threads for the whole process"),
    (wrong.RemembersOutputs, {}, {"retention"}, "retention", "forward keeps .* bytes that it does not return"),
    (wrong.WorksInProject, {}, {"projections"}, "projections", "project runs .* per token at n=1027 and .* at n=259"),
    (wrong.WorksInOutput, {}, {"projections"}, "projections", "output runs .* per token at n=1027 and .* at n=259"),
    (
        wrong.SumsInProject,
        {},
        {"projections"},
        "projections",
        "changing the first of 1027 tokens changes 100% of what project returns",
    ),
    (wrong.KeepsStateOutside, {}, {"retention"}, "retention", "extend keeps .* bytes that it does not return"),
    (wrong.Raises, {}, {check.name for check in CHECKS}, "contract", "raised RuntimeError: no kernel for this second line"),
]


@pytest.mark.parametrize(("cls", "options", "checks", "check", "message"), WRONG, ids=[case[0].__name__ for case in WRONG])
def test_a_wrong_attention_fails_the_check_of_its_error(
    cls: type[Attention], options: dict[str, Any], checks: set[str], check: str, message: str
) -> None:
    failed = failures(partial(cls, 16, 2, **options))
    assert set(failed) == checks
    assert re.search(message, failed[check])


def test_a_wrong_shape_is_reported_by_the_contract() -> None:
    failed = failures(partial(wrong.WrongShape, 16, 2))
    assert failed["contract"] == "forward returns [2, 1, 15] torch.float64 for [2, 1, 16] torch.float64"


def test_every_wrong_attention_is_tried() -> None:
    written = {cls for _, cls in inspect.getmembers(wrong, inspect.isclass) if cls.__module__ == wrong.__name__}
    where_timed = {case[0] for case in CHEATS} | set(SKIPPING)
    assert written == {case[0] for case in WRONG} | where_timed | {wrong.WrongShape, wrong.Lazy, wrong._StandardOf}


class Float32Kernel(StandardAttention):
    """Right, in float32 whatever it is given."""

    def attend(self, *tensors: Tensor) -> Tensor:
        return super().attend(*(tensor.float() for tensor in tensors)).to(tensors[0].dtype)

    def attend_pages(self, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        return self.attend(q, torch.cat(keys, dim=2), torch.cat(values, dim=2))


@pytest.mark.parametrize("reference", [StandardAttention.reference, None])
def test_kernels_in_float32_are_held_to_float32_once_they_say_so(reference: Any) -> None:
    silent = failures(partial(type("Silent", (Float32Kernel,), {"reference": reference}), 16, 2))
    assert {"padding", "streaming", "parity"} <= set(silent)
    assert all("declare computes_in = torch.float32" in silent[check] for check in ("padding", "streaming", "parity"))
    declared = type("Declared", (Float32Kernel,), {"computes_in": torch.float32, "reference": reference})
    assert failures(partial(declared, 16, 2)) == {}


def test_kernels_in_bfloat16_are_not_those_in_float32_that_they_say_they_are() -> None:
    rounded = type("Rounded", (wrong.AccumulatesInBfloat16,), {"computes_in": torch.float32})
    assert set(failures(partial(rounded, 16, 2, chunk_size=16))) >= {"parity"}


def test_an_attention_that_overflows_in_float16_fails_where_a_sweep_uses_it() -> None:
    class Overflows(StandardAttention):
        def attend(self, *tensors: Tensor) -> Tensor:
            q, k, v = tensors
            return super().attend(q, k, 1e4 * v) / 1e4

    build = partial(Overflows, 16, 2)
    assert failures(build) == {}
    found = {finding.check: finding.detail for finding in certify(build, timed_in=torch.float16) if not finding.passed}
    assert list(found) == ["finite"]
    assert "torch.float16" in found["finite"]


@pytest.mark.parametrize(
    ("cls", "options", "check"),
    [
        (wrong.TriuForTril, {}, "causality"),
        (wrong.AccumulatesInBfloat16, LINEAR, "parity"),
        (wrong.DetachedKeys, {}, "parity"),
        (wrong.WindowOffByOne, WINDOW, None),
    ],
)
def test_failures_found_without_a_reference(cls: type[Attention], options: dict[str, int], check: str | None) -> None:
    unreferenced = type(cls.__name__, (cls,), {"reference": None})
    assert (check in failures(partial(unreferenced, 16, 2, **options))) == (check is not None)


@pytest.mark.parametrize("finest", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_without_float64_are_certified_in_their_finest_dtype(finest: torch.dtype) -> None:
    """As on a GPU, but simulated on the CPU: errors larger than rounding are found."""

    def refuses_finer(cls: type[Attention]) -> type[Attention]:
        def attend(self: Any, *tensors: Tensor) -> Tensor:
            if torch.finfo(tensors[0].dtype).eps < torch.finfo(finest).eps:
                raise NotImplementedError(f"no kernel for {tensors[0].dtype}")
            return cls.attend(self, *tensors)

        return type(cls.__name__, (cls,), {"attend": attend})

    def failed(cls: type[Attention], **options: Any) -> set[str]:
        build = partial(refuses_finer(cls), 16, 2, **options)
        with pytest.raises(NotImplementedError, match=r"no kernel for torch\.float64"):
            failures(build)
        return {finding.check for finding in certify(build, "cpu", finest) if not finding.passed}

    assert failed(DeltaNetAttention, chunk_size=16) == set()
    assert failed(StandardAttention) == set()
    if finest == torch.bfloat16:  # what is larger than its rounding is larger than that of the others
        assert {"causality", "streaming"} <= failed(wrong.TriuForTril)
        assert "streaming" in failed(wrong.StaleRetrieval, **BSBR)
        assert "state_size" in failed(wrong.StateBytesOfOneHead)


@pytest.mark.parametrize("cls", [wrong.Raises, wrong.TakesAllThreads])
def test_certifying_leaves_the_process_as_it_was(cls: type[Attention]) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert failures(partial(cls, 16, 2))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


# --- the command --------------------------------------------------------------------------------


SMALL = ("model.hidden_dim=32", "model.num_heads=2")


def test_the_command_prints_a_table_and_each_failure(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "conf" / "attention"
    folder.mkdir(parents=True)
    (tmp_path / "mine" / "peeks.py").write_text(
        "import os\nimport torch.nn.functional as F\nfrom baselines.standard import StandardAttention\n"
        "class Peeks(StandardAttention):\n"
        "    def attend(self, *tensors):\n        return F.scaled_dot_product_attention(*tensors)\n"
        "class Leaves(StandardAttention):\n    def attend(self, *tensors):\n        os._exit(4)\n"
    )
    (folder / "peeks.yaml").write_text("peeks: {_target_: peeks.Peeks}\n")
    (folder / "leaves.yaml").write_text("leaves: {_target_: peeks.Leaves}\n")
    done = typed("python", "-m", "evals.certify", "--config-dir", str(folder.parent), "attention=[linear,peeks,leaves]", *SMALL)
    assert (done.returncode, done.stderr) == (1, "")
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    assert rows["linear"] == ["✓"] * len(CHECKS)
    assert rows["peeks"].count("✗") == 4
    assert rows["leaves"] == ["crash"]
    assert re.search(r"^peeks, causality: changing the inputs after 0 changes output 0 ", done.stdout, flags=re.MULTILINE)
    assert "leaves, the certificate ended as crash: exited with code 4" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.split("\n\n")[0].splitlines())


def test_the_command_exits_with_0_if_all_pass() -> None:
    done = call(main, "attention=[standard]", *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"^standard, certified: {len(CHECKS)} checks, [1-9]\d+ configurations$", done.stdout, flags=re.MULTILINE)


def test_help_describes_every_check() -> None:
    done = call(main, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  {check.name} " in done.stdout for check in CHECKS)


def test_an_unknown_attention_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["certify.py", "attention=[nope]"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: unknown attention 'nope'; known are bsbr, bsbr_token, delta_net, ")
