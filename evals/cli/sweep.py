"""What `python -m evals.run` does: works off every comparison that it is asked for, and shows what came out."""

import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig

from evals.benchmark import max_context
from evals.benchmark.engine import Engine
from evals.benchmark.job import Job
from evals.cli import hydra_app
from evals.cli.cluster import RemoteLaunch
from evals.cli.display import Display, Outlook, Quiet, display
from evals.cli.jobs import expand_sweep_all, read_job
from evals.cli.progress import board
from evals.config import Comparison
from evals.errors import INCOMPLETE
from evals.isolation.affinity import core_count
from evals.measure.clock import now, process_age_s
from evals.plots import registry
from evals.results import accuracy_table, latency_table
from evals.results.formatting import wrap
from evals.results.ledger import Ledger, Record
from evals.training.study import Study


class Run:
    """What the jobs of one command share: what shows them, and which comparisons were made."""

    def __init__(self, arguments: Sequence[str], *, dry: bool) -> None:
        self.command = shlex.join(["python", "-m", "evals.run", *arguments])
        self.dry = dry
        self.seconds_left = 0.0
        self.called_s = 0.0
        self.interrupted = False
        self.stops = "after this round"
        self.outlook = Outlook()
        self.display: Display | None = None
        self.comparisons: list[str] = []
        self.session = hydra_app.Session()
        self.remote = RemoteLaunch(prepare, ledger)

    def compare(self, cfg: DictConfig) -> None:
        """One Hydra job."""
        comparison = read_job(cfg, self.session.swept)
        samples = ledger(cfg)
        certificates = Ledger(Path(cfg.results_dir) / "certificates.jsonl")
        job = kind_of(comparison)(comparison, samples, certificates)
        behind = len(self.comparisons)
        self.comparisons.append(job.id)
        place = f"[{behind + 1}/{self.session.jobs}] {swept(comparison)}"
        if self.dry:
            print(f"{place}: {conditions(comparison)}")
            made, seconds = job.remaining()
            self.seconds_left += seconds or 0.0
            names = ", ".join(candidate.name for candidate in comparison.candidates)
            left = "how long the others take is not known" if seconds is None else f"about {seconds:.0f} s to go"
            print(f"  {names}: {made} {'runs' if comparison.task else 'rounds'} are made, {left}")
            return
        torn = samples.mend()
        if torn:
            print(f"warning: {torn}", file=sys.stderr)
        self.note_command(samples)
        shown = self.display = self.display or display(quiet=cfg.quiet)

        def watch(words: str, part: float) -> None:
            if self.interrupted:  # a round is over, and a training run goes on from its checkpoint
                raise KeyboardInterrupt
            done = behind + part
            shown.watch(words, done / self.session.jobs, self.outlook.left(done, self.session.jobs))

        if comparison.task:
            self.stops = "within seconds, and goes on from the last checkpoint"
        shown.begin(place, conditions(comparison), board(job, comparison, samples.read()[0]))
        to_go = None
        try:
            for record in job.run(watch):
                # As many trials at once as there are cores; of all else, one thing at a time.
                self.called_s += record.get("called_s", 0.0) / (core_count() if record["kind"] == "preflight" else 1)
                shown.add(record)
                if self.interrupted and record["kind"] != "latency":  # of which a round has several
                    raise KeyboardInterrupt
            if self.interrupted:
                raise KeyboardInterrupt
            self.outlook.found += not shown.begun
            to_go = self.outlook.left(behind + 1, self.session.jobs)
        finally:
            shown.end(to_go)

    def note_command(self, samples: Ledger) -> None:
        """Has the ledger hold the command that adds to it, once."""
        if all(record.get("command") != self.command for record in samples.read()[0]):
            samples.append({"kind": "command", "command": self.command, "time": now()})

    def interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """What Ctrl-C does: once, it lets the running round end."""
        if self.remote.has_launched:  # what runs on other nodes goes on, and this only waits for it
            raise KeyboardInterrupt
        if self.interrupted:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise hydra_app.ForceQuit
        self.interrupted = True
        (self.display or Quiet()).say(f"stops {self.stops}; Ctrl-C again stops at once")

    def report(self, cfg: DictConfig) -> int:
        """Writes the table and the plots of all that the sweep's folder holds; shows what this command was about."""
        # Not before: they take two seconds to import, for which a comparison would have to wait.
        from evals.results.scaling_table import build

        self.comparisons += self.remote.started_ids()
        if self.dry:
            print(f"in all about {self.seconds_left / 60:.1f} min; nothing was measured")
            return 0
        records = ledger(cfg).intact()
        if cfg.search:
            return self.report_search(cfg, max_context.results(records))
        if cfg.task:
            return self.report_study(cfg, records)
        results = latency_table.build(records)
        if results.empty:
            return 0
        folder = ledger(cfg).path.parent
        path = latency_table.write(results, folder, "latency")
        fits = build(results, records)
        for name, fitted in fits.items():
            latency_table.write(fitted, folder, name)
        plots = registry.draw_sweep(results, Path(cfg.plots_dir) / str(cfg.sweep_name), **fits)
        track(cfg, results)
        own = results[results["comparison"].isin(self.comparisons)]
        print(latency_table.render(own))
        print(f"\n{written(path, results, plots)}")
        if self.called_s:
            seconds = process_age_s()
            print(f"{self.called_s / seconds:.0%} of {seconds:.0f} s went into calls that were measured, or warmed up for that")
        return 0 if (own["outcome"] == "ok").all() else INCOMPLETE

    def report_search(self, cfg: DictConfig, results: "pd.DataFrame") -> int:

        path = latency_table.write(results, ledger(cfg).path.parent, "max_context")
        plots = registry.draw_max_context(results, Path(cfg.plots_dir) / str(cfg.sweep_name))
        print(max_context.shown(results))
        print(f"\n{written(path, results, plots)}")
        return 0 if (results["outcome"] == "ok").all() else INCOMPLETE

    def report_study(self, cfg: DictConfig, records: list[Record]) -> int:

        results, curves = accuracy_table.build(records), accuracy_table.build_curves(records)
        if results.empty:
            return 0
        path = latency_table.write(results, ledger(cfg).path.parent, "accuracy")
        latency_table.write(curves, ledger(cfg).path.parent, "curves")
        track(cfg, results, curves)
        plots = registry.draw_accuracy(results, curves, Path(cfg.plots_dir) / str(cfg.sweep_name))
        own = results[results["study"].isin(self.comparisons)]
        print(accuracy_table.render(own))
        print(f"\n{written(path, results, plots)}")
        learned = own["best"] & (own["outcome"] == "ok")  # at some rate, which is what counts
        return 0 if learned.groupby([own["study"], own["attention"]]).any().all() else INCOMPLETE


