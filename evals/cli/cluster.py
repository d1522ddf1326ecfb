"""Comparisons on other machines: a launcher of Hydra's places them, and the ledger tells which of them came to an end.

Every start and end of a job is a record, of the node that it happens on. A job that was started and has no end when it is
started again, by the scheduler or by the next pass of this command, was lost with its node. It has one more try; then a record
says so, from which a row is made.
"""

import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evals.benchmark.job import Job
from evals.errors import UsageError, one_sentence
from evals.isolation.affinity import claim_slot
from evals.measure.clock import now, pause
from evals.results.ledger import Ledger, Record, node_name

TRIES = 2
"""How often a comparison is started, before it is given up with a row."""

POLL_S = 5.0
"""Between two questions to Slurm, which asks not to be asked more often."""


def launcher_of(node: DictConfig) -> tuple[str, dict[str, Any]]:
    """The class name of a hydra.launcher, and its settings."""
    settings: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    return str(settings.pop("_target_")).rpartition(".")[2], settings


def check_launcher(node: DictConfig, kind: str) -> None:
    """Raises UsageError for a hydra.launcher that would have two comparisons share a device or cores. kind: cpu or cuda."""
    name, settings = launcher_of(node)
    if name == "JoblibLauncher":
        jobs = settings["n_jobs"]
        if not isinstance(jobs, int) or jobs < 1:
            raise UsageError(f"hydra.launcher.n_jobs must be how many comparisons run at once, 1 or more, got {jobs!r}")
        if kind == "cpu" and jobs != 1:
            raise UsageError(
                f"hydra.launcher.n_jobs={jobs} would time {jobs} comparisons at once on the cores of one machine; "
                "leave it at 1, or use device=cuda, where each has a GPU and cores of its own"
            )
    elif name == "SlurmLauncher":
        _check_slurm(settings, kind)
    elif name == "RayLauncher":
        remote = settings["ray"].get("remote") or {}
        machine = (remote.get("resources") or {}).get("machine")
        if machine != 1:
            raise UsageError(
                "launcher=ray needs hydra.launcher.ray.remote.resources.machine=1, so that a node measures one comparison at a "
                f"time, got {machine!r}; start every node with --resources='{{\"machine\": 1}}'"
            )
        if kind == "cuda" and remote.get("num_gpus") != 1:
            raise UsageError(
                f"a comparison on cuda needs one GPU, as in +hydra.launcher.ray.remote.num_gpus=1, got {remote.get('num_gpus')!r}"
            )
    elif name != "BasicLauncher":
        raise UsageError(
            f"launcher {name} would let comparisons run side by side on the same cores; use local, joblib, slurm or ray"
        )


def _check_slurm(settings: dict[str, Any], kind: str) -> None:
    extra = settings["additional_parameters"]
    if (settings["nodes"], settings["tasks_per_node"]) != (1, 1):
        raise UsageError(
            "a comparison runs in one process of one node: hydra.launcher.nodes and tasks_per_node must be 1, got "
            f"{settings['nodes']} and {settings['tasks_per_node']}"
        )
    own_node = bool(extra.get("exclusive"))
    if kind == "cpu" and not own_node:
        raise UsageError(
            "without hydra.launcher.additional_parameters.exclusive=true another job may share the cores that are timed: set it"
        )
    if kind == "cuda" and settings["gpus_per_node"] != 1:
        raise UsageError(f"a comparison on cuda needs hydra.launcher.gpus_per_node=1, got {settings['gpus_per_node']!r}")
    if kind == "cuda" and not own_node and settings["cpus_per_task"] is None:
        raise UsageError(
            "where comparisons share a node, each needs cores of its own: set hydra.launcher.cpus_per_task, or exclusive"
        )


Prepare = Callable[[DictConfig, str | None, str], tuple[Job, Ledger]]
"""A function of a module, which nodes import. From a job's config, the swept key and the node's name it makes what works the
job off, and says where the records go."""


