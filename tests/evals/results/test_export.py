"""Exported tables hold the numbers of the results and the reasons for missing ones, and compile in LaTeX with any name."""

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from evals.export import main
from evals.paths import ROOT
from evals.results.export import accuracy_tables, export, latency_tables, tables_of
from evals.results.frames import check_table, read_table
from evals.results.markup import Table, escape_latex, latex, markdown

PAPER = ROOT / "results" / "paper"
HOSTILE = '[*]<script>|a_b&50%\\\n$x{--^~`"ü注\u202e'
REASON = "it needed 9 GiB, more than the 8 GiB of sampling.memory_limit_gib"


def failing() -> pd.DataFrame:
    """The study's sweep with a hostile name, and with cells that failed for two reasons."""
    results = pd.read_csv(PAPER / "seq_len" / "results.csv").replace({"attention": {"linear": HOSTILE}})
    results["detail"] = results["detail"].astype(object)
    for name, length, outcome, detail in (
        ("hopfield", 8192, "oom", REASON),
        ("hopfield", 4096, "oom", REASON),
        ("gau", 8192, "crash", HOSTILE),
    ):
        cell = (results["attention"] == name) & (results["seq_len"] == length)
        results.loc[cell, ["outcome", "detail"]] = [outcome, detail]
    return check_table(results)


@pytest.mark.parametrize(("form", "separator"), [(markdown, "|"), (latex, "&")])
def test_every_latency_is_in_its_cell(form: object, separator: str) -> None:
    results = read_table(PAPER / "seq_len")
    table = form(next(latency_tables(results)))  # type: ignore[operator]
    lengths = sorted(results["seq_len"].unique())
    for name in results["attention"].unique():
        start = name.replace("_", r"\_")
        line = next(line for line in table.splitlines() if line.strip("| ").startswith(f"{start} "))
        texts = [text.strip() for text in line.strip("|").rstrip("\\ ").split(separator)[1:]]
        rows = results[results["attention"] == name].set_index("seq_len")
        for length, text in zip(lengths, texts, strict=True):
            number = text.replace(r"$\pm$", "±").partition("±")[0]
            last = 10.0 ** -len(number.partition(".")[2])
            assert float(number) == pytest.approx(rows.loc[length, "latency_s"] * 1e3, abs=0.501 * last, rel=0)


def test_a_hostile_name_is_escaped() -> None:
    (table, *_) = latency_tables(failing())
    assert r"| \[\*\]&lt;script&gt;\|a\_b&amp;50%\\ \$x{--^\~\`" + '"ü注\u202e |' in markdown(table)
    assert r"{[}{*}{]}\textless{}script\textgreater{}\textbar{}a\_b\&50\%\textbackslash{} \$x\{-{}-" in latex(table)
    assert escape_latex("ü注").count("U+") == 2


def test_a_failed_cell_holds_its_outcome_and_a_footnote_with_the_reason() -> None:
    latency, *_ = latency_tables(failing())
    row = next(row for row in latency.rows if row[0] == "hopfield")
    assert row[-2:] == ["oom¹", "oom¹"]
    assert next(row for row in latency.rows if row[0] == "gau")[-1] == "crash²"
    assert latency.footnotes[0] == f"¹ {REASON}"
    assert len(latency.footnotes) == 2
    assert "¹ it needed 9 GiB, more than" in markdown(latency)
    assert r"$^{1}$ it needed 9 GiB, more than" in latex(latency)


