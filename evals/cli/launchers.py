"""Checks of Hydra's launchers: no two comparisons may share a device or cores while they are timed."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from evals.errors import UsageError


def launcher_settings(node: DictConfig) -> tuple[str, dict[str, Any]]:
    """The class name of a hydra.launcher, and its settings."""
    settings: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    return str(settings.pop("_target_")).rpartition(".")[2], settings


def check_launcher(node: DictConfig, kind: str) -> None:
    """Raises UsageError if a hydra.launcher could run two comparisons on one device (kind: cpu or cuda) or on the same cores."""
    name, settings = launcher_settings(node)
    if name == "JoblibLauncher":
        _check_joblib(settings, kind)
    elif name == "SlurmLauncher":
        _check_slurm(settings, kind)
    elif name == "RayLauncher":
        _check_ray(settings, kind)
    elif name != "BasicLauncher":
        raise UsageError(
            f"launcher {name} would let comparisons run side by side on the same cores; use local, joblib, slurm or ray"
        )


def _check_joblib(settings: dict[str, Any], kind: str) -> None:
    jobs = settings["n_jobs"]
    if not isinstance(jobs, int) or jobs < 1:
        raise UsageError(f"hydra.launcher.n_jobs must be how many comparisons run at once, 1 or more, got {jobs!r}")
    if kind == "cpu" and jobs != 1:
        raise UsageError(
            f"hydra.launcher.n_jobs={jobs} would time {jobs} comparisons at once on the cores of one machine; "
            "leave it at 1, or use device=cuda, where each has a GPU and cores of its own"
        )


def _check_slurm(settings: dict[str, Any], kind: str) -> None:
    if (settings["nodes"], settings["tasks_per_node"]) != (1, 1):
        raise UsageError(
            "a comparison runs in one process of one node: hydra.launcher.nodes and tasks_per_node must be 1, got "
            f"{settings['nodes']} and {settings['tasks_per_node']}"
        )
    is_exclusive = bool(settings["additional_parameters"].get("exclusive"))
    if kind == "cpu" and not is_exclusive:
        raise UsageError(
            "without hydra.launcher.additional_parameters.exclusive=true another job may share the cores that are timed: set it"
        )
    if kind == "cuda" and settings["gpus_per_node"] != 1:
        raise UsageError(f"a comparison on cuda needs hydra.launcher.gpus_per_node=1, got {settings['gpus_per_node']!r}")
    if kind == "cuda" and not is_exclusive and settings["cpus_per_task"] is None:
        raise UsageError(
            "where comparisons share a node, each needs cores of its own: set hydra.launcher.cpus_per_task, or exclusive"
        )


def _check_ray(settings: dict[str, Any], kind: str) -> None:
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
