"""The text of `--help` for evals.run and evals.certify, with sweeps, choices and settings read from conf/ and its comments.

Imports little, so that help and shell completion answer at once.
"""

import argparse
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from evals.cli.registered import registered_attentions
from evals.errors import EXIT_CODES, UsageError
from evals.measure.gpu_status import marked
from evals.paths import CONF

WIDTH = 80
OPTIONS = {
    "--dry-run": "prints what would be measured, and about how long that takes",
    "-m, --multirun": "runs every combination of the values given, as in -m shape.batch_size=1,2,4",
    "--config-dir DIR": "adds a folder of your own attentions, sweeps, …, with the layout of conf/",
    "--cfg job": "prints all settings, and measures nothing",
    "-sc install=bash": 'prints completion for bash: eval "$(bsbr run -sc install=bash)"',
    "-h, --help": "prints this; --hydra-help prints Hydra's own options",
}
EXAMPLES = {
    "python -m evals.run sweep=seq_len sampling=quick": "a first look at all attentions, in a minute",
    "python -m evals.run sweep=seq_len 'attention=[bsbr,standard]' attention.bsbr.chunk_size=64 sweep_name=chunk_64": (
        "two attentions, one with an option changed, in a folder of their own"
    ),
    "python -m evals.run -m shape.batch_size=1,2,4 device.threads=1 sweep_name=batch": "a sweep over any setting",
}


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads the options that are answered without Hydra.

    Returns:
        `help`, `shell_completion` and `config_dir`, and all other arguments.

    Raises:
        UsageError: if help is asked for a config folder that does not exist.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=Path)
    options, others = parser.parse_known_args(arguments)
    if options.help and options.config_dir and not options.config_dir.is_dir():
        raise UsageError(f"--config-dir must name a folder, such as mine/conf, got {options.config_dir}")
    return options, others


def run_help(about: str, config_dir: Path | None = None) -> str:
    """Help of `python -m evals.run`, from its docstring, conf/ and the user's config folder."""
    folders = _config_folders(config_dir)
    sweeps = {name: _first_sentence(path) for name, path in _files(folders, "sweep").items()}
    choices = {f"{group}=": f"{comment}: {', '.join(names)}" for group, comment, names in _groups(folders)}
    blocks = [
        "usage: python -m evals.run [option …] [setting=value …]",
        *_paragraphs(about),
        columns("Sweeps, as in sweep=seq_len, and what each varies", sweeps),
        columns("Choices, as in device=cuda", choices),
        columns("Settings and their defaults", dict(_settings())),
        columns("Options", OPTIONS),
        columns("Exit code", {str(code): meaning for code, meaning in EXIT_CODES.items()}),
        "Examples\n" + "\n".join(f"  {_wrap_command(command)}\n      {what}" for command, what in EXAMPLES.items()),
    ]
    return "\n\n".join(blocks)


def certify_help(about: str, checks: dict[str, str], config_dir: Path | None = None) -> str:
    """Help of `python -m evals.certify`, from its docstring and the descriptions of the checks by name."""
    blocks = [
        "usage: python -m evals.certify [option …] ['attention=[…]'] [setting=value …]",
        *_paragraphs(about),
        columns("Checks", checks),
        columns("Attentions", {"attention=": ", ".join(attentions(config_dir))}),
        columns("Options", {name: OPTIONS[name] for name in ("--config-dir DIR", "-h, --help")}),
        "Settings are those of python -m evals.run --help.",
    ]
    return "\n\n".join(blocks)


def attentions(config_dir: Path | None = None) -> list[str]:
    """Names of all attentions: of conf/, of the user's config folder, and of other installed distributions."""
    return sorted(_files(_config_folders(config_dir), "attention"))


def _paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a command's docstring, without the name of the command."""
    text = re.sub(r"^`.*?`: ", "", docstring)
    text = text[0].upper() + text[1:]
    return [textwrap.fill(paragraph, WIDTH, break_on_hyphens=False) for paragraph in text.split("\n\n")]


def columns(title: str, entries: dict[str, str]) -> str:
    """A title above a two-column list of names and their meanings."""
    column = min(max(map(len, entries), default=0), 26)
    lines = []
    for name, meaning in entries.items():
        head, indent = f"  {name:<{column}}  ", " " * (column + 4)
        if len(name) > column and meaning:
            lines.append(head.rstrip())
            head = indent
        wrapped = textwrap.wrap(meaning, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
        lines += [head + wrapped[0], *(indent + line for line in wrapped[1:])] if wrapped else [head.rstrip()]
    return "\n".join([title, *lines])


def _wrap_command(command: str) -> str:
    """A command in indented lines of at most 80 columns that a shell accepts."""
    return " \\\n      ".join(textwrap.wrap(command, WIDTH - 8, break_long_words=False, break_on_hyphens=False))


# --- the contents of conf/ ---------------------------------------------------------------------------


def _config_folders(config_dir: Path | None) -> list[Path]:
    return [CONF] if config_dir is None else [CONF, config_dir]


def _files(folders: Sequence[Path], group: str) -> dict[str, Path]:
    """The choices of a config group, by name."""
    files = {path.stem: path for path in sorted(path for folder in folders for path in (folder / group).glob("*.yaml"))}
    return {**files, **registered_attentions()} if group == "attention" else files


def _first_sentence(path: Path) -> str:
    """The first sentence of the comment at the head of a config."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# "))
    return re.split(r"(?<=[.…])\s+(?=[A-Z])", " ".join(lines))[0]


def _groups(folders: Sequence[Path]) -> Iterator[tuple[str, str, list[str]]]:
    """Every config group but the sweeps: its name, its comment in config.yaml, and its choices."""
    comments = dict(re.findall(r"^  - (\w+): .*?# (.*)$", (CONF / "config.yaml").read_text(encoding="utf-8"), flags=re.MULTILINE))
    groups = {path.name: None for folder in folders for path in sorted(folder.iterdir()) if any(path.glob("*.yaml"))}
    for group in dict.fromkeys([*comments, *groups]):
        if group != "sweep":
            names = [marked(name, name) if group == "device" else name for name in _files(folders, group)]
            yield group, comments.get(group, "more"), names


def _settings() -> Iterator[tuple[str, str]]:
    """Every setting of config.yaml and of the choices it makes, as group.key=value, with its comment."""
    config = (CONF / "config.yaml").read_text(encoding="utf-8")
    for group, choice in re.findall(r"^  - (\w+): (\w+)", config, flags=re.MULTILINE):
        path = CONF / group / f"{choice}.yaml"
        if path.exists() and "_target_" not in (content := path.read_text(encoding="utf-8")):
            yield from _scalars(content, f"{group}.")
    yield from _scalars(config, "")


def _scalars(content: str, prefix: str) -> Iterator[tuple[str, str]]:
    for key, value, comment in re.findall(r"^(\w+): ([^#\n]*?) *(?:# *(.*))?$", content, flags=re.MULTILINE):
        yield f"{prefix}{key}={value}", comment
