"""`python -m evals.run sweep=seq_len`: compares attentions, one Hydra job a comparison, and shows what came out.

Raw samples go to results/<sweep>/samples.jsonl while they are made; started again, the same command goes on from
there. From them come results/<sweep>/results.csv, the tables on the screen and plots/<sweep>/.
"""

import statistics
import sys
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from evals import cli, figures, table
from evals.config import Comparison, read_comparison
from evals.engine import Engine
from evals.ledger import Ledger, Record


class Run:
    """What the jobs of one command share: the progress bar, and which comparisons were made."""

    def __init__(self) -> None:
        self.bar = tqdm(total=0, disable=None, leave=False, dynamic_ncols=True, bar_format=BAR)
        self.comparisons: list[str] = []

    def compare(self, cfg: DictConfig) -> None:
        """One Hydra job."""
        comparison = read_comparison(cfg, cli.Session.swept)
        engine = Engine(comparison, ledger(cfg), Ledger(Path(cfg.results_dir) / "certificates.jsonl"))
        self.comparisons.append(engine.id)
        self.bar.total = cli.Session.jobs * engine.steps
        place = f"[{len(self.comparisons)}/{cli.Session.jobs}] {swept(comparison)}"
        tqdm.write(f"{place}: {conditions(comparison)}")
        latencies: dict[str, Record] = {}
        for record in engine.run(lambda step: self.bar.set_description_str(f"{place} {step}")):
            self.bar.update()
            if record is None or record["round"] > 0:
                continue
            if record["kind"] == "latency":
                latencies[record["attention"]] = record
            if record["kind"] == "memory" or record["outcome"] != "ok":
                tqdm.write(row(latencies[record["attention"]], record))

    def report(self, cfg: DictConfig) -> int:
        """Writes the table and the plots of all that the sweep's folder holds; shows what this command was about."""
        self.bar.close()
        records, damaged = ledger(cfg).read()
        if damaged:
            numbers = ", ".join(map(str, damaged))
            print(f"warning: {ledger(cfg).path} is damaged in line {numbers}, which is left out", file=sys.stderr)
        results = table.results(records)
        path = ledger(cfg).path.with_name("results.csv")
        table.write(results, path)
        plots = figures.draw(results, Path(cfg.plots_dir) / str(cfg.sweep_name))
        print(table.shown(results[results["comparison"].isin(self.comparisons)]))
        print(f"\n{path}: {len(results)} rows\n{plots[0].parent}/: {', '.join(sorted({plot.name for plot in plots}))}")
        return 0


BAR = "{desc}  {percentage:3.0f}% of {total} steps, {remaining} left"


def ledger(cfg: DictConfig) -> Ledger:
    return Ledger(Path(cfg.results_dir) / str(cfg.sweep_name) / "samples.jsonl")


def swept(comparison: Comparison) -> str:
    """Where in the sweep this comparison stands, as `seq_len=512`."""
    key = (comparison.swept or "shape.seq_len").rpartition(".")[2]
    return f"{key}={comparison.settings[key]}"


def conditions(comparison: Comparison) -> str:
    told = {"batch_size": "batch", "seq_len": "tokens", "hidden_dim": "hidden", "num_heads": "heads", "threads": "threads"}
    settings = {key: value for key, value in comparison.settings.items() if key not in comparison.option}
    return ", ".join(f"{value} {told[key]}" if key in told else str(value) for key, value in settings.items())


def row(latency: Record, memory: Record) -> str:
    """What the first round gave, before the others refine it."""
    name = f"  {latency['attention']:<16}"
    if latency["outcome"] != "ok":
        return f"{name}{latency['outcome']}: {latency['detail']}"
    held = f"{memory['peak_bytes'] / 2**20:10.2f} MiB" if memory["outcome"] == "ok" else f"  memory: {memory['outcome']}"
    return f"{name}{statistics.median(latency['samples_s']) * 1e3:10.3f} ms{held}"


def main() -> int:
    run = Run()
    return cli.run(run.compare, run.report)


if __name__ == "__main__":
    sys.exit(main())
