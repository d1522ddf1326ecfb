"""Every command that takes a result folder says in one sentence what a folder is, if it cannot use it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from evals import claim, export, figures, merge
from evals.compare import __main__ as compare
from evals.paths import ROOT
from evals.report import __main__ as report
from evals.results.folder_kinds import CONTENTS, USERS

PAPER = ROOT / "results" / "paper"
COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "claim": lambda folder, _: ["bsbr faster than standard", str(folder)],
    "compare": lambda folder, _: [str(folder), str(PAPER / "seq_len")],
    "export": lambda folder, _: [str(folder)],
    "figures": lambda folder, to: [str(folder), "--plots", str(to)],
    "merge": lambda folder, to: [str(folder), "--to", str(to / "merged")],
    "report": lambda folder, to: [str(folder), "--to", str(to / "report.html")],
}
MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "claim": claim.main,
    "compare": compare.main,
    "export": export.main,
    "figures": figures.main,
    "merge": merge.main,
    "report": report.main,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_a_command_cannot_use_is_described(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "samples.jsonl").touch()
    refused = {
        tmp_path / "empty": "holds no results.csv; give a folder that evals.run wrote",
        tmp_path / "none": "does not exist; give",
        tmp_path / "file": "is a file; give",
        tmp_path / "raw": f"holds raw samples, and no results.csv, which `python -m evals.tables {tmp_path / 'raw'}` makes; give",
    }
    for kind, folder in (("accuracy", PAPER / "recall"), ("conversion", PAPER / "distillation")):
        if command not in USERS[kind]:
            refused[folder] = f"holds {CONTENTS[kind]}, which evals.{command} cannot use; use evals.export, evals.figures"
    for folder, sentence in refused.items():
        assert MAINS[command](COMMANDS[command](folder, tmp_path)) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"error: {folder} {sentence}")
        assert printed.err.count("\n") == 1
        assert printed.out == ""
