"""Turns the arguments of a command into jobs: its sweeps, the comparison of each config, and the job of each comparison."""

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
    """Repeats the arguments once for each sweep in conf/sweep/all.yaml if `sweep=all` is among them; returns one list per sweep."""
    if "sweep=all" not in arguments:
        return [list(arguments)]
    names = yaml.safe_load((CONF / "sweep" / "all.yaml").read_text())["sweeps"]
    return [[f"sweep={name}" if argument == "sweep=all" else argument for argument in arguments] for name in names]


def read_job(cfg: DictConfig, swept: str | None = None) -> Comparison:
    """Reads a job's composed config, checks its workload or adapts to its task, and matches parameters with match=params.

    Args:
        cfg: the config.
        swept: the key that the command varies; used if the config names none.

    Raises:
        UsageError: for a config that cannot be measured or trained.
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
    """The certificates that all sweeps of the config's result folder share. node: name of the writing node, on a cluster."""
    return Certificates(Path(cfg.results_dir) / "certificates.jsonl", node)


def make_job(comparison: Comparison, ledger: Ledger, certificates: Certificates) -> Job:
    """The job of a comparison: training, context search or timing."""
    kind: type[Job] = Study if comparison.task else ContextSearch if comparison.search else Engine
    return kind(comparison, ledger, certificates)


def make_remote_job(cfg: DictConfig, swept: str | None, node: str) -> tuple[Job, Ledger]:
    """The job of a config on a node of a cluster, and the ledger, to which the node writes in a separate file."""
    add_import_paths()
    ledger = replace(sweep_ledger(cfg), writer=node)
    return make_job(read_job(cfg, swept), ledger, sweep_certificates(cfg, node)), ledger
