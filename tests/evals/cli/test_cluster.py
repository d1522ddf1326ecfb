"""Checks of launchers, jobs that are lost with their node, and cores that belong to one process."""

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from evals.cli import cluster
from evals.cli.cluster import MakeJob, RemoteLaunch, lost_record, unfinished_starts
from evals.cli.jobs import make_remote_job
from evals.cli.launchers import check_launcher
from evals.errors import UsageError
from evals.isolation import affinity
from evals.paths import CONF
from evals.results import latency_table
from evals.results.ledger import Ledger, Record
from evals.results.schema import write_table

PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "slurm": "hydra_submitit_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
}


def launcher(*overrides: str) -> DictConfig:
    name = overrides[0].rpartition("=")[2]
    if name in PLUGINS:
        pytest.importorskip(f"hydra_plugins.{PLUGINS[name]}", reason=f"NOT TESTED: launcher={name} is not installed")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node: DictConfig = compose("config", list(overrides), return_hydra_config=True).hydra.launcher
    if "name" in node:
        with open_dict(node):
            node.name = "bsbr"  # made of the sweep's, in a whole config
    return node


@pytest.mark.parametrize(
    ("overrides", "kind", "complaint"),
    [
        (["launcher=local"], "cpu", ""),
        (["launcher=joblib"], "cpu", ""),
        (["launcher=joblib", "hydra.launcher.n_jobs=2"], "cuda", ""),
        (["launcher=joblib", "hydra.launcher.n_jobs=2"], "cpu", "n_jobs=2 would time 2 comparisons at once"),
        (["launcher=joblib", "hydra.launcher.n_jobs=-1"], "cuda", "1 or more, got -1"),
        (["launcher=slurm"], "cpu", ""),
        (["launcher=slurm", "hydra.launcher.additional_parameters.exclusive=false"], "cpu", "may share the cores"),
        (["launcher=slurm", "hydra.launcher.tasks_per_node=2"], "cpu", "must be 1, got 1 and 2"),
        (["launcher=slurm"], "cuda", "gpus_per_node=1, got None"),
        (["launcher=slurm", "hydra.launcher.gpus_per_node=1"], "cuda", ""),
        (
            ["launcher=slurm", "hydra.launcher.gpus_per_node=1", "hydra.launcher.additional_parameters.exclusive=false"],
            "cuda",
            "cores of its own: set hydra.launcher.cpus_per_task",
        ),
        (
            ["hydra/launcher=submitit_local"],
            "cpu",
            "launcher LocalLauncher would let comparisons run side by side",
        ),
        (["launcher=ray"], "cpu", ""),
        (["launcher=ray", "hydra.launcher.ray.remote.resources.machine=0.5"], "cpu", "machine=1, .* got 0.5"),
        (["launcher=ray"], "cuda", "num_gpus=1, got None"),
        (["launcher=ray", "+hydra.launcher.ray.remote.num_gpus=1"], "cuda", ""),
    ],
)
def test_no_launcher_may_let_two_timings_share_a_device(overrides: list[str], kind: str, complaint: str) -> None:
    node = launcher(*overrides)
    if not complaint:
        check_launcher(node, kind)
        return
    with pytest.raises(UsageError, match=complaint):
        check_launcher(node, kind)


# --- jobs that are lost -------------------------------------------------------------------------

DESCRIPTION = {
    "kind": "comparison",
    "comparison": "c0",
    "sweep": "seq_len",
    "swept": "shape.seq_len",
    "relative_to": "standard",
    "settings": {"seq_len": 60, "processor": "x", "torch": "2", "device": "cpu", "dtype": "float32", "threads": 1},
    "candidates": {"standard": {}, "bsbr": {}},
    "peaks": None,
}


def started(job: int, host: str) -> Record:
    return {"kind": "started", "job": job, "host": host, "what": "comparison", "id": f"c{job}", "description": DESCRIPTION}


def test_a_job_is_unfinished_until_it_has_an_end() -> None:
    records = [started(0, "a"), started(1, "b"), {"kind": "ended", "job": 1}, started(0, "c"), started(2, "b")]
    open_ = unfinished_starts(records)
    assert {job: [start["host"] for start in starts] for job, starts in open_.items()} == {0: ["a", "c"], 2: ["b"]}


def test_a_lost_job_is_a_row_per_attention_that_names_the_nodes() -> None:
    rows = latency_table.build([lost_record([started(0, "node1"), started(0, "node7")])])
    assert rows[["attention", "seq_len", "outcome"]].to_numpy().tolist() == [["standard", 60, "lost"], ["bsbr", 60, "lost"]]
    assert set(rows["detail"]) == {"started 2 times, on node1 and node7, and lost with its node"}