def test_rows_of_other_settings_are_separate_tables() -> None:
    results = read_table(PAPER / "seq_len")
    both = list(latency_tables(pd.concat([results, results.assign(threads=1)])))
    assert len(both) == 2 * len(list(latency_tables(results)))
    assert [("1 threads" in table.conditions, "2 threads" in table.conditions) for table in both[:: len(both) // 2]] == [
        (True, False),
        (False, True),
    ]
    with pytest.raises(ValueError, match="standard has more than one row at seq_len = 128"):
        list(latency_tables(pd.concat([results, results])))


def test_accuracy_has_its_interval_over_seeds() -> None:
    accuracy, state = tables_of(PAPER / "retrieval")
    assert accuracy.rows[0] == ["num_pairs", "16"]
    # The table of README's section on retrieval, to three digits.
    assert ["standard", "1.000±0.00032"] in accuracy.rows
    assert ["delta_net", "0.877±0.19"] in accuracy.rows
    assert "over seeds" in accuracy.caption
    assert ["delta_net", "4 KiB"] in state.rows


def test_a_failed_learning_rate_is_shown_only_if_all_failed() -> None:
    results = pd.read_csv(PAPER / "retrieval" / "results.csv")
    results = results[results["outcome"] == "ok"].astype({"detail": object})
    gone = results["attention"] == "linear"
    results.loc[gone, ["outcome", "detail", "best"]] = ["diverged", "seed 0: the loss was nan at step 3", False]
    results.loc[(results["attention"] == "bsbr") & ~results["best"], ["outcome", "detail"]] = ["diverged", "seed 0: nan"]
    accuracy, _ = accuracy_tables(results)
    assert next(row for row in accuracy.rows if row[0] == "linear")[1] == "diverged¹"
    assert accuracy.footnotes == ["¹ seed 0: the loss was nan at step 3"]


def test_a_folder_above_result_folders_exports_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(PAPER)]) == 0
    printed = capsys.readouterr().out
    titles = re.findall(r"^\*\*(\S+): ", printed, flags=re.MULTILINE)
    assert set(titles) == {str(path.parent.relative_to(PAPER)).replace("_", r"\_") for path in PAPER.rglob("results.csv")}
    conversions = pd.read_csv(PAPER / "distillation" / "results.csv")
    perplexity = conversions[(conversions["model"] == "gpt2") & (conversions["stage"] == "original")]["perplexity"].mean()
    assert f"| gpt2 | {perplexity:.2f} |" in printed
    assert main([str(PAPER / "seq_len"), "--to", "latex"]) == 0
    assert r"\caption{latency in ms, lower is better" in capsys.readouterr().out


def test_the_longest_context_stands_beside_the_next_length(tmp_path: Path) -> None:
    shared = {"sweep": "max_context", "limit_bytes": 2.0**30, "workload": "prefill", "dtype": "float32"}
    found = {"attention": "bsbr", "outcome": "ok", "max_context": 4096, "peak_bytes": 2.0**29}
    rows = [found | {"next_seq_len": 4467, "next_outcome": "limit", "detail": "needs 1.1 GiB"}]
    rows.append({"attention": "gau", "outcome": "uncertified", "detail": "not causal"})
    pd.DataFrame([shared | row for row in rows]).to_csv(tmp_path / "results.csv", index=False)
    (table,) = tables_of(tmp_path)
    assert table.rows[1:] == [["bsbr", "4096", "512 MiB", "4467¹"], ["gau", "uncertified²", "", ""]]
    assert table.footnotes == ["¹ needs 1.1 GiB", "² not causal"]
    assert table.title == "longest context within 1 GiB, higher is better"


def test_latex_compiles_every_table(tmp_path: Path) -> None:
    """Runs LaTeX: no error, no missing character, no line wider than the page."""
    engine = shutil.which("pdflatex") or shutil.which("tectonic")
    if engine is None:
        pytest.skip("NOT TESTED: no LaTeX to set the exported tables with: apt install texlive-latex-base")
    body = export([PAPER], "latex")
    widest = 2 + body.count("\n") + 1  # the lines up to here are ours, and fit; names of one's own may be as long as they like
    hostile = [*latency_tables(failing()), Table(HOSTILE, [[HOSTILE, HOSTILE], [HOSTILE, "1"]], [HOSTILE], HOSTILE)]
    body = "\n\n".join([body, *map(latex, hostile)])
    source = tmp_path / "tables.tex"
    source.write_text("\\documentclass{article}\n\\begin{document}\n" + body + "\n\\end{document}\n", encoding="utf-8")
    options = ["-interaction=nonstopmode", "-halt-on-error"] if engine.endswith("pdflatex") else ["--keep-logs"]
    done = subprocess.run(
        [engine, *options, source.name], cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    log = source.with_suffix(".log").read_text(errors="replace")
    assert "Missing character" not in log
    overfull = re.findall(r"^Overfull \\hbox .* at lines (\d+)--", log, flags=re.MULTILINE)
    assert [line for line in overfull if int(line) <= widest] == []
    if shutil.which("pdftotext"):
        text = subprocess.run(
            ["pdftotext", "-layout", "tables.pdf", "-"], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        assert "<script>|a" in text  # Computer Modern has rules and accents for some of what follows
        assert REASON.partition(",")[0] in text


def test_a_folder_without_results_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
