"""Attentions that other distributions register by entry point."""

import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from evals import certify, run
from evals.cli.help_text import run_help
from evals.errors import OK, USAGE
from tests.evals.commands import call

MODULE = """
from baselines.linear import LinearAttention

class Mine(LinearAttention):
    pass
"""


def install(folder: Path, name: str, attention: str, place: str = "attentions") -> None:
    """Lays a distribution into a folder as pip would: a package with a folder of YAML files, and its entry point."""
    (folder / name / "attentions").mkdir(parents=True)
    (folder / name / "__init__.py").write_text(MODULE)
    (folder / name / "attentions" / f"{attention}.yaml").write_text(f"{attention}:\n  _target_: {name}.Mine\n  chunk_size: 16\n")
    (folder / f"{name}-1.0.dist-info").mkdir()
    (folder / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / f"{name}-1.0.dist-info" / "entry_points.txt").write_text(f"[bsbr.attentions]\n{name} = {name}.{place}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ConfigStore.instance(), "repo", {**ConfigStore.instance().repo})
    return tmp_path


def test_a_registered_attention_is_listed_certified_and_swept(site: Path) -> None:
    install(site, "somebody", "theirs")
    assert "theirs" in run_help("`x`: y.")
    assert "somebody" not in sys.modules  # help imports nothing of theirs
    small = ("model.hidden_dim=16", "model.num_heads=1", "sampling=quick", "sampling.budget_s=0.01", "figures=false")
    done = call(run.main, "sweep=seq_len", "shape.seq_len=40,50", "attention=[theirs]", "attention.theirs.chunk_size=8", *small)
    assert (done.returncode, done.stderr) == (OK, "")
    assert "theirs" in (site / "results" / "certificates.jsonl").read_text()
    assert (site / "results" / "seq_len" / "results.csv").read_text().count(",theirs,") == 2
    done = call(run.main, "sweep=seq_len", "attention=[their]")
    assert (done.returncode, "did you mean theirs?" in done.stderr) == (USAGE, True)


@pytest.mark.parametrize(
    ("name", "attention", "place", "sentence"),
    [
        ("somebody", "bsbr", "attentions", "is an attention bsbr, and so is one of this project: uninstall"),
        ("elsebody", "theirs", "attentions", "is an attention theirs, and so is one of elsebody: uninstall"),
        (
            "somebody",
            "theirs",
            "nowhere",
            "registers its attentions as somebody.nowhere, which is no package folder with YAML files",
        ),
    ],
)
def test_a_wrong_entry_point_is_one_sentence(site: Path, name: str, attention: str, place: str, sentence: str) -> None:
    install(site, name, attention, place)
    if name == "elsebody":
        install(site, "somebody", "theirs")
    done = call(certify.main, "attention=[theirs]")
    assert (done.returncode, sentence in done.stderr) == (USAGE, True), done.stderr
    assert done.stderr.count("\n") == 1