if TYPE_CHECKING:
    import pandas as pd


def track(cfg: DictConfig, results: "pd.DataFrame", curves: "pd.DataFrame | None" = None) -> None:
    """Writes the tables for a tracker, where one is asked for."""
    if cfg.tracker:
        place = instantiate(cfg.tracker, results, curves, sweep=str(cfg.sweep_name), folder=ledger(cfg).path.parent)
        print(f"{place}: the same for {cfg.tracker._target_.rpartition('.')[2]}")


def written(path: Path, results: "pd.DataFrame", plots: Sequence[Path]) -> str:
    """Writes the report of a table that was written to `path`; says which files there are now."""
    from evals import report

    lines = [f"{path}: {len(results)} rows", str(report.write([path.parent], path.with_name("report.html")))]
    if plots:
        kinds = " and ".join(sorted({plot.suffix[1:].upper() for plot in plots}))
        lines.append(wrap(f"{plots[0].parent}/, as {kinds}: {', '.join(sorted({plot.stem for plot in plots}))}"))
    return "\n".join(lines)


def ledger(cfg: DictConfig) -> Ledger:
    return Ledger(Path(cfg.results_dir) / str(cfg.sweep_name) / "samples.jsonl")


def prepare(cfg: DictConfig, swept: str | None, node: str) -> tuple[Job, Ledger]:
    """What works a job off on a node, and where its records go."""
    hydra_app.add_import_paths()
    comparison = read_job(cfg, swept)
    samples = replace(ledger(cfg), writer=node)
    return kind_of(comparison)(comparison, samples, Ledger(Path(cfg.results_dir) / "certificates.jsonl", node)), samples


def kind_of(comparison: Comparison) -> type[Job]:
    """What works it off: one that trains, one that looks for the longest sequence, or one that times."""
    return Study if comparison.task else max_context.ContextSearch if comparison.search else Engine


def swept(comparison: Comparison) -> str:
    """Where in the sweep this comparison stands, as `seq_len=512`."""
    key = (comparison.swept or "shape.seq_len").rpartition(".")[2]
    return f"{key}={comparison.settings[key]}"


def conditions(comparison: Comparison) -> str:
    told = {"batch_size": "batch", "seq_len": "tokens", "hidden_dim": "hidden", "num_heads": "heads", "threads": "threads"}
    settings = {key: value for key, value in comparison.settings.items() if key not in comparison.option and value is not None}
    if comparison.task:
        return ", ".join(str(value) if key == "task" else f"{key} {value}" for key, value in settings.items())
    return ", ".join(f"{value} {told[key]}" if key in told else str(value) for key, value in settings.items())


def main() -> int:
    program, *words = sys.argv
    dry, worst = "--dry-run" in words, 0
    for arguments in expand_sweep_all([word for word in words if word != "--dry-run"]):
        here = ["launcher=local"] if dry else []
        sys.argv = [program, *arguments, *here]
        run = Run(arguments, dry=dry)
        signal.signal(signal.SIGINT, run.interrupt)
        try:
            code = hydra_app.run(run.compare, run.report, session=run.session, remote=run.remote)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if code not in (0, INCOMPLETE):
            return code
        worst = max(worst, code)
    return worst
