"""What every Hydra command here shares: the config folder, the import path of a user's own variants, and plain errors."""

import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from evals.cli.cluster import Elsewhere, check_launcher
from evals.cli.help_text import OPTIONS
from evals.errors import INTERRUPTED, UsageError, did_you_mean, one_sentence
from evals.paths import CONF

KEPT = "interrupted; what was measured is kept, and the same command goes on from there"


class Session(Callback):
    """What Hydra's jobs cannot know of each other: how many there are, in which setting they differ, and their common config."""

    jobs: int = 1
    swept: str | None = None
    config: DictConfig | None = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        Session.config = config

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        Session.config = config
        # As Hydra's basic sweeper does: the sweep's own parameters, over which the command line wins.
        swept = dict(config.hydra.sweeper.get("params") or {})
        given = [f"{key}={value}" for key, value in swept.items()] + list(config.hydra.overrides.task)
        counts = {
            override.get_key_element(): len(list(override.sweep_string_iterator())) if override.is_sweep_override() else 1
            for override in OverridesParser.create().parse_overrides(given)
        }
        Session.jobs = math.prod(counts.values())
        Session.swept = next((str(key) for key, count in counts.items() if count > 1), None)
        try:
            check_launcher(config.hydra.launcher, config.device.kind)
        except UsageError as error:
            raise Stop(error) from error  # of an Exception that a callback raises, Hydra makes a warning


class Abandoned(BaseException):
    """The user wants to wait for nothing more."""


class Stop(BaseException):
    """Carries a job's error past Hydra, which would go on with the other jobs before it raises an Exception."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class Job:
    """What Hydra calls for each job; and what a launcher pickles to have it called elsewhere, which is `elsewhere.placed`."""

    def __init__(self, task: Callable[[DictConfig], None], elsewhere: Elsewhere | None) -> None:
        self.task = task
        self.elsewhere = elsewhere

    def __call__(self, cfg: DictConfig) -> None:
        add_import_paths()
        try:
            self.task(cfg)
        except Exception as error:  # Hydra keeps it until the last job is done
            raise Stop(error) from error

    def __reduce__(self) -> tuple[Any, ...]:
        if self.elsewhere is None or Session.config is None:
            raise UsageError("only python -m evals.run can be launched elsewhere; leave out launcher=")
        placed = self.elsewhere.placed(Session.config, Session.swept)
        return type(placed), (placed.launch, placed.swept, placed.prepare)


def run(
    task: Callable[[DictConfig], None],
    report: Callable[[DictConfig], int] | None = None,
    *,
    elsewhere: Elsewhere | None = None,
) -> int:
    """Runs `task` once a job under Hydra, then `report` once; returns the exit code.

    elsewhere: what a launcher that does not run jobs in this process runs instead of `task`.
    Whatever a user can get wrong is one sentence on standard error and exit code 2.
    """
    # Hydra would otherwise print its errors itself, in several lines, and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    Session.jobs, Session.swept, Session.config = 1, None, None

    interrupted = False
    try:
        _arrange_arguments()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="hydra")
            try:
                command = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(Job(task, elsewhere))
                if elsewhere is None:
                    command()
                else:
                    elsewhere.launch(command)
            except Stop as stop:
                raise stop.error from None
            except KeyboardInterrupt:
                interrupted = True
        code = report(Session.config) if report is not None and Session.config is not None else 0
        if not interrupted:
            return code
        print(KEPT, file=sys.stderr)
        return INTERRUPTED
    except (Abandoned, KeyboardInterrupt):
        print(KEPT, file=sys.stderr)
        return INTERRUPTED
    except MissingConfigException as error:
        print(f"error: {missing(error)}", file=sys.stderr)
    except ConfigCompositionException as error:
        print(f"error: {no_such_setting(error)}", file=sys.stderr)
    except (UsageError, HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr)
    except BrokenPipeError:  # whoever read what we print, as head does, wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"error: {error.filename or 'a file'} cannot be used: {error.strerror or error}", file=sys.stderr)
    return 2


def _arrange_arguments() -> None:
    """Puts the command's arguments as Hydra takes them. Raises UsageError for what neither knows."""
    # Hydra's parser wants all overrides in one piece; people write options between them.
    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args()
    overrides = arguments.overrides
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in overrides] + overrides
    # A sweep says so itself, but Hydra takes a config with a mistake in it for one that does not, and reports that.
    asked = arguments.run or arguments.multirun or arguments.cfg or arguments.info or arguments.shell_completion
    sweeps = any(word.startswith(("sweep=", "launcher=")) for word in overrides)
    if not asked and sweeps:
        sys.argv.append("--multirun")
    check_words(overrides, multirun=arguments.multirun or sweeps)


