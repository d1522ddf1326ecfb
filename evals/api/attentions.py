"""Reads the attentions that `evals.compare` is given: names, classes, and either with options or under another name."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bsbr.interface import Attention
from evals.api.source import home_module, module_source
from evals.benchmark.code_hash import without_prose
from evals.cli.overrides import quote
from evals.cli.registered import registered_attentions
from evals.errors import UsageError, did_you_mean
from evals.paths import CONF
from evals.results.ids import digest

RENAMED = "such as ('bsbr_64', 'bsbr', {'chunk_size': 64})"
FORMS = (
    "an attention is given as its name, such as 'bsbr', as its class, or as a tuple of an optional new name, one of these, and an "
    f"optional dictionary of its options, {RENAMED}"
)


@dataclass(frozen=True)
class Choice:
    """One attention of a comparison."""

    name: str
    attention: str | type[Attention]  # a name of conf/attention, or a class
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_configured(self) -> bool:
        """Whether it is one of conf/attention under its own name."""
        return self.attention == self.name


def read_choices(attentions: Sequence[Any]) -> list[Choice]:
    """Reads the argument `attentions` of `evals.compare`.

    Raises:
        UsageError: if there is none, if one has none of the `FORMS`, or if a name is taken or cannot be the name of a file.
    """
    if isinstance(attentions, str | type) or not isinstance(attentions, Sequence) or not attentions:
        raise UsageError(f"attentions must be a list of at least one, got {attentions!r}; {FORMS}")
    choices = list(map(_read_choice, attentions))
    names, known = [choice.name for choice in choices], _configured()
    for choice in choices:
        if not re.fullmatch(r"[\w-]+", choice.name):
            raise UsageError(f"the name of an attention must consist of letters, digits, _ and -, got {choice.name!r}")
        if names.count(choice.name) > 1:
            raise UsageError(f"two attentions are called {choice.name}: give one another name, {RENAMED}")
        if not choice.is_configured and choice.name in known:
            raise UsageError(
                f"there is an attention {choice.name} in {known[choice.name].parent}: give yours another name, {RENAMED}"
            )
    return choices


def _read_choice(given: Any) -> Choice:
    words = list(given) if isinstance(given, tuple) else [given]
    options = words.pop() if words and isinstance(words[-1], Mapping) else {}
    attention = words.pop() if words else None
    name = words.pop() if words else attention.__name__ if isinstance(attention, type) else attention
    if words or not isinstance(name, str) or not isinstance(attention, str | type):
        raise UsageError(f"{FORMS}; got {given!r}")
    if isinstance(attention, type) and not issubclass(attention, Attention):
        raise UsageError(f"{attention.__qualname__} is no subclass of bsbr.Attention, and cannot be compared")
    return Choice(name, attention, dict(options))


def overrides(choices: Sequence[Choice]) -> Iterator[str]:
    """The settings of the command line that select the attentions, with the options of those in conf/attention."""
    yield f"attention=[{','.join(choice.name for choice in choices)}]"
    for choice in choices:
        if choice.is_configured:
            yield from (f"++attention.{choice.name}.{key}={quote(value)}" for key, value in choice.options.items())


def write_configs(choices: Sequence[Choice], folder: Path) -> None:
    """Writes a YAML for each attention that has none in conf/attention, and a module for each class that no process can import.

    Args:
        choices: all attentions.
        folder: where to write; it is laid out as --config-dir expects it.

    Raises:
        UsageError: if an attention is not known, or the source of a class cannot be written.
    """
    for choice in choices:
        if choice.is_configured:
            continue
        if isinstance(choice.attention, str):
            node = _node(choice.attention)
        else:
            module = home_module(choice.attention, choice.attention.__name__) or write_module(choice.attention, folder)
            node = {"_target_": f"{module}.{choice.attention.__name__}"}
        path = folder / "attention" / f"{choice.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({choice.name: {**node, **choice.options}}, sort_keys=False), encoding="utf-8")


def _configured() -> dict[str, Path]:
    """The YAML files of the attentions of conf/attention, and of those that other distributions register."""
    return {path.stem: path for path in (CONF / "attention").glob("*.yaml")} | registered_attentions()


def _node(name: str) -> dict[str, Any]:
    """`_target_` and options of a configured attention."""
    known = _configured()
    if name not in known:
        raise UsageError(f"unknown attention '{name}'{did_you_mean(name, known)}; known are {', '.join(sorted(known))}")
    node: dict[str, Any] = yaml.safe_load(known[name].read_text(encoding="utf-8"))[name]
    return node


def write_module(cls: type[Attention], folder: Path) -> str:
    """Writes a module with a class that no process can import; returns its name, which changes with the code, not with comments."""
    source = module_source(cls)
    name = f"{cls.__name__}_{digest(without_prose(source))[:8]}"
    path = folder / f"{name}.py"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return name
