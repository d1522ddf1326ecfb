"""The console command `bsbr`: its list of commands, its errors, and that it finds our packages where others have their names."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bsbr import import_path
from evals.cli import commands
from evals.cli.commands import find_commands
from evals.errors import OK, USAGE
from evals.isolation import forkserver
from evals.paths import ROOT
from tests.evals.commands import call


def test_every_command_is_listed_with_a_sentence_of_its_docstring() -> None:
    done = call(commands.main, "--help")
    assert done.returncode == OK
    files = {path.stem for path in (ROOT / "evals").glob("*.py") if "def main(" in path.read_text()}
    packages = {path.parent.name for path in (ROOT / "evals").glob("*/__main__.py")}
    found = {name: (module, sentence) for name, module, sentence in find_commands()}
    assert found.keys() == {name.replace("_", "-") for name in files | packages}
    for name, (_, sentence) in found.items():
        assert f"\n  {name} " in done.stdout
        assert sentence[0].isupper()
        assert "`python" not in sentence
        assert " ".join(sentence.split()) in " ".join(done.stdout.split())
    assert call(commands.main).stdout == done.stdout


def test_a_command_gets_its_arguments_and_an_unknown_one_the_nearest_name() -> None:
    done = call(commands.main, "claim", "bsbr is nice")
    assert (done.returncode, "bsbr is nice" in done.stderr) == (USAGE, True)
    done = call(commands.main, "tables", "no-such-folder")
    assert (done.returncode, "no-such-folder holds no samples.jsonl" in done.stderr) == (USAGE, True)
    done = call(commands.main, "certfy")
    assert (done.returncode, done.stderr) == (
        USAGE,
        "error: bsbr has no command certfy (did you mean certify?); bsbr --help lists all\n",
    )
    for spelling in ("context-parallel", "context_parallel"):
        with pytest.raises(SystemExit) as end:  # by argparse
            call(commands.main, spelling, "--help")
        assert end.value.code == OK


def run_python(*words: str, folder: Path, path: Sequence[Path]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_without_the_packages_of_the_harness_one_sentence_says_what_to_install() -> None:
    # -S: without site-packages
    command = [sys.executable, "-S", "-m", "bsbr", "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})
    assert done.returncode == USAGE
    assert done.stderr.startswith("error: evals needs packages that are not installed")
    assert 'pip install "bsbr[extras]"' in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("package", "extra"), [("seaborn.objects", "extras"), ("transformers", "convert")])
def test_a_command_without_its_packages_says_which_extra_has_them(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"needs_{extra}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(commands, "modules", lambda: {"mine": f"needs_{extra}"})
    done = call(commands.main, "mine")
    needed = package.partition(".")[0]
    assert done.stderr == f'error: bsbr mine needs {needed}, which is not installed: pip install "bsbr[{extra}]"\n'
    assert done.returncode == USAGE


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """A folder with packages `evals` and `baselines` of somebody else, which must not be imported."""
    for name in ("evals", "baselines"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    return tmp_path


@pytest.mark.parametrize("earlier", ["on the path", "in the working folder"])
def test_packages_of_others_are_named_and_ours_are_used(others: Path, earlier: str) -> None:
    path = [others, ROOT] if earlier == "on the path" else [ROOT]
    done = run_python("-m", "bsbr", "--help", folder=others, path=path)
    assert done.returncode == OK
    assert "\n  certify " in done.stdout
    assert done.stderr == f"note: {others / 'evals'} is earlier on the path than {ROOT / 'evals'}, which is used all the same\n"


def test_workers_find_our_packages_where_others_have_their_names(others: Path) -> None:
    """A worker is forked by the fork server, which imports first, in the working folder."""
    program = (
        "from bsbr.import_path import prefer_ours; prefer_ours(); from evals.isolation import forkserver; "
        "forkserver.start(preload=['evals.isolation.worker']); from evals.isolation.worker import run_isolated; "
        "print(*run_isolated(eval, \"[__import__(name).__file__ for name in ('evals', 'baselines')]\", timeout_s=200).value)"
    )
    done = run_python("-c", program, folder=others, path=[others, ROOT])
    assert (done.returncode, done.stderr) == (OK, "")
    assert done.stdout.split() == [str(ROOT / name / "__init__.py") for name in ("evals", "baselines")]


def test_folders_without_modules_and_files_of_other_names_shadow_nothing(others: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("evals", "baselines"):
        (others / name / "__init__.py").unlink()
    monkeypatch.syspath_prepend(others)
    monkeypatch.setenv("PYTHONPATH", "")  # restored after the test
    before = [*sys.path]
    assert import_path.prefer_ours() == []
    assert sys.path == before
    (others / "baselines.py").write_text("")
    (note,) = import_path.prefer_ours()
    assert note.startswith(f"{others / 'baselines.py'} is earlier on the path")
    assert sys.path[:2] == [str(ROOT), str(others)]
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert import_path.prefer_ours() == []


def test_the_fork_server_looks_for_modules_where_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", "/first", "/second"])
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    before = dict(os.environ)
    with forkserver._same_path():
        assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(Path.cwd()), "/first", "/second"]
        program = "import sys; print(sys.path[0])"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(Path.cwd())
    assert dict(os.environ) == before
