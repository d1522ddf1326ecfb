"""The command evals.run: its outputs, resuming, rows of failures, and error messages."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from evals import run
from evals.errors import INCOMPLETE
from evals.paths import ROOT
from evals.results.ledger import Ledger
from tests.evals.commands import call

pytestmark = pytest.mark.xdist_group("run")
SMALL = (
    "model.hidden_dim=32",
    "model.num_heads=2",
    "sampling=quick",
    "sampling.budget_s=0.01",
    "sampling.min_rounds=2",
    "sampling.time_slices=3",
)


def overrides(folder: Path, *arguments: str) -> list[str]:
    return [f"results_dir={folder / 'results'}", f"plots_dir={folder / 'plots'}", *SMALL, *arguments]


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "evals.run", *overrides(folder, *arguments)]


def run_sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return call(run.main, *overrides(folder, *arguments))


def measurements(folder: Path, sweep: str = "single") -> list[dict[str, Any]]:
    records, _ = Ledger(folder / "results" / sweep / "samples.jsonl").read()
    return [record for record in records if record["kind"] in ("preflight", "latency")]


def table(folder: Path, sweep: str = "single") -> pd.DataFrame:
    return pd.read_csv(folder / "results" / sweep / "results.csv")


# --- a sweep ------------------------------------------------------------------------------------


SWEEP = (
    "sweep=seq_len",
    "shape.seq_len=60,129",
    "shape.batch_size=3",
    "attention=[standard,bsbr,linear]",
    "attention.bsbr.chunk_size=16",
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("swept")
    done = run_sweep(folder, *SWEEP)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


@pytest.fixture
def certified(swept: tuple[Path, str], tmp_path: Path) -> Path:
    """A results folder that has the certificates of the sweep, which take longest."""
    (tmp_path / "results").mkdir()
    shutil.copy(swept[0] / "results" / "certificates.jsonl", tmp_path / "results")
    return tmp_path


def test_every_attention_and_length_has_a_consistent_row(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    rows = table(folder, "seq_len")
    assert sorted(zip(rows["attention"], rows["seq_len"], strict=True)) == [
        (name, length) for name in ("bsbr", "linear", "standard") for length in (60, 129)
    ]
    assert (rows["outcome"] == "ok").all()
    assert (rows["latency_low_s"] <= rows["latency_s"]).all()
    assert (rows["latency_s"] <= rows["latency_high_s"]).all()
    assert rows["tokens_per_s"].to_numpy() == pytest.approx((3 * rows["seq_len"] / rows["latency_s"]).to_numpy())
    for _, same_length in rows.groupby("seq_len"):
        by_name = same_length.set_index("attention")
        assert by_name.loc["standard", ["speedup", "speedup_low", "speedup_high"]].tolist() == [1, 1, 1]
        assert set(by_name["verdict"].dropna()) <= {"faster", "slower", "same", "ambiguous"}
        assert by_name["noise_floor"].nunique() == 1
    # The output, its heads before the last projection, q, k and v have to be held.
    assert (rows["peak_bytes"] >= 4 * 4 * 3 * rows["seq_len"] * 32).all()
    assert rows.loc[rows["attention"] == "standard", "parameter_bytes"].tolist() == [4 * 4 * 32 * 32] * 2
    assert rows.loc[rows["attention"] == "standard", "state_bytes"].tolist() == [4 * 2 * 3 * n * 32 for n in (60, 129)]
    projections = 4 * 2 * 3 * 32 * 32
    flops = [4 * 3 * 32 * n * (n + 1) // 2 + projections * n for n in (60, 129)]
    assert rows.loc[rows["attention"] == "standard", "flops"].tolist() == flops


def test_the_table_is_computed_from_the_raw_samples(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    for _, row in table(folder, "seq_len").iterrows():
        raw = [
            m for m in measurements(folder, "seq_len") if (m["comparison"], m["attention"]) == (row["comparison"], row["attention"])
        ]
        # The reference runs against itself too.
        assert sorted(m["kind"] for m in raw) == ["latency"] * (4 if row["attention"] == "standard" else 2) + ["preflight"]
        slices = [samples for m in raw if m["kind"] == "latency" and not m["is_control"] for samples in m["time_slices"]]
        assert row["samples"] == sum(map(len, slices)) >= len(slices)
        assert row["latency_s"] == pytest.approx(float(pd.Series([pd.Series(samples).median() for samples in slices]).median()))
        assert (row["rounds"], row["stop_reason"]) == (2, "budget")


def test_a_speed_up_is_the_median_ratio_of_paired_time_slices(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    rows = table(folder, "seq_len")
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "results" / "seq_len" / "results.parquet")[["speedup"]], rows[["speedup"]]
    )
    for _, row in rows[rows["attention"] == "linear"].iterrows():
        medians = {
            (m["attention"], m["round"]): [pd.Series(samples).median() for samples in m["time_slices"]]
            for m in measurements(folder, "seq_len")
            if m["comparison"] == row["comparison"] and m["kind"] == "latency" and not m["is_control"]
        }
        ratios = [
            theirs / ours
            for number in (0, 1)
            for theirs, ours in zip(medians["standard", number], medians["linear", number], strict=True)
        ]
        assert row["speedup"] == pytest.approx(float(pd.Series(ratios).median()))


def test_the_log_and_the_tables_fit_in_80_columns(swept: tuple[Path, str]) -> None:
    folder, output = swept
    tables, _, _ = output[output.index("latency in ms") :].partition(str(folder))
    assert all(len(line) <= 80 for line in tables.splitlines())
    assert "[1/2] seq_len=60" in output
    assert "[2/2] seq_len=129" in output
    for title in ("latency in ms", "speed-up over standard", "peak memory above inputs"):
        block = tables[tables.index(title) :].split("\n\n")[0].splitlines()
        assert block[1].split() == ["seq_len", "60", "129"]
        assert [line.split()[0] for line in block[2:]] == ["standard", "bsbr", "linear"]


def test_plots_are_written(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    names = {f"{quantity}.{kind}" for quantity in ("latency", "throughput", "peak_memory", "speedup") for kind in ("png", "svg")}
    assert {path.name for path in (folder / "plots" / "seq_len").iterdir()} >= names


def test_the_same_command_again_measures_nothing_and_prints_the_same_tables(swept: tuple[Path, str]) -> None:
    folder, output = swept
    before, rows = measurements(folder, "seq_len"), table(folder, "seq_len")
    again = run_sweep(folder, *SWEEP)
    assert (again.returncode, again.stderr) == (0, "")
    assert measurements(folder, "seq_len") == before
    pd.testing.assert_frame_equal(table(folder, "seq_len"), rows)
    *tables, share = output[output.index("latency in ms") :].splitlines()
    assert again.stdout[again.stdout.index("latency in ms") :].splitlines() == tables
    assert re.fullmatch(r"\d+% of \d+ s went into measured calls and their warm-up, \d+% into checks", share)


def test_the_time_in_calls_lies_between_that_of_samples_and_that_of_rounds(swept: tuple[Path, str]) -> None:
    rounds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in measurements(swept[0], "seq_len"):
        if record["kind"] == "latency":
            assert record["called_s"] > 0.999 * (record["first_call_s"] + sum(map(sum, record["time_slices"])))
            rounds.setdefault((record["comparison"], record["round"]), []).append(record)
    for records in rounds.values():
        assert sum(record["called_s"] for record in records) < records[0]["round_s"]


def test_a_torn_line_is_set_aside_with_a_warning(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    path = folder / "results" / "seq_len" / "samples.jsonl"
    before = measurements(folder, "seq_len")
    with path.open("a") as file:
        file.write('{"kind": "late')
    again = run_sweep(folder, *SWEEP)
    assert again.returncode == 0
    assert again.stderr == f"warning: the last line of {path} was torn, and is set aside in {path.with_suffix('.torn')}\n"
    assert measurements(folder, "seq_len") == before


def test_a_larger_budget_adds_rounds_to_those_in_the_ledger(certified: Path) -> None:
    arguments = ("attention=[standard,linear]", "shape.seq_len=50", "sampling.budget_s=1000")
    assert run_sweep(certified, *arguments, "sampling.max_rounds=2").returncode == 0
    before = measurements(certified)
    assert set(table(certified)["stop_reason"]) == {"rounds"}
    assert run_sweep(certified, *arguments, "sampling.max_rounds=3").returncode == 0
    after = measurements(certified)
    assert after[: len(before)] == before
    assert {m["round"] for m in after[len(before) :]} == {2}
    assert table(certified)["rounds"].tolist() == [3, 3]


def test_a_dry_run_prints_what_is_left_and_writes_nothing(certified: Path) -> None:
    arguments = ("sweep=seq_len", "attention=[standard,linear]", "shape.seq_len=50,60", "sampling.budget_s=30")
    done = run_sweep(certified, *arguments, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("standard, linear: 0 rounds are done, about 30 s left") == 2
    assert "about 1.0 min in all; nothing was measured" in done.stdout
    assert measurements(certified, "seq_len") == []
    assert not (certified / "plots").exists()


def test_another_option_is_another_comparison(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    before = measurements(folder, "seq_len")
    changed = [word.replace("chunk_size=16", "chunk_size=32").replace("60,129", "60") for word in SWEEP]
    assert run_sweep(folder, *changed).returncode == 0
    added = measurements(folder, "seq_len")[len(before) :]
    # All attentions are measured again, since those compared must have run side by side.
    assert {m["attention"] for m in added} == {"standard", "bsbr", "linear"}
    rows = table(folder, "seq_len").set_index(["attention", "seq_len"])
    assert len(rows) == 6
    assert rows.loc[("bsbr", 60), "comparison"] == added[0]["comparison"] != rows.loc[("bsbr", 129), "comparison"]


def test_any_option_can_be_swept_and_a_folder_holds_one_sweep(certified: Path) -> None:
    settings = ("attention=[standard,bsbr]", "shape.seq_len=40", "sweep_name=chunks", "sampling.min_rounds=1")
    done = run_sweep(certified, "-m", "attention.bsbr.chunk_size=16,32", *settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert "[2/2] chunk_size=32" in done.stdout
    rows = table(certified, "chunks")
    assert rows["chunk_size"].tolist() == [16, 16, 32, 32]
    assert set(rows["swept"]) == {"attention.bsbr.chunk_size"}
    other = run_sweep(certified, "-m", "shape.batch_size=1,2", *settings)
    assert other.returncode == 2
    assert "chunks holds a sweep over attention.bsbr.chunk_size, and this is one over shape.batch_size" in other.stderr
    assert len(table(certified, "chunks")) == 4


@pytest.mark.parametrize(("workload", "tokens"), [("decode", 2), ("forward_backward", 80)])
def test_other_workloads_on_a_whole_decoder(certified: Path, workload: str, tokens: int) -> None:
    options = (
        "model.scope=model",
        "model.num_layers=2",
        "model.ff_dim=48",
        "model.vocab_size=50",
        "shape.batch_size=2",
        "shape.seq_len=40",
    )
    done = run_sweep(certified, f"workload={workload}", "attention=[standard,linear]", *options)
    assert (done.returncode, done.stderr) == (0, "")
    rows = table(certified)
    assert rows["outcome"].tolist() == ["ok", "ok"]
    assert rows["tokens_per_s"].to_numpy() == pytest.approx((tokens / rows["latency_s"]).to_numpy())
    standard = rows[rows["attention"] == "standard"].iloc[0]
    norms, embedding = 5 * 2 * 32, 50 * 32
    layer = 4 * 32 * 32 + 2 * 32 * 48 + 48 + 32
    assert standard["parameter_bytes"] == 4 * (2 * layer + norms + embedding)
    assert standard["state_bytes"] == 2 * (4 * 2 * 2 * 40 * 32)
    if workload == "forward_backward":
        # The gradients of all parameters are held at the end.
        assert standard["peak_bytes"] >= standard["parameter_bytes"]


# --- failures -----------------------------------------------------------------------------------

TROUBLE = '''
import os
import threading

import torch

from baselines.standard import StandardAttention


class Trouble(StandardAttention):
    """Works at every length but 777, so that it is certified; at 777 it fails as its option says."""

    def __init__(self, hidden_dim, num_heads, trouble):
        super().__init__(hidden_dim, num_heads)
        self.trouble = trouble

    def attend(self, *tensors):
        if tensors[0].shape[2] == 777:
            getattr(self, self.trouble)()
        return super().attend(*tensors)

    def hang(self):
        threading.Event().wait()

    def crash(self):
        os._exit(3)

    def hoard(self):
        torch.zeros(64 * 2**30, dtype=torch.uint8)

    def refuse(self):
        raise NotImplementedError("no kernel for 777 tokens")


class Peeks(StandardAttention):
    def attend(self, *tensors):
        q, k, v = tensors
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
'''


def test_a_failure_is_a_row_and_the_sweep_continues(certified: Path) -> None:
    folder = certified / "mine" / "conf" / "attention"
    folder.mkdir(parents=True)
    (certified / "mine" / "trouble.py").write_text(TROUBLE)
    expected = {"hang": "timeout", "crash": "crash", "hoard": "oom", "refuse": "unsupported"}
    for trouble in expected:
        (folder / f"{trouble}.yaml").write_text(f"{trouble}: {{_target_: trouble.Trouble, trouble: {trouble}}}\n")
    (folder / "peeks.yaml").write_text("peeks: {_target_: trouble.Peeks}\n")
    limits = ("sampling.timeout_s=6", "sampling.memory_limit_gib=4", "sampling.min_rounds=1")
    names = ("hang", "standard", "crash", "peeks", "hoard", "refuse")
    arguments = ("--config-dir", str(folder.parent), f"attention=[{','.join(names)}]", "shape.seq_len=777", *limits)
    done = run_sweep(certified, *arguments)
    assert (done.returncode, done.stderr) == (INCOMPLETE, "")
    rows = table(certified).set_index("attention")
    assert rows["outcome"].to_dict() == {**expected, "standard": "ok", "peeks": "uncertified"}
    assert rows.loc["hang", "detail"] == "took longer than 6 s"
    assert "exited with code 3" in rows.loc["crash", "detail"]
    assert "can't allocate memory" in rows.loc["hoard", "detail"]
    assert rows.loc["refuse", "detail"].startswith("NotImplementedError: no kernel for 777 tokens (trouble.py:")
    assert rows.loc["peeks", "detail"].startswith("causality: changing the inputs after")
    failed = rows[rows["outcome"] != "ok"]
    assert failed[["latency_s", "speedup", "samples"]].isna().all(axis=None)
    assert not math.isnan(rows.loc["standard", "latency_s"])
    assert "peeks at seq_len=777: uncertified, causality" in done.stdout
    # It was not timed, and the same command does not repeat failures.
    assert [m["kind"] for m in measurements(certified) if m["attention"] == "peeks"] == ["preflight"]
    before = measurements(certified)
    assert run_sweep(certified, *arguments).returncode == INCOMPLETE
    assert measurements(certified) == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_keeps_its_records_and_resumes(certified: Path, how: signal.Signals) -> None:
    arguments = ("sweep=seq_len", "attention=[standard,linear]", "shape.seq_len=50,60")
    with subprocess.Popen(
        command(certified, *arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "[2/2]" not in process.stdout.readline():
            pass
        os.killpg(process.pid, how)
        error = process.stderr.read()
    before = measurements(certified, "seq_len")
    assert len(before) >= 2 + 2 * 3  # all of the first comparison
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert error == (
            "stops after this round; Ctrl-C again stops at once\n"
            "interrupted; what was measured is kept, and the same command goes on from there\n"
        )
        assert table(certified, "seq_len")["seq_len"].tolist() == [50, 50]
    resumed = run_sweep(certified, *arguments)
    assert resumed.returncode == 0, resumed.stdout
    records = measurements(certified, "seq_len")
    assert records[: len(before)] == before
    whole = {(m["comparison"], m["attention"], m["kind"], m.get("round"), m.get("is_control")) for m in records}
    assert len(whole) == len(records) == 2 * (2 + 2 * 3)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["attention=[nope]"], "unknown attention 'nope'; known are bsbr, bsbr_token, delta_net, delta_net_fla, "),
        (["sweep=nope"], "unknown sweep 'nope'; known are all, backends, "),
        (["attention=[]"], "no attention is selected"),
        (["attention.bsbr.chunk_size=0"], "attention 'bsbr' cannot be built: chunk_size must be a positive integer, got 0"),
        (["model.num_heads=3"], "hidden_dim must be a multiple of num_heads, got hidden_dim=32, num_heads=3"),
        (["+attention.bsbr.compression_factor=7"], "compression_factor must divide head_dim = 16 (32 / 2), got 7"),
        (["+attention.bsbr.chunksize=7"], "attention 'bsbr' cannot be built: .*unexpected keyword argument 'chunksize'"),
        (["shape.seq_len=-4"], "shape.seq_len must be a positive integer, got -4"),
        (["shape.seq_len=some"], "shape.seq_len must be a positive integer, got 'some'"),
        (["shape.batch_size=0"], "shape.batch_size must be a positive integer, got 0"),
        (["shape.foo=3"], "Could not override 'shape.foo'"),
        (["sweep=decode", "shape.seq_len=1,2", "shape.foo=3"], "Could not override 'shape.foo'"),
        (["+shape.foo=3"], "unknown config key 'shape.foo'; known are shape.batch_size, shape.seq_len"),
        (["+foo=3"], "unknown config key 'foo'; known are attention, "),
        (["~shape.seq_len"], "config key 'shape.seq_len' is missing"),
        (["device.dtype=int3"], "device.dtype must be one of float64, float32, bfloat16, float16, got 'int3'"),
        (["device.threads=0"], "device.threads must be a positive integer, got 0"),
        (["device.kind=tpu"], "device.kind must be cpu or cuda, got 'tpu'"),
        (["model.scope=everything"], "model.scope must be one of attention, layer, model, got 'everything'"),
        (["sampling.timeout_s=-1"], "sampling.timeout_s must be a number above 0, got -1"),
        (["sampling.min_rounds=0"], "sampling.min_rounds must be a positive integer, got 0"),
        (["swept=foo"], "swept must be a key of the config, such as shape.seq_len or attention.bsbr.chunk_size, got 'foo'"),
        (["workload._target_=evals.nope"], "workload._target_ must be a function such as evals.benchmark.workloads.prefill: "),
        (
            ["attention.bsbr._target_=collections.Counter"],
            "_target_ collections.Counter is Counter, not a subclass of bsbr.Attention",
        ),
        (["attention.bsbr._target_=nope.Nope"], "attention 'bsbr' cannot be built: .*No module named 'nope'"),
        (["attention.bsbr=3"], "attention 'bsbr' must be a mapping with a _target_, "),
        (["attention=[bsbr"], "no viable alternative at input"),
        (["--config-dir", "/nowhere"], "Additional config directory '/nowhere' not found"),
        (["results_dir=/dev/null/results"], "/dev/null/results/single cannot be made, since /dev/null is a file: results_dir must"),
        (["plots_dir=/dev/null"], "/dev/null/single cannot be made, since /dev/null is a file: plots_dir must name a folder"),
        (["sweep_name=../mine"], "sweep_name must be the name of a folder in results_dir, such as mine or mine/first: text on"),
        (["shape.seq_len=8,16"], "shape.seq_len=8,16 is several values: with -m they are a sweep"),
        (["shape.seq_len=8,16", "--dry-run"], "shape.seq_len=8,16 is several values: with -m they are a sweep"),
        (["+tracker._target_=evals.nope"], "tracker._target_ must be a function"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    error = refused(overrides(tmp_path, *arguments), monkeypatch, capfd)
    pattern = sentence if ".*" in sentence else re.escape(sentence)
    assert re.match(f"error: .*{pattern}", error)
    assert not (tmp_path / "plots").exists()


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must exit with 2; returns its single line on standard error."""
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    assert run.main() == 2
    output, error = capfd.readouterr()
    assert output == ""
    assert error.count("\n") == 1
    return error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert "device=cuda was asked for, but torch sees no CUDA device" in refused(["device=cuda"], monkeypatch, capfd)


def test_a_config_that_does_not_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention" / "mine.yaml").write_text("mine: [\n")
    error = refused(["--config-dir", str(tmp_path), "attention=[mine]"], monkeypatch, capfd)
    assert re.match(r"error: while parsing .* in \".*mine.yaml\", line 2, column 1", error)


def test_an_invalid_value_of_a_sweep_stops_it(tmp_path: Path) -> None:
    done = run_sweep(tmp_path, "sweep=seq_len", "shape.seq_len=-7,128")
    assert done.returncode == 2
    assert done.stderr == "error: shape.seq_len must be a positive integer, got -7\n"
    assert measurements(tmp_path, "seq_len") == []
