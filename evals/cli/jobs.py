"""Turns the arguments of a command into its sweeps, and the composed config of one Hydra job into a comparison to run."""

from collections.abc import Sequence

import yaml
from omegaconf import DictConfig

from evals.benchmark.matching import match_parameters
from evals.benchmark.workloads import check_workload
from evals.config import Comparison, read_comparison
from evals.paths import CONF
from evals.training.tasks.build import adapt_to_task


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
