"""Checks of the command line before Hydra sees it, and one-sentence messages for the errors that Hydra raises about it."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from evals.cli.help_text import OPTIONS
from evals.cli.registered import registered_attentions
from evals.errors import UsageError, did_you_mean, one_sentence


def prepare_arguments() -> None:
    """Rearranges sys.argv into the form that Hydra accepts.

    Raises:
        UsageError: for an unknown option, or for an override that `check_overrides` refuses.
    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args()
    overrides = arguments.overrides
    # Hydra's parser wants all overrides in one piece; people write options between them.
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in overrides] + overrides
    # A sweep's YAML asks for a multirun itself, but Hydra reports a mistake in a multirun config as one of a single run.
    has_mode = arguments.run or arguments.multirun or arguments.cfg or arguments.info or arguments.shell_completion
    is_sweep = any(word.startswith(("sweep=", "launcher=")) for word in overrides)
    if is_sweep and not has_mode:
        sys.argv.insert(1, "--multirun")
    check_overrides(overrides, multirun=arguments.multirun or is_sweep)
    sys.argv[1:] = map(quote_text, sys.argv[1:])


TEXTS = ("sweep_name", "results_dir", "plots_dir", "relative_to")
"""Settings whose value is text, whatever it looks like."""


def quote_text(word: str) -> str:
    """Quotes the value of a setting that is text: Hydra would read sweep_name=2024_05_01 as 20240501, and a,b as two values."""
    key, equals, value = word.partition("=")
    if key not in TEXTS or not equals or value[:1] in ("'", '"', "") or (key == "relative_to" and "," in value):
        return word
    return f"{key}={quote(value)}"


def quote(value: Any) -> str:
    """Writes a value in Hydra's grammar, which reads it as the same value again: text, numbers, None, lists and dictionaries."""
    if isinstance(value, str):
        return "'" + re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), value) + "'"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{quote(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(quote, value))}]"
    return str(value)


def _refuse(message: str) -> NoReturn:
    """Raises UsageError with one sentence instead of argparse's usage message."""
    if message.startswith("unrecognized arguments: "):  # lists the first unknown option and all words after it
        word = message.split()[2]
        known = [option for names in OPTIONS for option in re.findall(r"--?[\w-]+", names)]
        message = f"unknown option {word}{did_you_mean(word, known)}"
    raise UsageError(f"{message}; settings are given as key=value, and --help lists the options")


def check_overrides(overrides: Sequence[str], *, multirun: bool) -> None:
    """Raises UsageError for a word that is not an override, and for a list of values that Hydra would read as something else."""
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            raise UsageError(f"'{word}' is no setting: settings are given as key=value, such as sweep=seq_len")
        if re.fullmatch(r"[\w.-]+(,[\w.-]+)+", value) and (key not in TEXTS or key == "relative_to"):
            if key == "attention":
                raise UsageError(f"{word} would have each of them alone: to compare them, say 'attention=[{value}]'")
            if not multirun:
                raise UsageError(f"{word} is several values: with -m they are a sweep, and '{key}=[{value}]' is a list")


def unknown_setting(error: ConfigCompositionException) -> str:
    """The message for an override of a key that is not in the config, with a similar key; Hydra's message for other errors."""
    cause = error.__cause__
    if not isinstance(cause, ConfigAttributeError | ConfigKeyError) or not isinstance(cause.parent_node, DictConfig):
        return one_sentence(error if str(error) or cause is None else cause)
    key, name = str(cause.full_key), str(cause.key)
    group = key.rpartition(".")[0]
    siblings = {str(sibling): node for sibling, node in cause.parent_node.items_ex(resolve=False)}
    hint = did_you_mean(key, [f"{group}.{sibling}".lstrip(".") for sibling in siblings])
    if not hint:
        groups = (sibling for sibling, node in siblings.items() if isinstance(node, DictConfig) and name in node)
        hint = next((f" (did you mean {sibling}.{name}?)" for sibling in groups), "")
    if group == "attention":
        return f"Could not override '{key}': {name} is not among those selected by attention=[{','.join(siblings)}]"
    if group.startswith("attention."):
        return f"Could not override '{key}', which its YAML does not name{hint}; +{key}= adds an option of its class"
    return f"Could not override '{key}': there is no such setting{hint}; --help lists them"


def unknown_choice(error: MissingConfigException) -> str:
    """The message for an unknown choice of a config group, with the known choices."""
    if error.missing_cfg_file is None:
        return one_sentence(error)
    group, _, name = error.missing_cfg_file.rpartition("/")
    # Hydra lists the choices only for groups that take a single one, but names all the folders it looked into.
    folders = [Path(path) for path in re.findall(r"path=file://(\S+)", str(error))]
    known = set(error.options or ()) | {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
    known |= registered_attentions().keys() if group == "attention" else set()
    if not known:
        return one_sentence(error)
    return (
        f"unknown {group} '{name}'{did_you_mean(name, known)}; known are {', '.join(sorted(known))}; "
        "--config-dir names a folder with more"
    )
