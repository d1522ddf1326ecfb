"""`evals.compare`: its numbers are those of the command line, it resumes, and a class of a cell is measured like any other."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.figure import Figure

import evals
from evals import run
from evals.api.attentions import read_choices
from evals.api.results import Results
from evals.cli.display import BarDisplay
from evals.cli.overrides import quote
from evals.errors import UsageError
from evals.paths import ROOT
from evals.results.ledger import Ledger
from tests.evals.api.cells import COSINE, executed
from tests.evals.commands import call, typed

pytestmark = pytest.mark.xdist_group("api")
SMALL: dict[str, Any] = {"hidden_dim": 32, "num_heads": 2, "threads": 1, "sampling": "quick"}
SETTINGS = {"sampling.budget_s": 0.01, "sampling.min_rounds": 2, "sampling.time_slices": 3}
NAMES = ["standard", "Cosine", "sharp"]


def compare(folder: Path, cell: str = COSINE, count: int = 3, **options: Any) -> Results:
    """Compares the first attentions of NAMES, of which two are made from the class of a cell."""
    cosine = executed(cell)["Cosine"]
    attentions = ["standard", cosine, ("sharp", cosine, {"temperature": 20.0})][:count]
    values = {"seq_len": [40, 65], **SMALL, "settings": SETTINGS, "results_dir": folder, **options}
    return evals.compare(attentions, **values)


def rounds(ledger: Ledger) -> list[tuple[str, str, int, bool]]:
    keys = ("comparison", "attention", "round", "is_control")
    return [tuple(record[key] for key in keys) for record in ledger.read()[0] if record["kind"] == "latency"]


class Measured:
    """Results of a call that was interrupted in its second round, and made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger(folder / "seq_len" / "samples.jsonl")

        def interrupt(_: BarDisplay, message: str, share: float) -> None:
            if message == "round 2":
                os.kill(os.getpid(), signal.SIGINT)

        handler = signal.getsignal(signal.SIGINT)
        with patch.object(BarDisplay, "report", interrupt), pytest.raises(KeyboardInterrupt):
            compare(folder)
        assert signal.getsignal(signal.SIGINT) is handler
        self.before = self.ledger.path.read_bytes()
        self.results = compare(folder)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(tmp_path_factory.mktemp("api"))


def test_an_interrupted_call_resumes(measured: Measured) -> None:
    kept = [json.loads(line) for line in measured.before.splitlines()]
    assert 0 < sum(record["kind"] == "latency" for record in kept) < len(rounds(measured.ledger))
    assert measured.ledger.path.read_bytes().startswith(measured.before)
    assert len(set(rounds(measured.ledger))) == len(rounds(measured.ledger)) == 2 * 2 * 4  # two lengths and rounds, one control
    table = measured.results.table()
    assert sorted(zip(table["seq_len"], table["attention"], strict=True)) == sorted((n, name) for n in (40, 65) for name in NAMES)
    assert (table["outcome"] == "ok").all()


def test_the_command_in_the_ledger_measures_nothing_more_and_writes_the_same_table(measured: Measured, tmp_path: Path) -> None:
    (command,) = {record["command"] for record in measured.ledger.read()[0] if record["kind"] == "command"}
    python, m, module, *arguments = shlex.split(command)
    assert (python, m, module) == ("python", "-m", "evals.run")
    before, known = (measured.folder / "seq_len" / "results.csv").read_bytes(), rounds(measured.ledger)
    done = call(run.main, *arguments, f"plots_dir={tmp_path}", "figures=false")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Nothing is left to measure" in done.stdout
    assert rounds(measured.ledger) == known
    assert (measured.folder / "seq_len" / "results.csv").read_bytes() == before
    rows = pd.read_csv(measured.folder / "seq_len" / "results.csv")
    pd.testing.assert_frame_equal(measured.results.table(), rows.drop(columns="schema_version"), check_dtype=False)


