"""The jobs of a command, without measuring: their rows, what is refused before the first, and what fails after the last."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
from omegaconf import DictConfig

from evals import claim, export, figures, run
from evals.benchmark.job import Job
from evals.cli import outputs
from evals.cli.hydra_app import compose_jobs
from evals.cli.sweep import DryRun
from evals.errors import INCOMPLETE, OK, USAGE, UsageError
from evals.results import frames, scaling_table
from evals.results.ledger import Record
from evals.results.schema import write_table
from tests.evals.commands import call
from tests.evals.results.test_latency_table import PEAKS
from tests.evals.results.test_latency_table import sweep as synthetic

pytestmark = pytest.mark.xdist_group("jobs")
MINE = """
from baselines.standard import StandardAttention


class Mine(StandardAttention):
    def __init__(self, hidden_dim, num_heads, **options):
        super().__init__(hidden_dim, num_heads)
"""
NAMES = ("NA", "null", "1e5", "007", "2024_05_01", "=1+1", "_$\\x^{<b>&|*,; '\"%s/", "no")


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config folder with attentions of the user's own: mine, other, and those with the NAMES."""
    folder = tmp_path_factory.mktemp("mine") / "conf"
    (folder / "attention").mkdir(parents=True)
    (folder.parent / "rows_mine.py").write_text(MINE)
    for file, name in [("mine", "mine"), ("other", "other"), *((f"own_{number}", name) for number, name in enumerate(NAMES))]:
        node = {name: {"_target_": "rows_mine.Mine", "size": 8, "device": "x"}}
        (folder / "attention" / f"{file}.yaml").write_text(json.dumps(node))
    return folder


def words(folder: Path, mine: Path, *given: str) -> list[str]:
    small = ("model.hidden_dim=32", "model.num_heads=2", "model.ff_dim=64", "shape.seq_len=32", "device.threads=1")
    keys = {word.partition("=")[0] for word in given}
    folders = (f"results_dir={folder / 'results'}", f"plots_dir={folder / 'plots'}")
    return ["--config-dir", str(mine), *folders, *(word for word in small if word.partition("=")[0] not in keys), *given]


def planned(folder: Path, mine: Path, *given: str) -> tuple[list[Job], DictConfig]:
    """The jobs of a command, after all its checks, and the config that they share."""
    plan = DryRun()
    with patch.object(sys, "argv", ["run.py", *words(folder, mine, *given)]), patch.object(sys, "path", [*sys.path]):
        session = compose_jobs()
        plan.check(session)
    assert session.config is not None
    return plan.jobs, session.config


