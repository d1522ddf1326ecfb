"""What `python -m evals.run --help` says: which sweeps and settings there are is read from conf/, comments included.

Imports little, so that help and the completion of a shell are there at once.
"""

import argparse
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from evals.errors import EXIT_CODES
from evals.paths import CONF
from evals.results.formatting import WIDTH

OPTIONS = {
    "--dry-run": "tells what would be done, and about how long it takes",
    "-m, --multirun": "every combination of settings given as lists, as in -m shape.batch_size=1,2,4",
    "--config-dir DIR": "a folder with attentions, sweeps, … of your own, laid out as conf/ is",
    "--cfg job": "prints all settings as they would be, and measures nothing",
    "-sc install=bash": 'prints what completes settings: eval "$(python -m evals.run -sc install=bash)"',
    "-h, --help": "this; --hydra-help tells of Hydra's own options",
}
EXAMPLES = {
    "python -m evals.run sweep=seq_len sampling=quick": "a first look, in a minute or two: all attentions, at seven lengths",
    "python -m evals.run sweep=seq_len 'attention=[bsbr,standard]' attention.bsbr.chunk_size=64 sweep_name=chunk_64": (
        "two of them, one with an option of its own, into a folder of its own"
    ),
    "python -m evals.run -m shape.batch_size=1,2,4 device.threads=1 sweep_name=batch": "a sweep over any setting",
}


def known(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`help`, `shell_completion` and `config_dir` of a command's arguments, and the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=Path)
    return parser.parse_known_args(arguments)


def text(about: str, own: Path | None = None) -> str:
    """about: the command's docstring. own: a config folder of the user's, which adds to conf/."""
    folders = [CONF, *([] if own is None else [own])]
    sweeps = {name: first_sentence(path) for name, path in files(folders, "sweep").items()}
    blocks = [
        "usage: python -m evals.run [option …] [setting=value …]",
        *paragraphs(about),
        listed("Sweeps, as in sweep=seq_len", sweeps),
        listed(
            "Choices, as in device=cuda", {f"{group}=": f"{told}: {', '.join(names)}" for group, told, names in groups(folders)}
        ),
        listed("Settings, with what they are unless you say otherwise", dict(settings())),
        listed("Options", OPTIONS),
        listed("Exit code", {str(code): meaning for code, meaning in EXIT_CODES.items()}),
        "Examples\n" + "\n".join(f"  {wrapped(command, 4)}\n      {what}" for command, what in EXAMPLES.items()),
    ]
    return "\n\n".join(blocks)


def text_of_certify(about: str, checks: dict[str, str], own: Path | None = None) -> str:
    """Help of `python -m evals.certify`. checks: descriptions of the certificate's checks by name; the others as in `text`."""
    folders = [CONF, *([] if own is None else [own])]
    named = {name: OPTIONS[name] for name in ("--config-dir DIR", "-h, --help")}
    blocks = [
        "usage: python -m evals.certify [option …] ['attention=[…]'] [setting=value …]",
        *paragraphs(about),
        listed("Checks", checks),
        listed("Attentions", {"attention=": ", ".join(files(folders, "attention"))}),
        listed("Options", named),
        "Settings are those of python -m evals.run --help.",
    ]
    return "\n\n".join(blocks)


def paragraphs(docstring: str) -> list[str]:
    """Of a command's docstring, without its own name."""
    told = re.sub(r"^`.*?`: ", "", docstring)
    told = told[0].upper() + told[1:]
    return ["\n".join(textwrap.wrap(part, WIDTH, break_on_hyphens=False)) for part in told.split("\n\n")]


def listed(title: str, entries: dict[str, str]) -> str:
    """A title, and under it every name with what it means."""
    column = min(max(map(len, entries), default=0), 26)
    lines = []
    for name, meaning in entries.items():
        head, indent = f"  {name:<{column}}  ", " " * (column + 4)
        if len(name) > column and meaning:
            lines.append(head.rstrip())
            head = indent
        told = textwrap.wrap(meaning, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
        lines += [head + told[0], *(indent + line for line in told[1:])] if told else [head.rstrip()]
    return "\n".join([title, *lines])


def wrapped(command: str, indent: int) -> str:
    """A command in lines of at most 80 columns, as a shell takes them."""
    lines = textwrap.wrap(command, WIDTH - indent - 4, break_long_words=False, break_on_hyphens=False)
    return (" \\\n" + " " * (indent + 2)).join(lines)


# --- what stands in conf/ ---------------------------------------------------------------------------


def files(folders: Sequence[Path], group: str) -> dict[str, Path]:
    """Of a config group, by name."""
    return {path.stem: path for path in sorted(path for folder in folders for path in (folder / group).glob("*.yaml"))}


def first_sentence(path: Path) -> str:
    """Of the comment at the head of a config."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# "))
    return re.split(r"(?<=[.…])\s+(?=[A-Z])", " ".join(lines))[0]


def groups(folders: Sequence[Path]) -> Iterator[tuple[str, str, list[str]]]:
    """Every group but the sweeps, with the comment behind its choice in config.yaml, and what there is to choose from."""
    comments = dict(re.findall(r"^  - (\w+): .*?# (.*)$", (CONF / "config.yaml").read_text(encoding="utf-8"), flags=re.MULTILINE))
    there = {folder.name: None for place in folders for folder in sorted(place.iterdir()) if any(folder.glob("*.yaml"))}
    for group in dict.fromkeys([*comments, *there]):
        if group != "sweep":
            yield group, comments.get(group, "more"), list(files(folders, group))


def settings() -> Iterator[tuple[str, str]]:
    """Every setting of config.yaml and of what it chooses, as group.key=value, with its comment."""
    config = (CONF / "config.yaml").read_text(encoding="utf-8")
    for group, choice in re.findall(r"^  - (\w+): (\w+)", config, flags=re.MULTILINE):
        path = CONF / group / f"{choice}.yaml"
        if path.exists() and "_target_" not in (content := path.read_text(encoding="utf-8")):
            yield from _scalars(content, f"{group}.")
    yield from _scalars(config, "")


def _scalars(content: str, prefix: str) -> Iterator[tuple[str, str]]:
    for key, value, comment in re.findall(r"^(\w+): ([^#\n]*?) *(?:# *(.*))?$", content, flags=re.MULTILINE):
        yield f"{prefix}{key}={value}", comment
