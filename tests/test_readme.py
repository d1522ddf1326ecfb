"""The commands, code and excerpts of the README are correct as they are written there."""

import re
from pathlib import Path
from subprocess import CompletedProcess

import pandas as pd
import pytest

from evals.paths import ROOT
from evals.results import latency_table
from evals.results.frames import read_table
from tests.evals.commands import typed

pytestmark = pytest.mark.xdist_group("readme")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def block(language: str, holding: str) -> str:
    (found,) = [text for kind, text in BLOCKS if kind == language and holding in text]
    return str(found)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_model_example_runs() -> None:
    names: dict[str, object] = {}
    exec(block("python", "BSBRModel("), names)
    assert list(names["logits"].shape) == [2, 300, 10000]  # type: ignore[attr-defined]
    assert list(names["answer"].shape) == [1, 20]  # type: ignore[attr-defined]


def test_the_excerpt_of_a_sweep_shows_the_committed_results() -> None:
    results = read_table(ROOT / "results" / "paper" / "seq_len").assign(detail="")
    printed = latency_table.render(results).splitlines()
    excerpt = block("", "speed-up over standard").splitlines()
    assert excerpt
    assert set(excerpt) <= set(printed)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `mine` outside the repository, with the two files of the README."""
    folder = tmp_path_factory.mktemp("user") / "mine"
    (folder / "conf" / "attention").mkdir(parents=True)
    assert "`mine/cosine.py`:" in README
    assert "`mine/conf/attention/cosine.yaml`:" in README
    (folder / "cosine.py").write_text(block("python", "class CosineAttention"))
    (folder / "conf" / "attention" / "cosine.yaml").write_text(block("yaml", "cosine:"))
    return folder


def as_written(holding: str, mine: Path, *more: str) -> "CompletedProcess[str]":
    """Runs the command of the README that contains `holding`, with the real path of `mine`."""
    (line,) = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if holding in line]
    words = [word.strip("'").replace("mine/conf", str(mine / "conf")) for word in line.split("#")[0].split()]
    return typed(*words, *more)


def test_the_added_attention_is_certified(mine: Path) -> None:
    done = as_written("evals.certify --config-dir", mine)
    assert (done.returncode, done.stderr) == (0, "")
    row, badge = [line for line in done.stdout.splitlines() if line.startswith("cosine")]
    assert set(row.split()[1:]) == {"✓"}
    assert badge.startswith("cosine, certified: ")


def test_the_added_attention_is_compared_like_the_others(mine: Path) -> None:
    folders = (f"results_dir={mine / 'results'}", f"plots_dir={mine / 'plots'}")
    small = (
        "shape.seq_len=100,200",
        "model.hidden_dim=32",
        "model.num_heads=2",
        "sampling.min_rounds=1",
        "sampling.time_slices=2",
        "sampling.budget_s=0.01",
    )
    done = as_written("evals.run --config-dir", mine, *folders, *small)
    assert (done.returncode, done.stderr) == (0, "")
    rows = pd.read_csv(mine / "results" / "seq_len" / "results.csv")
    assert rows[rows["attention"] == "cosine"]["outcome"].tolist() == ["ok", "ok"]
    assert set(rows["attention"]) == {"standard", "bsbr", "cosine"}
    assert 'id="cosine"' in (mine / "plots" / "seq_len" / "speedup.svg").read_text()


def test_the_map_of_folders_names_every_package_and_only_what_exists() -> None:
    tree = block("", "the core, torch only")
    parent, named = "", set()
    for line in tree.splitlines():
        for name in re.findall(r"(?:^ *|[ ;] )([\w./]+/)(?=[ :])", line):
            parent = parent if line.startswith(" ") else name
            named.add(parent + name if line.startswith(" ") else name)
    packages = {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in (ROOT / "evals").glob("*/__init__.py")}
    assert packages <= named
    assert all((ROOT / name).is_dir() for name in named - {"results/", "plots/"})
    assert len(tree.splitlines()) <= 15
