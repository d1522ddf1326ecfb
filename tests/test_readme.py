"""What the README shows works as it stands there."""

import re
from pathlib import Path
from subprocess import CompletedProcess

import pandas as pd
import pytest

from evals.paths import ROOT
from tests.evals.commands import typed

pytestmark = pytest.mark.xdist_group("readme")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def block(language: str, holding: str) -> str:
    (found,) = [text for kind, text in BLOCKS if kind == language and holding in text]
    return str(found)


def test_the_model_example_runs() -> None:
    names: dict[str, object] = {}
    exec(block("python", "BSBRModel("), names)
    assert list(names["outputs"].shape) == [2, 256, 512]  # type: ignore[attr-defined]
    assert list(names["answer"].shape) == [1, 20]  # type: ignore[attr-defined]


def test_the_example_of_a_conversion_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block("python", "convert_to_bsbr("), names)
    assert list(names["answer"].shape) == [1, 305]  # type: ignore[attr-defined]
    assert type(names["again"]) is type(names["converted"])


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's two files where the README says that they lie, outside the repository."""
    folder = tmp_path_factory.mktemp("user") / "mine"
    (folder / "conf" / "attention").mkdir(parents=True)
    assert "`mine/cosine.py`:" in README
    assert "`mine/conf/attention/cosine.yaml`:" in README
    (folder / "cosine.py").write_text(block("python", "class CosineAttention"))
    (folder / "conf" / "attention" / "cosine.yaml").write_text(block("yaml", "cosine:"))
    return folder


def as_written(holding: str, mine: Path, *more: str) -> "CompletedProcess[str]":
    """Runs the line of the README that holds this, with `mine` where it really is."""
    (line,) = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if holding in line]
    words = [word.strip("'").replace("mine/conf", str(mine / "conf")) for word in line.split("#")[0].split()]
    return typed(*words, *more)


def test_the_added_attention_is_certified(mine: Path) -> None:
    done = as_written("evals.certify --config-dir", mine)
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("cosine")]
    assert set(row.split()[1:]) == {"✓"}


def test_the_added_attention_is_compared_like_the_others(mine: Path) -> None:
    places = (f"results_dir={mine / 'results'}", f"plots_dir={mine / 'plots'}")
    small = (
        "shape.seq_len=100,200",
        "model.hidden_dim=32",
        "model.num_heads=2",
        "sampling.min_rounds=1",
        "sampling.time_slices=2",
        "sampling.budget_s=0.01",
    )
    done = as_written("evals.run --config-dir", mine, *places, *small)
    assert (done.returncode, done.stderr) == (0, "")
    rows = pd.read_csv(mine / "results" / "seq_len" / "results.csv")
    assert rows[rows["attention"] == "cosine"]["outcome"].tolist() == ["ok", "ok"]
    assert set(rows["attention"]) == {"standard", "bsbr", "cosine"}
    assert 'id="cosine"' in (mine / "plots" / "seq_len" / "speedup.svg").read_text()


def test_the_tree_of_folders_is_the_one_there_is() -> None:
    tree = block("", "interface.py     Attention")
    folder, named = "", set()
    for line in tree.splitlines():
        for name in re.findall(r"(?:^|; |^  )([\w.]+(?:/|\.py))(?=[\s,:])", line):
            folder = name if name.endswith("/") else folder
            named.add(name if name.endswith("/") else folder + name)
    packaged = {path.relative_to(ROOT).as_posix() for package in ("bsbr", "evals") for path in (ROOT / package).glob("[a-z]*.py")}
    assert packaged <= named
    assert all((ROOT / name).exists() for name in named - {"results/", "plots/"})