def test_an_unchanged_class_is_not_measured_again_and_a_changed_one_is(measured: Measured, tmp_path: Path) -> None:
    shutil.copytree(measured.folder, tmp_path / "copy")
    ledger = Ledger(tmp_path / "copy" / "two" / "samples.jsonl")
    first, same, changed = (
        compare(tmp_path / "copy", COSINE.replace(*edit), count=2, seq_len=40, quiet=True, sweep_name="two").table()
        for edit in ((" ", " "), ("    return SCALE", "    # the same\n    return SCALE"), ("SCALE = 1.0", "SCALE = 1.25"))
    )
    pd.testing.assert_frame_equal(first, same)
    assert sorted(changed["attention"]) == sorted(first["attention"]) == ["Cosine", "standard"]
    measured_ids = [key for key, *_ in rounds(ledger)]
    assert measured_ids == [*first["comparison"].unique()] * 6 + [*changed["comparison"].unique()] * 6  # 2 rounds of 3 processes
    assert len({*measured_ids}) == 2
    assert len(list((tmp_path / "copy" / "two" / "attentions").glob("Cosine_*.py"))) == 2


def test_a_speed_up_is_that_of_the_table_or_of_the_paired_rounds(measured: Measured) -> None:
    results = measured.results
    table = results.table().set_index(["attention", "seq_len"])
    for name in ("Cosine", "sharp"):
        found, row = results.speedup(name, over="standard", seq_len=65), table.loc[(name, 65)]
        assert (found.value, found.low, found.high) == tuple(row[["speedup", "speedup_low", "speedup_high"]])
        assert found.verdict == row["verdict"]
        back = results.speedup("standard", over=name, seq_len=65)
        assert (back.value, back.low, back.high) == pytest.approx((1 / found.value, 1 / found.high, 1 / found.low))
        assert (found.verdict, back.verdict) in {
            ("faster", "slower"),
            ("slower", "faster"),
            *((one,) * 2 for one in ("same", "ambiguous")),
        }
    other = results.speedup("Cosine", over="sharp", seq_len=40)
    slices = {
        (record["attention"], record["round"]): [np.median(part) for part in record["time_slices"]]
        for record in measured.ledger.read()[0]
        if record["kind"] == "latency" and record["comparison"] == table.loc[("sharp", 40), "comparison"]
    }
    ratios = [a / b for number in (0, 1) for a, b in zip(slices["sharp", number], slices["Cosine", number], strict=True)]
    assert other.value == pytest.approx(np.median(ratios))
    assert str(other).startswith("Cosine over sharp, seq_len 40: ")