def measured(jobs: Sequence[Job]) -> list[Record]:
    """The records that the jobs would make, with made-up latencies."""
    records: list[Record] = []
    for number, job in enumerate(jobs, start=1):
        names = [candidate.name for candidate in job.comparison.candidates]
        seconds = {name: 1e-3 * number * (1 + at) for at, name in enumerate(names)}
        records.append(job.description() | {"peaks": PEAKS})
        records += [record | {"comparison": job.id} for record in synthetic({32: seconds}, rounds=2)[1:]]
    return records


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        (["+attention.bsbr.retrieval_top_k=1,2"], {"retrieval_top_k": [1, 2]}),
        (["+block=8,16"], {"block": [8, 16]}),
        (["shape.seq_len=16,32", "shape.batch_size=1,2"], {"seq_len": [16, 32], "batch_size": [1, 2]}),
        (
            ["attention.mine.size=8,16", "attention.other.size=1,2"],
            {"attention.mine.size": [8, 16], "attention.other.size": [1, 2]},
        ),
        (["attention.mine.device=x,y"], {"attention.mine.device": ["x", "y"]}),
        (["+attention.mine.latency_s=1,2", "+attention.mine.settings=1,2"], {"attention.mine.latency_s": [1, 2]}),
        (["attention.mine.size=auto,64,null"], {"size": ["auto", "64", "null"]}),
        (["attention.mine.size=[1,2],[3]"], {"size": ["[1, 2]", "[3]"]}),
        (["attention.mine.size=0.5,1e-5,inf"], {"size": [0.5, 1e-5, float("inf")]}),
        (["attention.mine.size=true,false"], {"size": [True, False]}),
        (["attention.mine.size='01','on','nan','a/b'"], {"size": ["01", "on", "nan", "a/b"]}),
        (["model.conv_size=3,null", "model.scope=layer"], {"conv_size": ["3", "null"]}),
        (["match=null,params", "model.scope=layer"], {"match": ["null", "params"]}),
        (["model=small,base", "model.hidden_dim=null", "model.head_dim=16"], {"model": ["small", "base"], "num_heads": [2]}),
        (["sampling=quick,careful"], {"sampling": ["quick", "careful"]}),
        (["sampling.seed=0,1"], {"seed": [0, 1]}),
        (["workload=prefill,decode", "model.head_dim=null,16"], {"workload": ["prefill", "decode"], "head_dim": ["null", "16"]}),
    ],
)
def test_every_comparison_of_a_command_has_rows_of_its_own(
    given: list[str], columns: dict[str, list[Any]], tmp_path: Path, mine: Path
) -> None:
    jobs, _ = planned(tmp_path, mine, "-m", "attention=[standard,bsbr,mine,other]", *given)
    tables = outputs.build_tables(measured(jobs))
    results = tables["latency"]
    assert len(results) == 4 * len(jobs) > 4
    for column, values in columns.items():
        assert list(dict.fromkeys(results[column])) == values
    for name, table in tables.items():
        write_table(table, tmp_path, name)
    read = frames.read_table(tmp_path)
    for column in ("attention", "swept", *columns):
        assert read[column].tolist() == results[column].tolist()
    assert pd.read_parquet(tmp_path / "results.parquet")["comparison"].tolist() == results["comparison"].tolist()
    # Every row is in exactly one set of figures, and on the screen.
    parts = list(frames.sweeps(read, frames.read_fits(tmp_path)))
    assert len({suffix for suffix, _ in parts}) == len(parts)
    assert sum(len(sweep.rows) for _, sweep in parts) == len(results)
    text = outputs.RENDERERS["latency"](results)
    assert text.count("\nstandard ") % len(parts) == 0
    assert text.count("--- ") == (len(parts) if len(parts) > 1 else 0)


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        (["attention.mine.size=8,16"], ["size"]),
        (["attention.mine.size=auto,null"], ["size"]),
        (["attention.mine.size=8,16", "attention.other.size=1,2", "shape.batch_size=1,2"], ["attention.mine.size", "batch_size"]),
        (["+block=8,16"], ["block"]),
    ],
    ids=str,
)
def test_a_sweep_over_lengths_and_options_has_fits_for_each_option(
    given: list[str], columns: list[str], tmp_path: Path, mine: Path
) -> None:
    """However many settings vary, each sweep of the figures has the fits to its own rows, which are those of it alone."""
    lengths = ["shape.seq_len=32,64,128,256", "swept=shape.seq_len"]
    jobs, _ = planned(tmp_path, mine, "-m", "attention=[standard,bsbr,mine,other]", *lengths, *given)
    records = measured(jobs)
    for name, table in outputs.build_tables(records).items():
        write_table(table, tmp_path, name)
    results, fits = frames.read_table(tmp_path), frames.read_fits(tmp_path)
    assert set(columns) <= set(fits["scaling"]) & set(fits["crossovers"])
    parts = [part for _, part in frames.sweeps(results, fits)]
    assert len(parts) == len(jobs) / 4 > 1
    for part in parts:
        assert part.scaling is not None
        assert part.crossovers is not None
        assert sorted(part.scaling["attention"].unique()) == ["bsbr", "mine", "other", "standard"]
        assert not part.scaling.duplicated(["attention", "quantity"]).any()
        alone = scaling_table.build(part.rows, records)
        pd.testing.assert_series_equal(
            part.scaling["exponent"], alone["scaling"]["exponent"], check_index=False, check_names=False, rtol=1e-6
        )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["'attention=[bsbr],[linear]'"], "attention cannot be swept: the attentions that are compared are one list"),
        (["search=null,max_context"], "search cannot be swept: a folder holds timings or searches"),
        (["sweep=seq_len,decode"], "sweep cannot be swept: a command makes one sweep, or sweep=all"),
        (["quiet=true,false"], "quiet cannot be swept: all comparisons of a command share it"),
        (["shape.seq_len=range(16,16)"], "this command has no comparison: one of the settings that it varies has no values"),
        (["shape.seq_len=${oc.env:NO_LENGTH}"], "config key 'shape.seq_len' has no value: KeyError raised while resolving"),
        (["results_dir=${nowhere}"], "config key 'results_dir' has no value: Interpolation key 'nowhere' not found"),
        (["shape.seq_len=glob(*)"], "this command has no comparison"),
        (["shape.seq_len=16,-1"], "shape.seq_len must be a positive integer, got -1"),
        (["shape.seq_len=16,32", "hydra.launcher.n_jobs=2", "launcher=joblib"], "would time 2 comparisons at once on the cores"),
    ],
)
def test_what_the_run_refuses_its_dry_run_refuses_too(given: list[str], sentence: str, tmp_path: Path, mine: Path) -> None:
    if "launcher=joblib" in given:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="NOT TESTED: launcher=joblib is not installed")
    for dry in ([], ["--dry-run"]):
        done = call(run.main, *words(tmp_path, mine, "-m", *[word.strip("'") for word in given], *dry))
        assert (done.returncode, done.stdout) == (USAGE, "")
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_leaves_nothing_behind(tmp_path: Path, mine: Path) -> None:
    done = call(run.main, *words(tmp_path, mine, "-m", "shape.seq_len=16,32", "attention=[mine]", "--dry-run"))
    assert done.returncode == OK
    assert "[2/2] seq_len=32: prefill, cpu" in done.stdout
    assert list(tmp_path.iterdir()) == []


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["2024_05_01", "2024", "1e5", "no", "null", "a, b", "it's", 'a"b\\', "a\\'b", "$x={y}", "注 é"])
def test_the_name_of_a_sweep_is_text_whatever_it_looks_like(name: str, tmp_path: Path, mine: Path) -> None:
    jobs, config = planned(tmp_path, mine, "attention=[mine]", f"sweep_name={name}", f"relative_to={name.replace(',', '')}")
    assert (config.sweep_name, jobs[0].comparison.sweep) == (name, name)
    assert jobs[0].comparison.relative_to == name.replace(",", "")
    assert jobs[0].ledger.path == tmp_path / "results" / name / "samples.jsonl"


