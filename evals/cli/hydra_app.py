"""Runs a command as a Hydra application: one call of a function per job, and UsageError for a config that cannot be composed."""

import math
import os
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from evals.cli.cluster import RemoteJob, RemoteLaunch
from evals.cli.launchers import check_launcher
from evals.cli.overrides import prepare_arguments, unknown_choice, unknown_setting
from evals.errors import OK, UsageError, one_sentence
from evals.paths import CONF


@dataclass
class Session:
    """Facts that all jobs of one command share, and that no single job knows."""

    jobs: int = 1  # number of jobs
    swept: str | None = None  # the first setting with several values; None if there is only one job
    config: DictConfig | None = None  # shared by the jobs; None until Hydra has composed it

    def start_multirun(self, config: DictConfig) -> None:
        """Counts the jobs of a multirun. As in Hydra's basic sweeper, the command line overrides the sweep's parameters."""
        self.config = config
        parameters = dict(config.hydra.sweeper.get("params") or {})
        overrides = [f"{key}={value}" for key, value in parameters.items()] + list(config.hydra.overrides.task)
        counts = {
            override.get_key_element(): len(list(override.sweep_string_iterator())) if override.is_sweep_override() else 1
            for override in OverridesParser.create().parse_overrides(overrides)
        }
        self.jobs = math.prod(counts.values())
        self.swept = next((str(key) for key, count in counts.items() if count > 1), None)


_current: ContextVar[Session] = ContextVar("session")
"""The session of the command that runs: Hydra constructs `SessionCallback` itself, and passes it no arguments of ours."""


class SessionCallback(Callback):
    """Fills the session of this command; conf/config.yaml names it among Hydra's callbacks."""

    def __init__(self) -> None:
        self.session = _current.get()

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        """Pickles as a callback that does nothing: launchers send the callbacks to other machines, along with each job."""
        return Callback, ()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        self.session.config = config

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.session.start_multirun(config)
        try:
            check_launcher(config.hydra.launcher, config.device.kind)
        except UsageError as error:
            raise JobFailed(error) from error  # Hydra turns an Exception of a callback into a warning


class JobFailed(BaseException):
    """Carries the exception of a job past Hydra, which would run all other jobs before it raises an Exception."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class ForceQuit(KeyboardInterrupt):
    """Ctrl-C for the second time: the command ends at once, without its tables."""


class _JobFunction:
    """The function that Hydra calls for each job. Pickled by a launcher that runs jobs elsewhere, it becomes a `RemoteJob`."""

    def __init__(self, task: Callable[[DictConfig], None], session: Session, remote: RemoteLaunch | None) -> None:
        self.task = task
        self.session = session
        self.remote = remote

    def __call__(self, cfg: DictConfig) -> None:
        add_import_paths()
        try:
            self.task(cfg)
        except Exception as error:
            raise JobFailed(error) from error

    def __reduce__(self) -> tuple[type[RemoteJob], tuple[Any, ...]]:
        if self.remote is None or self.session.config is None:
            raise UsageError("only python -m evals.run can be launched elsewhere; leave out launcher=")
        job = self.remote.job(self.session.config, self.session.swept)
        return RemoteJob, (job.launch, job.swept, job.make_job)


def run(
    task: Callable[[DictConfig], None],
    finish: Callable[[DictConfig], int] | None = None,
    *,
    session: Session | None = None,
    remote: RemoteLaunch | None = None,
) -> int:
    """Composes the config from sys.argv, and runs the jobs.

    Args:
        task: called with the config of each job.
        finish: called once after the jobs, also after Ctrl-C; returns the exit code.
        session: is filled with the facts that the jobs share.
        remote: runs the jobs of launchers that leave this process; None: such launchers are refused.

    Returns:
        The exit code of `finish`.

    Raises:
        UsageError: for a mistake in the config or on the command line.
        KeyboardInterrupt: after Ctrl-C.
    """
    # Hydra would otherwise print its errors itself, on several lines, and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    session = session or Session()
    try:
        prepare_arguments()
        interrupt = _run_jobs(_JobFunction(task, session, remote), session, remote)
    except MissingConfigException as error:
        raise UsageError(unknown_choice(error)) from error
    except ConfigCompositionException as error:
        raise UsageError(unknown_setting(error)) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UsageError(one_sentence(error)) from error
    code = OK if finish is None or session.config is None else finish(session.config)
    if interrupt is not None:
        raise interrupt
    return code


def _run_jobs(function: _JobFunction, session: Session, remote: RemoteLaunch | None) -> KeyboardInterrupt | None:
    """Runs all jobs; returns the KeyboardInterrupt of a first Ctrl-C, or None."""
    token = _current.set(session)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="hydra")
            command = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(function)
            if remote is None:
                command()
            else:
                remote.launch(command)
    except JobFailed as failed:
        raise failed.error from None
    except ForceQuit:
        raise
    except KeyboardInterrupt as interrupt:
        return interrupt
    finally:
        _current.reset(token)
    return None


def add_import_paths() -> None:
    """Makes modules importable from the folders of --config-dir and from their parents."""
    for source in HydraConfig.get().runtime.config_sources:
        if source.provider == "command-line":
            config_dir = Path(source.path).resolve()
            sys.path[:0] = [str(folder) for folder in (config_dir, config_dir.parent) if str(folder) not in sys.path]
