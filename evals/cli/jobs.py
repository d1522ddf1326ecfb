"""Turns the arguments of a command into jobs: its sweeps, the comparison of each config, and the job of each comparison."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from evals.benchmark.certificates import Certificates
from evals.benchmark.engine import Engine
from evals.benchmark.job import Job
from evals.benchmark.matching import match_parameters
from evals.benchmark.max_context import ContextSearch
from evals.benchmark.workloads import check_workload
from evals.cli.hydra_app import add_import_paths, varied_values
from evals.config import Comparison, read_comparison
from evals.errors import UsageError
from evals.paths import CONF
from evals.results.ledger import Ledger
from evals.training.study import Study
from evals.training.tasks.build import adapt_to_task


def expand_sweep_all(arguments: Sequence[str]) -> list[list[str]]:
    """Repeats the arguments once for each sweep in conf/sweep/all.yaml if `sweep=all` is among them; returns one list per sweep."""
    if "sweep=all" not in arguments:
        return [list(arguments)]
    names = yaml.safe_load((CONF / "sweep" / "all.yaml").read_text(encoding="utf-8"))["sweeps"]
    return [[f"sweep={name}" if argument == "sweep=all" else argument for argument in arguments] for name in names]


def read_job(cfg: DictConfig, varied: Mapping[str, Any] | None = None) -> Comparison:
    """Reads a job's composed config, checks its workload or adapts to its task, and matches parameters with match=params.

    Args:
        cfg: the config.
        varied: the keys that the command varies, with their values in this job.

    Raises:
        UsageError: for a config that cannot be measured or trained.
    """
    comparison = read_comparison(cfg, varied or {})
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


def check_outputs(cfg: DictConfig) -> None:
    """Checks that the folders of a sweep can be written, and that its tracker is installed.

    Raises:
        UsageError: if not.
    """
    for key in ("results_dir", "plots_dir"):
        folder = Path(cfg[key]) / cfg.sweep_name
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            reason = "cannot be written" if existing.is_dir() else "is a file"
            raise UsageError(f"{folder} cannot be made, since {existing} {reason}: {key} must name a folder that can be")
    if cfg.tracker is not None:
        from evals.results import trackers  # imports pandas, which takes half a second

        trackers.check(cfg.tracker._target_)


def make_job(comparison: Comparison, ledger: Ledger, certificates: Certificates) -> Job:
    """The job of a comparison: training, context search or timing."""
    kind: type[Job] = Study if comparison.task else ContextSearch if comparison.search else Engine
    return kind(comparison, ledger, certificates)


def make_remote_job(cfg: DictConfig, varied: Sequence[str], node: str) -> tuple[Job, Ledger]:
    """The job of a config on a node of a cluster, and the ledger, to which the node writes in a separate file."""
    add_import_paths()
    ledger = replace(sweep_ledger(cfg), writer=node)
    return make_job(read_job(cfg, varied_values(cfg, varied)), ledger, sweep_certificates(cfg, node)), ledger
