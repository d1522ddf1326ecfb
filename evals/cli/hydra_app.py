"""Runs a command as a Hydra application: composes all jobs, checks them, and runs them, here or where a launcher takes them."""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from bsbr.import_path import prefer_ours
from evals.cli.cluster import RemoteJob, RemoteLaunch
from evals.cli.launchers import check_launcher, launcher_settings
from evals.cli.overrides import prepare_arguments, unknown_choice, unknown_setting
from evals.cli.registered import register_attentions
from evals.errors import OK, UsageError, one_sentence
from evals.paths import CONF


@dataclass(frozen=True)
class JobConfig:
    """The composed config of one job."""

    cfg: DictConfig
    varied: dict[str, Any]  # the keys that the command varies, each with its value in this job


@dataclass
class Session:
    """Facts that all jobs of one command share, and that no single job knows."""

    config: DictConfig | None = None  # shared by the jobs; None until Hydra has composed it
    varied: tuple[str, ...] = ()  # the keys with several values
    launcher: str = "BasicLauncher"  # class of the Hydra launcher
    jobs: list[JobConfig] = field(default_factory=list)
    is_composing: bool = False  # whether Hydra runs only to compose the configs of all jobs

    def start_multirun(self, config: DictConfig) -> None:
        """Reads which keys a multirun varies. As in Hydra's basic sweeper, the command line overrides the sweep's parameters."""
        self.config = config
        self.launcher, _ = launcher_settings(config.hydra.launcher)
        parameters = dict(config.hydra.sweeper.get("params") or {})
        overrides = [f"{key}={value}" for key, value in parameters.items()] + list(config.hydra.overrides.task)
        parsed = {override.get_key_element(): override for override in OverridesParser.create().parse_overrides(overrides)}
        several = (one for one in parsed.values() if one.is_sweep_override() and len(list(one.sweep_string_iterator())) > 1)
        self.varied = tuple(one.key_or_group for one in several)
        for key in self.varied:
            if key in NOT_VARIED or key.startswith("hydra"):
                raise UsageError(f"{key} cannot be swept: {NOT_VARIED.get(key, 'all comparisons of a command share it')}")
        check_launcher(config.hydra.launcher, config.device.kind)
        if self.is_composing:
            with read_write(config.hydra), open_dict(config.hydra):
                config.hydra.launcher = {"_target_": f"{BasicLauncher.__module__}.{BasicLauncher.__name__}"}

    def collect(self, cfg: DictConfig) -> None:
        """Adds a job. Hydra calls it with each job's config while it composes."""
        add_import_paths()
        self.jobs.append(JobConfig(cfg, varied_values(cfg, self.varied)))


NOT_VARIED = {
    **dict.fromkeys(
        ("sweep_name", "results_dir", "plots_dir", "swept", "quiet", "figures", "tracker", "launcher"),
        "all comparisons of a command share it; run the command once for each value",
    ),
    "search": "a folder holds timings or searches; run the command once for each, with a sweep_name of its own",
    "sweep": "a command makes one sweep, or sweep=all",
    "attention": "the attentions that are compared are one list, as in 'attention=[bsbr,standard]'",
}
"""Keys that a command cannot vary, and why."""


def varied_values(cfg: DictConfig, keys: Sequence[str]) -> dict[str, Any]:
    """The value of each key in the job that Hydra is running; of a config group, the name of its choice."""
    choices = HydraConfig.get().runtime.choices
    selected = {key: choices.get(key) or OmegaConf.select(cfg, key) for key in keys}
    return {key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in selected.items()}


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
        try:
            self.session.start_multirun(config)
        except UsageError as error:
            raise JobFailed(error) from error  # Hydra turns an Exception of a callback into a warning


