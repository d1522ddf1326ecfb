"""Runs the comparisons of `evals.compare`, in the way of `python -m evals.run` and with its settings."""

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from evals.api.attentions import overrides, read_choices, write_configs
from evals.api.results import Results
from evals.cli.display import BarDisplay, Display
from evals.cli.jobs import sweep_ledger
from evals.cli.outputs import build_tables
from evals.cli.overrides import quote
from evals.cli.sweep import SweepRun
from evals.errors import OK, UsageError
from evals.paths import CONF
from evals.results.schema import write_table

SIZES = {
    "seq_len": "shape.seq_len",
    "batch_size": "shape.batch_size",
    "hidden_dim": "model.hidden_dim",
    "num_heads": "model.num_heads",
    "dtype": "device.dtype",
    "threads": "device.threads",
}
"""The settings that `evals.compare` can vary, by the names of its arguments."""


class ComparisonRun(SweepRun):
    """The run of a command line without a terminal: shows a progress bar, and writes the tables alone."""

    def make_display(self, *, quiet: bool) -> Display:
        return Display() if quiet else BarDisplay(len(self.jobs))

    def finish(self, cfg: DictConfig) -> int:
        ledger = sweep_ledger(cfg)
        for kind, table in build_tables(ledger.intact()).items():
            write_table(table, ledger.path.parent, kind)
        return OK


def measure(
    attentions: Sequence[Any], sizes: Mapping[str, Any], settings: Mapping[str, Any], results_dir: Path, sweep_name: str | None
) -> Results:
    """Measures what is not yet measured, and returns the results.

    Args:
        attentions: as `evals.compare` takes them.
        sizes: a value, several or None for each name in `SIZES`.
        settings: further settings of the command line; those that are None are left out.
        results_dir, sweep_name: where the results lie; by default the folder is called after the first of the sizes that vary.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("evals.compare must be called from the main thread, which alone can be interrupted")
    choices = read_choices(attentions)
    names = [choice.name for choice in choices]
    reference = {} if settings.get("relative_to") or "standard" in names else {"relative_to": names[0]}
    values = {SIZES[name]: _values(name, value) for name, value in sizes.items() if value is not None}
    varied = [SIZES[name] for name, value in sizes.items() if _is_several(value)]
    name = sweep_name or (varied[0].rpartition(".")[2] if varied else "single")
    folder = results_dir / name
    own = folder / "attentions"
    write_configs(choices, own)
    is_own = any(not choice.is_configured for choice in choices)
    arguments = [
        *(["--multirun"] if any(len(several) > 1 for several in values.values()) else []),
        *(["--config-dir", str(own)] if is_own else []),
        *overrides(choices),
        *(f"{key}={','.join(map(quote, several))}" for key, several in values.items()),
        *([f"swept={varied[0]}"] if varied else []),
        *(_override(key, value) for key, value in {**settings, **reference}.items() if value is not None),
        f"results_dir={quote(str(results_dir))}",
        f"sweep_name={quote(name)}",
    ]
    run = ComparisonRun(arguments)
    try:
        with _command_line(arguments):
            run.run()
    finally:
        run.display.close()
    return Results(folder, run.job_ids)


def _is_several(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


def _values(name: str, value: Any) -> list[Any]:
    several = list(value) if _is_several(value) else [value]
    if not several:
        raise UsageError(f"{name} must hold at least one value, got {value!r}")
    return [str(one).removeprefix("torch.") if isinstance(one, torch.dtype) else one for one in several]


def _override(key: str, value: Any) -> str:
    """A setting in the form of the command line; groups, such as device, take the name of a choice."""
    if (CONF / key).is_dir():
        return f"{key}={value}"
    return f"++{key}={quote(value)}"


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Sets sys.argv, from which Hydra reads the settings; sys.path, to which it adds the user's folder, is restored, too."""
    argv, path = sys.argv, [*sys.path]
    sys.argv = ["evals.run", *arguments]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