def add_import_paths() -> None:
    """Of the config folders that the command line names, in a job."""
    for source in HydraConfig.get().runtime.config_sources:
        if source.provider == "command-line":
            add_import_path(Path(source.path))


def add_import_path(config_dir: Path) -> None:
    """Lets a user's YAML name a module that stands in its config folder, or beside it."""
    for folder in (config_dir.resolve().parent, config_dir.resolve()):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def no_such_setting(error: ConfigCompositionException) -> str:
    """A key that is not in the config, with one that is like it. Of anything else that is wrong with an override, Hydra's words."""
    cause = error.__cause__
    if not isinstance(cause, ConfigAttributeError | ConfigKeyError) or not isinstance(cause.parent_node, DictConfig):
        return one_sentence(error)
    key, name, near = str(cause.full_key), str(cause.key), cause.parent_node
    group = key.rpartition(".")[0]
    there = {str(one): node for one, node in near.items_ex(resolve=False)}
    like = did_you_mean(key, [f"{group}.{one}".lstrip(".") for one in there])
    if not like:
        groups = (one for one, node in there.items() if isinstance(node, DictConfig) and name in node)
        like = next((f" (did you mean {one}.{name}?)" for one in groups), "")
    if group == "attention":
        return f"Could not override '{key}': {name} is not among those selected by attention=[{','.join(there)}]"
    if group.startswith("attention."):
        return f"Could not override '{key}', which its YAML does not name{like}; +{key}= adds an option of its class"
    return f"Could not override '{key}': there is no such setting{like}; --help lists them"


def refuse(message: str) -> NoReturn:
    """In place of argparse's page of usage."""
    if message.startswith("unrecognized arguments: "):  # the first of them, and all that stands behind it
        word = message.split()[2]
        known = [option for names in OPTIONS for option in re.findall(r"--?[\w-]+", names)]
        message = f"unknown option {word}{did_you_mean(word, known)}"
    raise UsageError(f"{message}; settings are given as key=value, and --help lists the options")


def check_words(overrides: Sequence[str], *, multirun: bool) -> None:
    """Raises UsageError for what is no setting, and for lists that do not say what they mean."""
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            raise UsageError(f"'{word}' is no setting: settings are given as key=value, such as sweep=seq_len")
        if re.fullmatch(r"[\w.-]+(,[\w.-]+)+", value):
            if key == "attention":
                raise UsageError(f"{word} would have each of them alone: to compare them, say 'attention=[{value}]'")
            if not multirun:
                raise UsageError(f"{word} is several values: with -m they are a sweep, and '{key}=[{value}]' is a list")


def missing(error: MissingConfigException) -> str:
    """An unknown choice in a config group, with the known ones."""
    if error.missing_cfg_file is None:
        return one_sentence(error)
    group, _, name = error.missing_cfg_file.rpartition("/")
    # Hydra names the known ones only where a group takes a single choice, but always the folders that it looked into.
    folders = [Path(path) for path in re.findall(r"path=file://(\S+)", str(error))]
    known = set(error.options or ()) | {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
    if not known:
        return one_sentence(error)
    return (
        f"unknown {group} '{name}'{did_you_mean(name, known)}; known are {', '.join(sorted(known))}; "
        "--config-dir names a folder with more"
    )