MISTAKES: dict[str, tuple[Any, str]] = {
    "several lengths": (
        lambda r: r.speedup("Cosine", over="standard"),
        r"measured at several values of seq_len: give one of \[40, 65\]",
    ),
    "another length": (
        lambda r: r.speedup("Cosine", over="standard", seq_len=7),
        "seq_len 7 was not measured .* measured are 40, 65",
    ),
    "another attention": (lambda r: r.speedup("bsbr", over="standard"), "bsbr was not measured; known are standard, Cosine, sharp"),
    "a figure": (lambda r: r.plot("speed"), "the figure speed is not known; there may be latency, "),
    "a folder": (lambda r: evals.load(r.folder.parent), "holds no results.csv, but 1 folders do"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_question_without_an_answer_is_one_sentence(measured: Measured, mistake: str) -> None:
    ask, message = MISTAKES[mistake]
    with pytest.raises(UsageError, match=message):
        ask(measured.results)


def test_results_are_drawn_reported_and_loaded(measured: Measured) -> None:
    results = measured.results
    assert isinstance(results.plot("latency"), Figure)
    page = results.report()
    assert page == measured.folder / "seq_len" / "report.html"
    assert "Cosine" in page.read_text(encoding="utf-8")
    assert "srcdoc=" in page._repr_html_()
    loaded = evals.load(str(measured.folder / "seq_len"))
    pd.testing.assert_frame_equal(loaded.table(), results.table())
    assert repr(loaded) == repr(results)
    assert "speed-up over standard" in repr(results)
    assert ": ok" not in repr(results)  # the reason of a row that has none
    shown = results._repr_html_()
    assert shown.count("<table>") == 3
    assert all(f"<td>{name}</td>" in shown for name in NAMES)


# --- arguments ------------------------------------------------------------------------------------


WRONG: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "no list": ("bsbr", {}, "attentions must be a list"),  # type: ignore[dict-item]
    "nothing": ([], {}, "attentions must be a list of at least one"),
    "a number": ([3], {}, "an attention is given as its name"),
    "three names": ([("a", "b", "c")], {}, "an attention is given as its name"),
    "another class": ([int], {}, "int is no subclass of bsbr.Attention"),
    "twice": (["bsbr", ("bsbr", {"chunk_size": 8})], {}, "two attentions are called bsbr"),
    "a taken name": ([("linear", "bsbr", {})], {}, "there is an attention linear in .*conf/attention: give yours another name"),
    "a sentence": ([("my own", "bsbr", {})], {}, "must consist of letters, digits, _ and -, got 'my own'"),
    "unknown": (["bsbrr"], {}, r"unknown attention 'bsbrr' \(did you mean bsbr\?\)"),
    "unknown behind a name": ([("mine", "bsbrr", {})], {}, r"unknown attention 'bsbrr' \(did you mean bsbr\?\)"),
    "an unknown option": ([("bsbr", {"chunks": 8})], {}, "attention 'bsbr' cannot be built: .*chunks"),
    "a size": (["bsbr"], {"seq_len": 0}, "shape.seq_len must be a positive integer, got 0"),
    "a text": (["bsbr"], {"seq_len": "64"}, "shape.seq_len must be a positive integer, got '64'"),
    "no size": (["bsbr"], {"seq_len": []}, "seq_len must hold at least one value"),
    "a dtype": (["bsbr"], {"dtype": torch.int8}, "device.dtype must be one of .* got 'int8'"),
    "a workload": (["bsbr"], {"workload": "prefil"}, r"unknown workload 'prefil' \(did you mean prefill\?\)"),
    "a setting": (["bsbr"], {"settings": {"sampling.budget": 1}}, "unknown config key 'sampling.budget'"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_arguments_are_one_sentence_and_measure_nothing(mistake: str, tmp_path: Path) -> None:
    attentions, options, message = WRONG[mistake]
    argv, path = [*sys.argv], [*sys.path]
    with pytest.raises(UsageError, match=message) as caught:
        evals.compare(attentions, results_dir=tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert (sys.argv, sys.path) == (argv, path)
    assert not list(tmp_path.rglob("samples.jsonl"))


def test_attentions_are_given_in_four_forms() -> None:
    own = executed(COSINE)["Cosine"]
    given = ["bsbr", own, ("standard", {"impl": "torch"}), ("cold", own), ("warm", own, {"temperature": 1})]
    assert [(choice.name, choice.attention, choice.options) for choice in read_choices(given)] == [
        ("bsbr", "bsbr", {}),
        ("Cosine", own, {}),
        ("standard", "standard", {"impl": "torch"}),
        ("cold", own, {}),
        ("warm", own, {"temperature": 1}),
    ]


VALUES = [
    "",
    "it's",
    "a\\",
    "\\'",
    "1e5",
    "null",
    "a,b",
    "${x}",
    "ä=b",
    0,
    -3,
    1.5,
    1e-9,
    True,
    False,
    None,
    [1, ["x", None]],
    {"a": {"b": [2]}},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_quoted_value_is_read_as_the_same_value(value: Any) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"++key={quote(value)}"])
    assert override.value() == value
    assert type(override.value()) is type(value) or isinstance(value, str)


# --- the name -------------------------------------------------------------------------------------


def test_importing_evals_is_light() -> None:
    code = "import sys, evals; print({'torch', 'hydra', 'pandas', 'numpy', 'matplotlib'} & {*sys.modules}, evals.compare.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set() compare\n"


def test_the_function_and_the_command_share_their_name() -> None:
    import evals.compare.__main__

    assert callable(evals.compare)
    folder = str(ROOT / "results" / "paper" / "seq_len")
    assert typed("python", "-m", "evals.compare", folder, folder).returncode == 0
    assert callable(evals.compare)
    from evals import compare as function

    assert function is evals.compare
