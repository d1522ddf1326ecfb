"""The files that a result depends on: all that its attention runs, and no others."""

import sys
from pathlib import Path

import pytest

from baselines.linear import LinearAttention
from baselines.standard import StandardAttention
from bsbr import BSBRAttention
from bsbr.compiled import CompiledAttention
from evals.benchmark.code_hash import attention_digest, source_files
from evals.config import Candidate, Model
from evals.paths import ROOT

MODEL = Model(scope="attention", hidden_dim=16, num_heads=4, ff_dim=1, num_layers=1, vocab_size=1)


def named(files: list[Path]) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in files}


def test_a_baseline_does_not_depend_on_bsbr() -> None:
    around = {
        "bsbr/backends/selection.py",
        "bsbr/interface.py",
        "bsbr/padding.py",
        "bsbr/paging.py",
        "bsbr/precision.py",
        "bsbr/process_group.py",
        "bsbr/model.py",
        "bsbr/convolution.py",
    }
    assert named(source_files(StandardAttention(16, 2))) == {"baselines/standard.py", "bsbr/backends/sdpa.py", *around}


def test_a_compiled_attention_depends_on_what_it_compiles() -> None:
    compiled, attention = CompiledAttention(16, 2, attention=LinearAttention), LinearAttention(16, 2)
    assert set(source_files(compiled)) == {*source_files(attention), ROOT / "bsbr" / "compiled.py"}


def test_late_imports_and_compiled_files_count() -> None:
    found = named(source_files(BSBRAttention(16, 2)))
    assert found >= {
        "bsbr/attention.py",
        "bsbr/backends/pytorch.py",
        "bsbr/backends/cpp/bsbr.cpp",
        "bsbr/backends/cpp/bsbr/sizes.h",
        "bsbr/backends/cpp/tensors.h",
        "bsbr/context_parallel.py",
        "bsbr/backends/triton/output_backward.py",
    }
    assert not any(name.startswith("bsbr/convert") for name in found)


def test_a_conversion_depends_on_the_code_that_converts() -> None:
    node = {"_target_": "evals.conversion.decoders.ConvertedDecoder", "model_type": "llama"}
    converted = source_files(Candidate("converted", node).build(MODEL))
    assert named(converted) >= {"bsbr/convert/retrieval.py", "bsbr/backends/cpp/bsbr.cpp", "bsbr/reference.py"}


def test_an_attention_of_a_user_is_followed_through_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "mine/__init__.py": "from mine.parts import helped\n",
        "mine/kinds.py": """
from bsbr import MultiHeadAttention
from . import parts as own
import mine.plain

class Mine(MultiHeadAttention):
    def attend(self, *tensors):
        from mine import helped, late
        return late.same(helped(tensors))

    reference = attend

    def flops(self, seq_len, batch_size=1):
        return 0
""",
        "mine/parts.py": "import torch\nfrom .deep.down import helped\n",
        "mine/deep/__init__.py": "",
        "mine/deep/down.py": "def helped(x):\n    return x[0]\n",
        "mine/plain.py": "",
        "mine/late.py": "def same(x):\n    return x\n",
        "mine/other.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        mine = Candidate("mine", {"_target_": "mine.kinds.Mine"}).build(MODEL)
        found = {path.relative_to(tmp_path / "mine").as_posix() for path in source_files(mine) if path.is_relative_to(tmp_path)}
        assert found == {"kinds.py", "parts.py", "plain.py", "late.py", "deep/down.py"}
        before = attention_digest(mine)
        (tmp_path / "mine" / "other.py").write_text("changed = True")
        assert attention_digest(mine) == before
        (tmp_path / "mine" / "late.py").write_text("def same(x):\n    return -x\n")
        assert attention_digest(mine) != before
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
            del sys.modules[name]