class Placed:
    """What runs on a node for each job of a command: pickled, and called by a launcher."""

    def __init__(self, launch: str, swept: str | None, prepare: Prepare) -> None:
        self.launch = launch
        self.swept = swept
        self.prepare = prepare

    def __call__(self, cfg: DictConfig) -> None:
        """Raises UsageError for what cannot be measured on this node, or where it does not see the command's folder."""
        hydra = HydraConfig.get()
        os.chdir(hydra.runtime.cwd)
        check_launcher(hydra.launcher, cfg.device.kind)
        name, settings = launcher_of(hydra.launcher)
        if name == "JoblibLauncher" and settings["n_jobs"] > 1:
            claim_slot(settings["n_jobs"])
        job, ledger = self.prepare(cfg, self.swept, node_name())
        records = [record for record in ledger.read()[0] if record.get("launch") == self.launch]
        if not records:
            raise UsageError(
                f"node {node_name()} does not find {ledger.path.resolve()} as the command left it: results_dir must lie on a disk "
                "that all nodes share, under the same path"
            )
        number = int(hydra.job.num)
        if any((record["kind"], record.get("job")) == ("ended", number) for record in records):
            return
        starts = unfinished(records).get(number, [])
        if len(starts) >= TRIES:
            ledger.append(lost(starts), self._record("ended", number))
            return
        what = {"what": job.kind, "id": job.id, "description": job.description()}
        ledger.append(self._record("started", number, **what))
        try:
            for record in job.run(lambda words, _: print(words, flush=True)):
                print(f"  {record['kind']} {record.get('attention', '')} {record.get('outcome', '')}", flush=True)
        except Exception:
            ledger.append(self._record("ended", number, failed=True))  # not by the node, and not better the next time
            raise
        ledger.append(self._record("ended", number))

    def _record(self, kind: str, job: int, **values: Any) -> Record:
        return {"kind": kind, "launch": self.launch, "job": job, "host": platform.node(), **values, "time": now()}


class Elsewhere:
    """The jobs of one command that a launcher places, on whichever nodes. `ledger_of` says where the command keeps its records."""

    def __init__(self, prepare: Prepare, ledger_of: Callable[[DictConfig], Ledger]) -> None:
        self.prepare = prepare
        self.ledger_of = ledger_of
        self.id = uuid.uuid4().hex[:16]
        self.config: DictConfig | None = None  # of a command that has launched something

    def placed(self, config: DictConfig, swept: str | None) -> Placed:
        """What a launcher is to run. Before anything is started, the ledger says that it will be."""
        if self.config is None:
            launcher = launcher_of(config.hydra.launcher)[0]
            self.ledger_of(config).append({"kind": "launched", "launch": self.id, "launcher": launcher, "time": now()})
        self.config = config
        return Placed(self.id, swept, self.prepare)

    def launch(self, command: Callable[[], None]) -> None:
        """Runs Hydra's command, and again as long as that brings a job further that was lost, or not reached, the time before.

        Raises what a job raised that failed by itself.
        """
        before: list[Record] = []
        while True:
            error: Exception | None = None
            try:
                command()
            except (UsageError, HydraException, OmegaConfBaseException):
                raise
            except Exception as raised:  # every launcher has an error of its own for a node that is gone
                if self.config is None:
                    raise
                error = raised
            if self.config is None:  # all ran in this process
                return
            self._wait_for_slurm()
            records = self._records()
            if error is None:
                return
            if any(record.get("failed") for record in records):
                raise error
            if len(records) == len(before):  # it does not get any further
                self._give_up(records, error)
                return
            before = records
            print(f"launches again what has not ended: {one_sentence(error)}", file=sys.stderr)

    def comparisons(self) -> list[str]:
        """The ids of what this command had started."""
        return [record["id"] for record in self._records() if record["kind"] == "started"]

    def _records(self) -> list[Record]:
        if self.config is None:
            return []
        return [record for record in self.ledger_of(self.config).read()[0] if record.get("launch") == self.id]

    def _give_up(self, records: Sequence[Record], error: Exception) -> None:
        open_ = unfinished(records)
        if self.config is None or not open_:
            raise error
        self.ledger_of(self.config).append(*(lost(starts) for starts in open_.values()))
        print(f"warning: what was not started is left out, since the launcher failed: {one_sentence(error)}", file=sys.stderr)

    def _wait_for_slurm(self) -> None:
        """Until nothing of this command is queued or runs: submitit gives up on all of its jobs as soon as one is lost."""
        name, settings = launcher_of(self.config.hydra.launcher) if self.config else ("", {})
        if name != "SlurmLauncher":
            return
        queue = ["squeue", "--noheader", f"--name={settings['name']}", "--format=%i"]
        while subprocess.run(queue, capture_output=True, text=True, check=True).stdout.strip():
            pause(POLL_S)


def unfinished(records: Sequence[Record]) -> dict[int, list[Record]]:
    """By job, the starts of those that have no end."""
    ended = {record["job"] for record in records if record["kind"] == "ended"}
    open_: dict[int, list[Record]] = {}
    for record in records:
        if record["kind"] == "started" and record["job"] not in ended:
            open_.setdefault(record["job"], []).append(record)
    return open_


def lost(starts: Sequence[Record]) -> Record:
    """What the ledger keeps of a job that was started and has no end."""
    last, hosts = starts[-1], " and ".join(str(start["host"]) for start in starts)
    detail = (
        f"started {len(starts)} times, on {hosts}, and lost with its node" if len(starts) > 1 else f"lost with its node, {hosts}"
    )
    return {"kind": "lost", last["what"]: last["id"], "detail": detail, "described": last["description"], "time": now()}
