"""Comparisons on other machines: a launcher of Hydra runs the jobs, and the ledger records which of them have ended.

Every node appends a record when a job starts and one when it ends. A job that starts although an earlier start has no end was
lost with its node. The scheduler, or the next pass of the command, runs a lost job once more. If that is lost too, a record
says so, and the table has a row with the outcome `lost` for each of its attentions.
"""

import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from evals.benchmark.job import Job
from evals.cli.launchers import check_launcher, launcher_settings
from evals.errors import UsageError, one_sentence
from evals.isolation.affinity import claim_slot
from evals.measure.clock import now, pause
from evals.results.ledger import Ledger, Record, node_name

MAX_STARTS = 2
"""How often a job is started before it is given up."""

POLL_S = 5.0
"""Seconds between two calls of squeue, which Slurm asks not to be called more often."""


MakeJob = Callable[[DictConfig, Sequence[str], str], tuple[Job, Ledger]]
"""Makes the job of a config, and its ledger, from the varied keys and the name of the node. Nodes import it from its module."""


@dataclass(frozen=True)
class RemoteJob:
    """The function that a launcher pickles, and calls on a node for each job of the command."""

    launch: str  # id of the command's launch, which all its records carry
    varied: tuple[str, ...]  # the keys that the command varies
    make_job: MakeJob

    def __call__(self, cfg: DictConfig) -> None:
        """Runs one job, between a record of its start and one of its end.

        Raises:
            UsageError: if it cannot run on this node, or if the node does not see the command's ledger.
        """
        hydra = HydraConfig.get()
        os.chdir(hydra.runtime.cwd)
        check_launcher(hydra.launcher, cfg.device.kind)
        name, settings = launcher_settings(hydra.launcher)
        if name == "JoblibLauncher" and settings["n_jobs"] > 1:
            claim_slot(settings["n_jobs"])
        job, ledger = self.make_job(cfg, self.varied, node_name())
        records = [record for record in ledger.read()[0] if record.get("launch") == self.launch]
        if not records:
            raise UsageError(
                f"node {node_name()} does not find {ledger.path.resolve()} as the command left it: results_dir must lie on a disk "
                "that all nodes share, under the same path"
            )
        number = int(hydra.job.num)
        if any((record["kind"], record.get("job")) == ("ended", number) for record in records):
            return
        starts = unfinished_starts(records).get(number, [])
        if len(starts) >= MAX_STARTS:
            ledger.append(lost_record(starts), self._record("ended", number))
            return
        ledger.append(self._record("started", number, what=job.kind, id=job.id, description=job.description()))
        try:
            for record in job.run(lambda message, _: print(message, flush=True)):
                print(f"  {record['kind']} {record.get('attention', '')} {record.get('outcome', '')}", flush=True)
        except Exception:
            # The job failed, not its node: the command shall raise this, and not start the job again.
            ledger.append(self._record("ended", number, failed=True))
            raise
        ledger.append(self._record("ended", number))

    def _record(self, kind: str, job: int, **values: Any) -> Record:
        return {"kind": kind, "launch": self.launch, "job": job, "host": platform.node(), **values, "time": now()}


class RemoteLaunch:
    """The launch of one command's jobs on other machines; runs lost jobs again."""

    def __init__(self, make_job: MakeJob, ledger_of: Callable[[DictConfig], Ledger]) -> None:
        self.make_job = make_job
        self.ledger_of = ledger_of
        self.id = uuid.uuid4().hex[:16]
        self.config: DictConfig | None = None  # None: nothing has been launched

    @property
    def has_launched(self) -> bool:
        """Whether jobs of this command run, or ran, in other processes."""
        return self.config is not None

    def job(self, config: DictConfig, varied: tuple[str, ...]) -> RemoteJob:
        """The function for the launcher. Records the launch in the ledger before any job starts."""
        if not self.has_launched:
            name, _ = launcher_settings(config.hydra.launcher)
            self.ledger_of(config).append({"kind": "launched", "launch": self.id, "launcher": name, "time": now()})
        self.config = config
        return RemoteJob(self.id, varied, self.make_job)

    def launch(self, command: Callable[[], None]) -> None:
        """Runs Hydra's command, and runs it again while that gets jobs further that were lost or not reached before.

        Raises:
            Exception: what a job raised, or what the launcher raised before any job had started.
        """
        before: list[Record] = []
        while True:
            error: Exception | None = None
            try:
                command()
            except UsageError:
                raise
            except Exception as raised:
                # Not narrower: a lost node is an exception of joblib, submitit or ray, none of which need be installed. What a
                # job itself raises comes this way too; its node has recorded it as failed, and it is raised again below.
                if not self.has_launched:
                    raise
                error = raised
            if not self.has_launched:  # all jobs ran in this process
                return
            self._wait_for_slurm()
            records = self._records()
            if error is None:
                return
            if any(record.get("failed") for record in records):
                raise error
            if len(records) == len(before):
                self._give_up(records, error)
                return
            before = records
            print(f"launching unfinished jobs again: {one_sentence(error)}", file=sys.stderr)

    def started_ids(self) -> list[str]:
        """Ids of the comparisons that this command has started."""
        return [record["id"] for record in self._records() if record["kind"] == "started"]

    def _records(self) -> list[Record]:
        if self.config is None:
            return []
        return [record for record in self.ledger_of(self.config).read()[0] if record.get("launch") == self.id]

    def _give_up(self, records: Sequence[Record], error: Exception) -> None:
        """Records unfinished jobs as lost. Raises the error if no job has started."""
        unfinished = unfinished_starts(records)
        if self.config is None or not unfinished:
            raise error
        self.ledger_of(self.config).append(*map(lost_record, unfinished.values()))
        print(f"warning: jobs that did not start are left out, since the launcher failed: {one_sentence(error)}", file=sys.stderr)

    def _wait_for_slurm(self) -> None:
        """Waits until no job of this command is queued or runs: submitit gives up on all jobs as soon as one is lost.

        A controller that restarts does not answer for a while: squeue is asked again until it does.
        """
        name, settings = launcher_settings(self.config.hydra.launcher) if self.config else ("", {})
        if name != "SlurmLauncher":
            return
        queue = ["squeue", "--noheader", f"--name={settings['name']}", "--format=%i"]
        has_failed = False
        while (answer := subprocess.run(queue, capture_output=True, text=True, check=False)).returncode or answer.stdout.strip():
            if answer.returncode and not has_failed:
                has_failed = True
                reason = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
                print(f"warning: squeue failed, and is asked again until it answers: {reason}", file=sys.stderr)
            pause(POLL_S)


def unfinished_starts(records: Sequence[Record]) -> dict[int, list[Record]]:
    """Start records of the jobs without an end record, by the number of the job."""
    ended = {record["job"] for record in records if record["kind"] == "ended"}
    starts: dict[int, list[Record]] = {}
    for record in records:
        if record["kind"] == "started" and record["job"] not in ended:
            starts.setdefault(record["job"], []).append(record)
    return starts


def lost_record(starts: Sequence[Record]) -> Record:
    """The record of a job that is given up, made from the records of its starts."""
    last, hosts = starts[-1], " and ".join(str(start["host"]) for start in starts)
    detail = (
        f"started {len(starts)} times, on {hosts}, and lost with its node" if len(starts) > 1 else f"lost with its node, {hosts}"
    )
    return {"kind": "lost", last["what"]: last["id"], "detail": detail, "described": last["description"], "time": now()}