class JobFailed(BaseException):
    """Carries an exception past Hydra, which would make a warning of it, or run all other jobs before it raises it."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class ForceQuit(KeyboardInterrupt):
    """Ctrl-C for the second time: the command ends at once, without its tables."""


class _RemoteFunction:
    """The function that Hydra passes to a launcher, which pickles it; it arrives as a `RemoteJob`."""

    def __init__(self, session: Session, remote: RemoteLaunch) -> None:
        self.session = session
        self.remote = remote

    def __call__(self, cfg: DictConfig) -> None:
        raise RuntimeError("a launcher that runs jobs elsewhere has called a job in this process")

    def __reduce__(self) -> tuple[type[RemoteJob], tuple[Any, ...]]:
        if self.session.config is None:
            raise RuntimeError("the launcher has started before Hydra has composed the config")
        job = self.remote.job(self.session.config, self.session.varied)
        return RemoteJob, (job.launch, job.varied, job.make_job)


def run(
    task: Callable[[JobConfig], None],
    finish: Callable[[DictConfig], int] | None = None,
    *,
    check: Callable[[Session], None] = lambda session: None,
    remote: RemoteLaunch | None = None,
) -> int:
    """Composes the configs of all jobs from sys.argv, checks them, and only then runs the jobs.

    Args:
        task: called with each job in turn, in this process.
        finish: called once after the jobs, also after Ctrl-C; returns the exit code.
        check: called before the first job; refuses the command by raising UsageError.
        remote: runs the jobs of launchers that leave this process; None: such launchers are refused.

    Returns:
        The exit code of `finish`.

    Raises:
        UsageError: for a mistake in the config or on the command line.
        KeyboardInterrupt: after Ctrl-C.
    """
    session = compose_jobs()
    if session.config is None:  # as with --cfg, Hydra has printed what was asked for
        return OK
    if session.launcher != "BasicLauncher" and remote is None:
        raise UsageError("only python -m evals.run can be launched elsewhere; leave out launcher=")
    check(session)
    interrupt: KeyboardInterrupt | None = None
    try:
        if session.launcher == "BasicLauncher" or remote is None:
            for job in session.jobs:
                task(job)
        else:
            remote.launch(partial(_call_hydra, _RemoteFunction(session, remote), session))
    except ForceQuit:
        raise
    except KeyboardInterrupt as raised:
        interrupt = raised
    code = OK if finish is None else finish(session.config)
    if interrupt is not None:
        raise interrupt
    return code


def compose_jobs() -> Session:
    """Composes the configs of all jobs that sys.argv asks for; writes nothing.

    Raises:
        UsageError: for a mistake in the config or on the command line.
    """
    # Hydra would otherwise print its errors itself, on several lines, and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    session = Session(is_composing=True)
    prepare_arguments()
    register_attentions()
    with tempfile.TemporaryDirectory() as scratch:  # Hydra makes these folders
        _call_hydra(session.collect, session, f"hydra.run.dir={scratch}", f"hydra.sweep.dir={scratch}")
    session.is_composing = False
    return session


def _call_hydra(function: Callable[[DictConfig], None], session: Session, *overrides: str) -> None:
    """Lets Hydra call the function for each job of sys.argv, with further overrides; its errors become UsageErrors."""
    token = _current.set(session)
    arguments = sys.argv
    sys.argv = [*arguments, *overrides]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="hydra")
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(function)()
    except JobFailed as failed:
        raise failed.error from None
    except MissingConfigException as error:
        raise UsageError(unknown_choice(error)) from error
    except ConfigCompositionException as error:
        raise UsageError(unknown_setting(error)) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UsageError(one_sentence(error)) from error
    finally:
        sys.argv = arguments
        _current.reset(token)


def add_import_paths() -> None:
    """Makes modules importable from the folders of --config-dir and from their parents."""
    for source in HydraConfig.get().runtime.config_sources:
        if source.provider == "command-line":
            config_dir = Path(source.path).resolve()
            sys.path[:0] = [str(folder) for folder in (config_dir, config_dir.parent) if str(folder) not in sys.path]
    prefer_ours()  # a user's project may have a package `baselines`