@pytest.mark.parametrize("node", ["no", "2024_05_01", "null", "''", "' x'", '"a\\nb"'])
def test_a_name_that_yaml_reads_as_something_else_is_refused(node: str, tmp_path: Path, mine: Path) -> None:
    conf = tmp_path / "conf"
    (conf / "attention").mkdir(parents=True)
    (conf / "attention" / "bad.yaml").write_text(f"? {node}\n: {{_target_: baselines.standard.StandardAttention}}\n")
    with pytest.raises(UsageError, match=r"the name of an attention must be text|key type 'NoneType'"):
        planned(tmp_path, conf, "attention=[bad]")


def test_outputs_with_any_name(tmp_path: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ",".join(f"own_{number}" for number in range(len(NAMES)))
    jobs, config = planned(
        tmp_path, mine, "-m", f"attention=[standard,mine,{files}]", "attention.mine.size=auto,64", "sweep_name=no"
    )
    jobs[0].ledger.append(*measured(jobs))
    assert outputs.write_outputs(config, [job.id for job in jobs], "the command") == OK
    folder, printed = tmp_path / "results" / "no", capsys.readouterr()
    assert printed.err == ""
    assert set(frames.read_table(folder)["attention"]) == {"standard", "mine", *NAMES}
    assert all(f"\n{name} " in printed.out for name in NAMES)
    svg = (tmp_path / "plots" / "no" / "latency.svg").read_text(encoding="utf-8")
    assert 'id="NA legend"' in svg
    assert 'id="1e5 legend"' in svg
    for main in (figures.main, export.main):
        plots = ["--plots", str(tmp_path / "again")] if main is figures.main else []
        assert main([str(folder), *plots]) == OK
    for name in NAMES:
        quote = "'" if '"' in name else '"'
        texts = [f"standard 2x faster than {name}"] if " " not in name else []
        if "'" not in name or '"' not in name:
            texts.append(f"standard 2x faster than {quote}{name}{quote} at size auto")
        assert all(claim.main([text, str(folder)]) in (0, 1, 3) for text in texts)


# --- what fails afterwards ----------------------------------------------------------------------


def test_one_output_that_fails_costs_no_other(tmp_path: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs, config = planned(tmp_path, mine, "attention=[standard,mine]", "sweep_name=broken")
    jobs[0].ledger.append(*measured(jobs))
    folder, plots = tmp_path / "results" / "broken", tmp_path / "plots" / "broken"
    (folder / "report.html").mkdir()
    (plots / "speedup.svg").mkdir(parents=True)
    assert outputs.write_outputs(config, [job.id for job in jobs], "the command") == INCOMPLETE
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"warning: {folder / 'report.html'} could not be made: ")
    assert lines[0].endswith(f"; to make it again: python -m evals.report {folder}")
    assert lines[1].startswith(f"warning: a figure in {plots} could not be made: speedup: IsADirectoryError: ")
    assert lines[1].endswith(f"; to make it again: python -m evals.figures {folder} --plots {tmp_path / 'plots'}")
    assert len(frames.read_table(folder)) == 2
    assert {"latency.svg", "throughput.svg", "distribution.png"} <= {path.name for path in plots.iterdir()}
    assert "latency" in printed.out
