"""`python -m evals.run`: runs every comparison of a sweep, displays its progress, and writes the outputs."""

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from omegaconf import DictConfig

from evals.benchmark.job import Job
from evals.cli import hydra_app
from evals.cli.cluster import RemoteLaunch
from evals.cli.display import Display, make_display
from evals.cli.jobs import check_outputs, expand_sweep_all, make_job, make_remote_job, read_job, sweep_certificates, sweep_ledger
from evals.cli.progress import make_table
from evals.config import Comparison
from evals.errors import OK, UsageError
from evals.isolation.affinity import core_count
from evals.measure.clock import now, process_age_s
from evals.results.ledger import Ledger

SETTING_NAMES = {"batch_size": "batch", "seq_len": "tokens", "hidden_dim": "hidden", "num_heads": "heads", "threads": "threads"}
"""Words that follow a setting's value in `conditions`; other values stand alone."""


def main() -> int:
    """Runs the sweeps that sys.argv asks for. Returns the exit code."""
    program, *arguments = sys.argv
    is_dry_run = "--dry-run" in arguments
    worst = OK
    for sweep_arguments in expand_sweep_all([argument for argument in arguments if argument != "--dry-run"]):
        sys.argv = [program, *sweep_arguments]
        worst = max(worst, DryRun().run() if is_dry_run else SweepRun(sweep_arguments).run())
    return worst


