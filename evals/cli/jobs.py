"""Turns the composed config of one Hydra job into a comparison that can be worked off."""

from omegaconf import DictConfig

from evals.benchmark.matching import matched
from evals.benchmark.workloads import check_workload
from evals.config import Comparison, read_comparison
from evals.training.tasks.build import for_task


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
        comparison = for_task(comparison)
    return comparison if comparison.match is None else matched(comparison)
