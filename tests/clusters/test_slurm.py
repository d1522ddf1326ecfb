"""A sweep on a real Slurm: a slurmctld and two slurmd on this machine, one of which dies with all that runs on it.

Debian has it as slurm-wlm. It needs neither munge nor accounting, and to be root, as whom slurmd starts jobs.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.clusters.sweeps import LONG, sweep

CONFIG = """
ClusterName=bsbr
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdTimeout=5
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=main Nodes=ALL Default=YES State=UP
"""


pytestmark = [
    LONG,
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="NOT TESTED: Slurm is not installed (apt-get install slurm-wlm)"),
    pytest.mark.skipif(os.getuid() != 0, reason="NOT TESTED: slurmd starts jobs as root only"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, since sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find the cluster."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    (folder / "state").mkdir()
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=socket.gethostname(), ports=ports, folder=folder))
    environment = os.environ | {"SLURM_CONF": str(config)}
    try:
        subprocess.run(["slurmctld", "-f", config], check=True, env=environment)
        for node in ("node1", "node2"):
            subprocess.run(["slurmd", "-f", config, "-N", node], check=True, env=environment)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, check=False)
        for node in ("node1", "node2"):
            kill(node, folder)
        daemon(folder / "slurmctld.pid").kill()


def daemon(file: Path) -> psutil.Process:
    return psutil.Process(int(file.read_text()))


def kill(node: str, folder: Path) -> None:
    """All at once, as when the power fails: slurmd, what it watches a job with, and the job."""
    victims = set()
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("SLURMD_NODENAME") == node:
            victims |= {process, *(one for one in process.parents() if one.name().startswith("slurmstepd"))}
    if (folder / f"{node}.pid").exists() and psutil.pid_exists(int((folder / f"{node}.pid").read_text())):
        victims.add(daemon(folder / f"{node}.pid"))
    for one in victims:
        if one.is_running():
            one.send_signal(signal.SIGKILL)


def said(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def node_of(job: int, environment: dict[str, str]) -> str:
    lines = said(environment, "squeue", "--noheader", "--states=running", "--format=%K %N").splitlines()
    return dict(line.split() for line in lines)[str(job)]


def test_a_sweep_ends_though_a_node_dies_under_it(slurm: dict[str, str], folder: Path, tmp_path: Path) -> None:
    running = sweep(tmp_path, slurm, "launcher=slurm")
    running.wait_for(lambda: running.records("latency"))
    busy = running.records("latency")[0]["comparison"]
    first = next(record for record in running.records("started") if record["id"] == busy)
    kill(node_of(first["job"], slurm), folder)
    # Slurm would have it wait for two minutes more.
    running.wait_for(lambda: "PENDING" in said(slurm, "squeue", "--format=%T"))
    said(slurm, "scontrol", "update", f"JobId=1_{first['job']}", "StartTime=now")
    _, table = running.end()
    assert sorted(zip(table["attention"], table["seq_len"], strict=True)) == [
        ("linear", 60), ("linear", 129), ("standard", 60), ("standard", 129),
    ]  # fmt: skip
    assert (table["outcome"] == "ok").all()
    starts = [record["job"] for record in running.records("started")]
    assert sorted(starts) == sorted([0, 1, first["job"]])  # one of them twice
    assert sorted(record["job"] for record in running.records("ended")) == [0, 1]
