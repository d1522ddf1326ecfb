"""How commands end: a mistake is one sentence, Ctrl-C and a closed pipe have exit codes, and none of them is a traceback."""

import io
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from evals.cli.command import command
from evals.errors import BROKEN_PIPE, INTERRUPTED, OK, USAGE, UsageError
from evals.paths import ROOT

COMMANDS = sorted(
    [path.stem for path in (ROOT / "evals").glob("*.py") if "def main(" in path.read_text()]
    + [path.parent.name for path in (ROOT / "evals").glob("*/__main__.py")]
)
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""The environment of a shell, in which Python writes what is left in its buffers at its exit."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, OK, ""),
        (UsageError("two\nlines"), USAGE, "error: two lines\n"),
        (KeyError("mine"), USAGE, "error: 'mine'\n"),
        (FileNotFoundError(2, "No such file", "there.csv"), USAGE, "error: there.csv cannot be used: No such file\n"),
        (KeyboardInterrupt(), INTERRUPTED, "come back\n"),
    ],
)
def test_an_exception_becomes_an_exit_code_and_a_sentence(
    error: BaseException | None, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command(KeyError, interrupted="come back")
    def main() -> int:
        if error is not None:
            raise error
        return OK

    assert main() == code
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback() -> None:
    @command()
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train_distributed"])  # torchrun alone starts that one
def test_a_closed_pipe_ends_every_command_silently(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with os.fdopen(writer, "w") as closed_pipe, (tmp_path / "stderr").open("w") as stderr, warnings.catch_warnings():
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        monkeypatch.setattr(sys, "stderr", stderr)
        warnings.filterwarnings("ignore", message=".* found in sys.modules", category=RuntimeWarning)  # by another test
        with pytest.raises(SystemExit) as end:
            runpy.run_module(f"evals.{name}", run_name="__main__", alter_sys=True)
        closed_pipe.flush()  # as Python does at its exit
        monkeypatch.undo()
    assert end.value.code == BROKEN_PIPE
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.parametrize("name", ["run", "export"])
def test_a_process_whose_reader_is_gone_leaves_no_traceback(name: str) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-m", f"evals.{name}", "--help"], cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=BUFFERED
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == BROKEN_PIPE


def test_a_terminal_without_utf_8_gets_plain_spellings(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))

    @command()
    def main() -> int:
        print("1.02 ± 3 % … ✓ 注")
        return 0

    assert main() == 0
    assert written.getvalue() == b"1.02 +- 3 % ... + ?\n"
