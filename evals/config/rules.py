"""Rules that the values of settings obey, as annotations of the fields of the settings' dataclasses."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from evals.errors import UsageError


@dataclass(frozen=True)
class Rule:
    """A rule that a setting's value obeys."""

    expected: str  # completes "must be …"
    holds: Callable[[Any], bool]

    def check(self, key: str, value: Any) -> None:
        """Raises UsageError if the value breaks the rule."""
        if not self.holds(value):
            raise UsageError(f"{key} must be {self.expected}, got {value!r}")


def is_number(value: Any, kind: Any = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def at_least(least: float) -> Rule:
    return Rule(f"a number of at least {least:g}", lambda value: is_number(value) and value >= least)


def one_of(known: Collection[str]) -> Rule:
    return Rule(f"one of {', '.join(known)}", lambda value: isinstance(value, str) and value in known)


def list_of(kind: Any, kind_name: str) -> Rule:
    return Rule(
        f"a list of {kind_name} above 0",
        lambda values: bool(values) and all(is_number(value, kind) and value > 0 for value in values),
    )


def mapping_with_target(example: str) -> Rule:
    return Rule(
        f"a mapping with a _target_, such as {example}",
        lambda value: isinstance(value, dict) and isinstance(value.get("_target_"), str),
    )


QUOTE = "; YAML reads a bare 2024_05_01, 1e5 or no as a number or a boolean, and 'no' in quotes as text"
TEXT = Rule(f"text{QUOTE}", lambda value: isinstance(value, str) and value != "")
NAME = Rule(
    f"text on one line, of at most 200 bytes and without spaces around it{QUOTE}",
    lambda value: TEXT.holds(value) and value.isprintable() and value == value.strip() and len(value.encode()) <= 200,
)
FOLDER_NAME = Rule(
    f"the name of a folder in results_dir, such as mine or mine/first: {NAME.expected}",
    lambda value: NAME.holds(value) and not {"", ".", ".."} & set(value.split("/")),
)
SIZE = Rule("a positive integer", lambda value: is_number(value, int) and value >= 1)
Size = Annotated[int, SIZE]
Positive = Annotated[float, Rule("a number above 0", lambda value: is_number(value) and value > 0)]


def check_fields(settings: type, group: str, values: Any) -> None:
    """Checks the values of a config group against the rules that annotate the fields of its dataclass.

    Raises:
        UsageError: if a key is unknown or missing, or if a value breaks its rule.
    """
    hints = get_type_hints(settings, include_extras=True)
    check_keys(f"{group}.", values, hints)
    for key, hint in hints.items():
        (rule,) = next(part for part in (hint, *get_args(hint)) if hasattr(part, "__metadata__")).__metadata__
        if values[key] is not None or type(None) not in get_args(hint):
            rule.check(f"{group}.{key}", values[key])


def check_keys(prefix: str, values: Any, expected: Mapping[str, Any]) -> None:
    """Raises UsageError unless `values` is a mapping with the expected keys and no others."""
    known = ", ".join(prefix + key for key in expected)
    if not isinstance(values, dict):
        raise UsageError(f"{prefix.rstrip('.')} must be a mapping with the keys {known}, got {values!r}")
    for key in values:
        if key not in expected:
            raise UsageError(f"unknown config key '{prefix}{key}'; known are {known}")
    for key in expected:
        if key not in values:
            raise UsageError(f"config key '{prefix}{key}' is missing; there must be {known}")
