"""Export of results to the experiment trackers TensorBoard, MLflow and Weights & Biases.

A tracker is written anew from the finished tables, after all measurements.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
from hydra.utils import get_method

from evals.errors import UsageError, not_found
from evals.results.frames import swept_column


@dataclass(frozen=True)
class Series:
    """One run of a tracker: an attention over the swept setting, or the loss curve of a training run."""

    path: tuple[str, ...]
    points: list[tuple[int, dict[str, float]]]  # (step, values by column)
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "/".join(self.path)


def to_series(results: pd.DataFrame, curves: pd.DataFrame | None = None) -> Iterator[Series]:
    """Converts tables to series: all numbers of rows with the outcome ok, and all loss curves.

    The step is the value of the swept setting if that is a whole number, otherwise the index of the row.
    """
    axis = swept_column(results)
    numbers = [str(column) for column in results.select_dtypes("number") if column != axis]
    for attention, rows in results[results["outcome"] == "ok"].groupby("attention", sort=False):
        points = []
        for index, (_, row) in enumerate(rows.iterrows()):
            whole = pd.api.types.is_integer_dtype(results[axis])
            step = int(row[axis]) if whole else index
            points.append((step, {column: float(row[column]) for column in numbers if pd.notna(row[column])}))
        yield Series((str(attention),), points, {"swept": axis, **({} if whole else {axis: rows[axis].astype(str).tolist()})})
    if curves is None:
        return
    keys = ["attention", "learning_rate", "seed", *([axis] if axis in curves else [])]
    for key, curve in curves.groupby(keys, sort=False):
        parameters = dict(zip(keys, key, strict=True))
        path = ("curves", *(str(value) for value in parameters.values()))
        losses = [(int(step), {"loss_nats": float(loss)}) for step, loss in zip(curve["step"], curve["loss_nats"], strict=True)]
        yield Series(path, losses, parameters)


def tensorboard(results: pd.DataFrame, curves: pd.DataFrame | None, *, sweep: str, folder: Path) -> Path:
    """Writes event files below <folder>/tensorboard. Show them with: tensorboard --logdir <folder>/tensorboard."""
    import_client("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    target = folder / "tensorboard"
    shutil.rmtree(target, ignore_errors=True)
    for series in to_series(results, curves):
        with SummaryWriter(str(target.joinpath(*map(_folder_name, series.path)))) as writer:
            for step, values in series.points:
                for name, value in values.items():
                    writer.add_scalar(f"{sweep}/{name}", value, step)
    return target


def _folder_name(text: str) -> str:
    """The text as the name of one folder: slashes, and a name of dots alone, become %2F and %2E."""
    name = text.replace("%", "%25").replace("/", "%2F")
    return name.replace(".", "%2E") if name in (".", "..") else name


def mlflow(results: pd.DataFrame, curves: pd.DataFrame | None, *, sweep: str, folder: Path, uri: str | None = None) -> Path:
    """Writes runs of the experiment bsbr/<sweep> to the tracking server at `uri`; None: to <folder>/mlflow.db."""
    database = folder / "mlflow.db"
    library = import_client("mlflow")
    library.set_tracking_uri(uri or f"sqlite:///{database.resolve()}")
    library.set_experiment(f"bsbr/{sweep}")
    for series in to_series(results, curves):
        with library.start_run(run_name=series.name):
            library.log_params(series.parameters)
            for step, values in series.points:
                library.log_metrics(values, step=step)
    return database


def wandb(results: pd.DataFrame, curves: pd.DataFrame | None, *, sweep: str, folder: Path, mode: str = "offline") -> Path:
    """Writes runs of the project bsbr, grouped by sweep. Mode `offline` leaves them in the folder for `wandb sync`."""
    library = import_client("wandb")
    for series in to_series(results, curves):
        settings = {"project": "bsbr", "group": sweep, "name": series.name, "dir": str(folder), "mode": mode}
        with library.init(config=series.parameters, **settings) as run:
            for step, values in sorted(series.points, key=lambda point: point[0]):
                run.log(values, step=step)
    return folder / "wandb"


def check(target: str) -> None:
    """Checks that a tracker's function exists and that its library is installed. Raises UsageError if not."""
    try:
        get_method(target)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"tracker._target_ must be a function such as evals.results.trackers.mlflow: {not_found(target)}"
        ) from error
    if target.startswith(f"{__name__}."):
        import_client(target.rpartition(".")[2])


def import_client(name: str) -> ModuleType:
    """Imports the library of a tracker.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(f"tracker={name} needs its client, which is not installed: pip install {name}") from error
