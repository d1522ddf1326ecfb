"""The exported tables hold the numbers of results.csv, and a hostile name breaks neither format."""

from pathlib import Path

import pandas as pd
import pytest

from evals.export import exported, main
from evals.figures import read

PAPER = Path(__file__).parents[2] / "results" / "paper" / "seq_len"
HOSTILE = "<script>|a_b&50%\\\n$x{"


@pytest.mark.parametrize(("form", "separator"), [("markdown", "|"), ("latex", "&")])
def test_every_latency_stands_in_its_place(form: str, separator: str) -> None:
    results = read(PAPER)
    table = exported(results, form).split("\n\n**")[0].split(r"\end{table}")[0]
    lengths = sorted(results["seq_len"].unique())
    for name in results["attention"].unique():
        start = name.replace("_", r"\_")
        line = next(line for line in table.splitlines() if line.strip("| ").startswith(f"{start} "))
        told = [text.strip() for text in line.strip("|").rstrip("\\ ").split(separator)[1:]]
        rows = results[results["attention"] == name].set_index("seq_len")
        for length, text in zip(lengths, told, strict=True):
            number = float(text.replace(r"$\pm$", "±").partition("±")[0])
            assert number == pytest.approx(rows.loc[length, "latency_s"] * 1e3, rel=6e-3)


def test_a_hostile_name_is_text() -> None:
    results = read(PAPER).replace({"attention": {"linear": HOSTILE}})
    assert r"&lt;script&gt;\|a\_b&amp;50%\\ $x{ |" in exported(results, "markdown")
    assert r"<script>|a\_b\&50\%\textbackslash{} \$x\{ & " in exported(results, "latex")


def test_a_failure_is_its_outcome() -> None:
    results = read(PAPER)
    results.loc[results.index[1], ["outcome", "latency_s"]] = ["oom", None]
    assert "| oom |" in exported(results, "markdown")


def test_two_sweeps_in_one_table_are_refused() -> None:
    results = read(PAPER)
    with pytest.raises(ValueError, match="standard stands twice at seq_len=128"):
        exported(pd.concat([results, results]), "latex")


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