def test_a_comparison_that_finishes_later_is_not_lost() -> None:
    trial = {"kind": "preflight", "comparison": "c0", "attention": "bsbr", "outcome": "oom", "detail": "too little"}
    rows = latency_table.build([DESCRIPTION, lost_record([started(0, "node1")]), trial])
    assert rows[["attention", "outcome", "detail"]].to_numpy().tolist() == [["bsbr", "oom", "too little"]]


class Breaking:
    """A launcher with dying nodes: each pass writes records, and may raise."""

    def __init__(self, folder: Path, *passes: Any) -> None:
        self.ledger = Ledger(folder / "samples.jsonl")
        self.passes = list(passes)
        make_job: MakeJob = lambda cfg, swept, node: (_ for _ in ()).throw(AssertionError)  # noqa: E731
        self.remote = RemoteLaunch(make_job, lambda _: self.ledger)
        self.config = OmegaConf.create({"hydra": {"launcher": {"_target_": "x.RayLauncher"}}})

    def __call__(self) -> None:
        self.remote.job(self.config, None)
        records, error = self.passes.pop(0)
        node = Ledger(self.ledger.path, "node")
        node.append(*({**record, "launch": self.remote.id} for record in records))
        if error:
            raise error


def test_a_failed_pass_is_repeated_while_it_gets_further(tmp_path: Path) -> None:
    error = RuntimeError("a worker died")
    command = Breaking(tmp_path, ([started(0, "a")], error), ([started(0, "a")], error), ([{"kind": "ended", "job": 0}], None))
    command.remote.launch(command)
    assert not command.passes
    assert command.remote.started_ids() == ["c0", "c0"]


def test_a_job_that_no_pass_finishes_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("no\nnodes")
    command = Breaking(tmp_path, ([started(0, "a")], error), ([], error))
    command.remote.launch(command)
    assert latency_table.build(command.ledger.read()[0])["outcome"].tolist() == ["lost", "lost"]
    assert "since the launcher failed: no nodes" in capsys.readouterr().err


def test_an_error_of_the_job_itself_is_raised_and_not_retried(tmp_path: Path) -> None:
    bug = ZeroDivisionError("ours")
    command = Breaking(tmp_path, ([started(0, "a"), {"kind": "ended", "job": 0, "failed": True}], bug))
    with pytest.raises(ZeroDivisionError):
        command.remote.launch(command)


# --- places -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("things", "of"), [(8, 3), (7, 7), (5, 2), (1, 1)])
def test_the_parts_of_a_machine_are_disjoint_and_nearly_equal(things: int, of: int) -> None:
    parts = [affinity.take_share(range(things), number, of) for number in range(of)]
    assert [thing for part in parts for thing in part] == list(range(things))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_slots_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UsageError, match="2 comparisons at once need as many GPUs"):
        affinity.claim_slot(2)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="NOT TESTED: needs Linux")
def test_a_process_locks_the_cores_it_may_run_on() -> None:
    allowed = os.sched_getaffinity(0)
    assert sorted(core for siblings in affinity.physical_cores().values() for core in siblings) == sorted(allowed)
    one = min(allowed)
    try:
        os.sched_setaffinity(0, [one])
        assert len(affinity.exclusive_resources("cpu")) == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_row_of_a_lost_job_survives_the_csv(tmp_path: Path) -> None:
    path = write_table(latency_table.build([lost_record([started(0, "node1")])]), tmp_path, "latency")
    assert pd.read_csv(path)["detail"].tolist() == ["lost with its node, node1"] * 2


def test_a_squeue_that_fails_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first answer is an error, the second a job, the third an empty queue."""
    squeue = tmp_path / "squeue"
    squeue.write_text(
        '#!/bin/sh\ncd "$(dirname "$0")"\necho x >> calls\ncase $(wc -l < calls) in\n'
        "*1) echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1;;\n*2) echo 17;;\nesac\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(cluster, "POLL_S", 0.0)
    launch = RemoteLaunch(make_remote_job, lambda _: Ledger(tmp_path / "samples.jsonl"))
    launch.config = OmegaConf.create({"hydra": {"launcher": {"_target_": "submitit.SlurmLauncher", "name": "bsbr"}}})
    launch._wait_for_slurm()
    assert (tmp_path / "calls").read_text() == "x\n" * 3
    assert capsys.readouterr().err.count("Unable to contact slurm controller") == 1