class Plan:
    """The jobs of a command. All of them are read and checked before the first is run."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def check(self, session: hydra_app.Session) -> None:
        """Reads the jobs from their configs.

        Raises:
            UsageError: if there is none, if one cannot be run, if two would have the same row of the table, or if an output could
                not be written.
        """
        if session.config is not None:
            if not session.jobs:
                raise UsageError("this command has no comparison: one of the settings that it varies has no values")
            comparisons = [read_job(one.cfg, one.varied) for one in session.jobs]
            check_outputs(session.config)
            ledger, certificates = sweep_ledger(session.config), sweep_certificates(session.config)
            self.jobs = [make_job(comparison, ledger, certificates) for comparison in comparisons]
        rows: dict[tuple[str, str], str] = {}
        for job in self.jobs:
            for candidate in job.comparison.candidates:
                row = candidate.name, json.dumps(job.settings, sort_keys=True)
                if rows.setdefault(row, job.id) != job.id:
                    raise UsageError(
                        f"two comparisons of this command would be the same row of the table, {candidate.name} with "
                        f"{conditions(job.comparison)}: what differs between them is no setting; run them with a sweep_name each"
                    )


class DryRun(Plan):
    """Prints the remaining work of each comparison, and its estimated duration; writes nothing."""

    def run(self) -> int:
        session = hydra_app.compose_jobs()
        if session.config is None:
            return OK
        self.check(session)
        seconds_left = []
        for number, job in enumerate(self.jobs, start=1):
            comparison = job.comparison
            done, left_s = job.remaining()
            seconds_left.append(left_s or 0.0)
            print(f"[{number}/{len(self.jobs)}] {swept_setting(comparison)}: {conditions(comparison)}")
            names = ", ".join(candidate.name for candidate in comparison.candidates)
            unit = "training runs" if comparison.task else "lengths" if comparison.search else "rounds"
            left = "the time left is not known" if left_s is None else f"about {left_s:.0f} s left"
            print(f"  {names}: {done} {unit} are done, {left}")
        print(f"about {sum(seconds_left) / 60:.1f} min in all; nothing was measured")
        return OK


class SweepRun(Plan):
    """One sweep of the command: runs its jobs, handles Ctrl-C, and writes the outputs."""

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__()
        self.command = shlex.join(["python", "-m", "evals.run", *arguments])
        self.remote = RemoteLaunch(make_remote_job, sweep_ledger)
        self.display = Display()
        self.job_ids: list[str] = []
        self.has_measured = False
        self.called_s = 0.0
        self.checked_s = 0.0
        self.is_interrupted = False
        self.when_it_stops = "after this round"

    def run(self) -> int:
        """Runs what sys.argv asks for; returns the exit code. After Ctrl-C raises KeyboardInterrupt, once the outputs exist."""
        handler = signal.signal(signal.SIGINT, self._interrupt)
        try:
            return hydra_app.run(self._run_job, self.finish, check=self.check, remote=self.remote)
        finally:
            signal.signal(signal.SIGINT, handler or signal.default_int_handler)

    def make_display(self, *, quiet: bool) -> Display:
        """The display of the jobs, made once there is something to measure."""
        return make_display(len(self.jobs), quiet=quiet)

    def _run_job(self, config: hydra_app.JobConfig) -> None:
        job = self.jobs[len(self.job_ids)]
        comparison = job.comparison
        self.job_ids.append(job.id)
        torn = job.ledger.repair()
        if torn:
            print(f"warning: {torn}", file=sys.stderr)
        self._record_command(job.ledger)
        if job.is_complete():
            return
        if not self.has_measured:
            self.display = self.make_display(quiet=config.cfg.quiet)
            self.has_measured = True
        if comparison.task:
            self.when_it_stops = "within seconds, and continues from the last checkpoint"
        title = f"[{len(self.job_ids)}/{len(self.jobs)}] {swept_setting(comparison)}"
        self.display.begin(title, conditions(comparison), make_table(job))
        finished = False
        try:
            self._work_off(job)
            finished = True
        finally:
            self.display.end(finished=finished)

    def _work_off(self, job: Job) -> None:
        """Runs a job. Raises KeyboardInterrupt after Ctrl-C, as soon as the ledger holds the whole round, probe or checkpoint."""
        done = len(self.job_ids) - 1

        def report(message: str, share: float) -> None:
            self._stop_if_interrupted()  # a round has ended; a training run continues from its checkpoint
            self.display.report(message, (done + share) / len(self.jobs))

        for record in job.run(report):
            # Preflights run side by side, one per core; everything else runs alone.
            at_once = core_count() if record["kind"] == "preflight" else 1
            self.called_s += record.get("called_s", 0.0) / at_once
            self.checked_s += record.get("checked_s", 0.0) / at_once
            self.display.add(record)
            if record["kind"] != "latency":  # a round is several records
                self._stop_if_interrupted()
        self._stop_if_interrupted()

    def _record_command(self, ledger: Ledger) -> None:
        """Records in the ledger that this command has added to it, once."""
        if all(record.get("command") != self.command for record in ledger.read()[0]):
            ledger.append({"kind": "command", "command": self.command, "time": now()})

    def _stop_if_interrupted(self) -> None:
        if self.is_interrupted:
            raise KeyboardInterrupt

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """Handles Ctrl-C: the first lets the running round end, the second ends the command."""
        if self.remote.has_launched:  # this process only waits; jobs on other nodes continue
            raise KeyboardInterrupt
        if self.is_interrupted:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise hydra_app.ForceQuit
        self.is_interrupted = True
        self.display.notify(f"stops {self.when_it_stops}; Ctrl-C again stops at once")

    def finish(self, cfg: DictConfig) -> int:
        """Writes the outputs of the sweep's folder, and shows those of this command. Returns the exit code."""
        self.job_ids += self.remote.started_ids()
        if self.job_ids and not self.has_measured and not self.remote.has_launched and not self.is_interrupted:
            folder = sweep_ledger(cfg).path.parent
            count = len(self.job_ids)
            comparisons = f"all {count} comparisons" if count > 1 else "this comparison"
            print(f"Nothing is left to measure: {folder} holds {comparisons}.\n", flush=True)
        # Only now: pandas and matplotlib take seconds to import, which would delay the first measurement.
        from evals.cli.outputs import write_outputs

        code = write_outputs(cfg, self.job_ids, self.command)
        if self.called_s:
            seconds = process_age_s()
            checked = f"{self.checked_s / seconds:.0%} into checks"
            print(f"{self.called_s / seconds:.0%} of {seconds:.0f} s went into measured calls and their warm-up, {checked}")
        return code


def swept_setting(comparison: Comparison) -> str:
    """The varied settings of a comparison with their values, such as `seq_len=512`; the length, if none is varied."""
    option = comparison.option or {"seq_len": comparison.shape.seq_len}
    return ", ".join(f"{key}={value}" for key, value in option.items())


def conditions(comparison: Comparison) -> str:
    """The settings of a comparison that the sweep does not vary, on one line."""
    settings = {key: value for key, value in comparison.settings.items() if key not in comparison.option and value is not None}
    if comparison.task:
        return ", ".join(str(value) if key == "task" else f"{key} {value}" for key, value in settings.items())
    return ", ".join(f"{value} {SETTING_NAMES[key]}" if key in SETTING_NAMES else str(value) for key, value in settings.items())
