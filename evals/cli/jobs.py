"""From the arguments of a command to the jobs that it runs: its sweeps, the comparison of each config, and the job for each."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from omegaconf import DictConfig

from evals.benchmark.certificates import Certificates
from evals.benchmark.engine import Engine
from evals.benchmark.job import Job
from evals.benchmark.matching import match_parameters
from evals.benchmark.max_context import ContextSearch
from evals.benchmark.workloads import check_workload
from evals.cli.hydra_app import add_import_paths
from evals.config import Comparison, read_comparison
from evals.paths import CONF
from evals.results.ledger import Ledger
from evals.training.study import Study
from evals.training.tasks.build import adapt_to_task


def expand_sweep_all(arguments: Sequence[str]) -> list[list[str]]:
    """Repeats the command's arguments once for each sweep that `sweep=all` stands for, as conf/sweep/all.yaml lists them.

    Args:
        arguments: what the user gave the command.

    Returns:
        One list of arguments per sweep; only the given one if it has no `sweep=all`.
    """
    if "sweep=all" not in arguments:
        return [list(arguments)]
    names = yaml.safe_load((CONF / "sweep" / "all.yaml").read_text())["sweeps"]
    return [[f"sweep={name}" if argument == "sweep=all" else argument for argument in arguments] for name in names]


def read_job(cfg: DictConfig, swept: str | None = None) -> Comparison:
    """Reads a config, checks its workload or task, and matches parameters where `match` asks for it.

    Args:
        cfg: a job's composed config.
        swept: the key that the command varies, which counts where the config names none.

    Returns:
        The comparison, with a task's vocabulary and every candidate's own ff_dim.

    Raises:
        UsageError: for what cannot be measured or trained.
    """
    comparison = read_comparison(cfg, swept)
    if comparison.task is None:
        check_workload(comparison)
    else:
        comparison = adapt_to_task(comparison)
    return comparison if comparison.match is None else match_parameters(comparison)


def sweep_ledger(cfg: DictConfig) -> Ledger:
    """The ledger of the config's sweep."""
    return Ledger(Path(cfg.results_dir) / str(cfg.sweep_name) / "samples.jsonl")


def sweep_certificates(cfg: DictConfig, node: str = "") -> Certificates:
    """The certificates that all sweeps of the config's result folder share. node: the one that writes, on a cluster."""
    return Certificates(Path(cfg.results_dir) / "certificates.jsonl", node)


def make_job(comparison: Comparison, ledger: Ledger, certificates: Certificates) -> Job:
    """The job for a comparison: one that trains, one that searches the longest context, or one that times."""
    kind: type[Job] = Study if comparison.task else ContextSearch if comparison.search else Engine
    return kind(comparison, ledger, certificates)


def make_remote_job(cfg: DictConfig, swept: str | None, node: str) -> tuple[Job, Ledger]:
    """The job of a config on a node of a cluster, and the ledger, in which the node has a file of its own."""
    add_import_paths()
    ledger = replace(sweep_ledger(cfg), writer=node)
    return make_job(read_job(cfg, swept), ledger, sweep_certificates(cfg, node)), ledger
