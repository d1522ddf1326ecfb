"""The commands of the harness, and `bsbr`, which runs them: `bsbr run sweep=seq_len` is `python -m evals.run sweep=seq_len`.

A command is a module of evals, or the `__main__` of a package in it, whose `main` is decorated with `@command`.
"""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from evals.cli.command import command
from evals.cli.help_text import columns
from evals.errors import OK, UsageError, did_you_mean

FOLDER = Path(__file__).resolve().parents[1]
OWN = ("bsbr", "baselines", "evals")
EXTRAS = {"transformers": "convert"}
"""The extra of pyproject.toml that installs a package, if it is not `extras`."""


@command()
def main() -> int:
    """Runs the command that sys.argv names, or prints which there are; returns the exit code."""
    program, *words = sys.argv
    name = words[0].replace("_", "-") if words else "--help"
    if name in ("-h", "--help"):
        print(help_text())
        return OK
    known = modules()
    if name not in known:
        raise UsageError(f"bsbr has no command {name}{did_you_mean(name, known)}; bsbr --help lists all")
    try:
        module = importlib.import_module(known[name])
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in OWN:
            raise
        extra = EXTRAS.get(package, "extras")
        raise UsageError(f'bsbr {name} needs {package}, which is not installed: pip install "bsbr[{extra}]"') from error
    sys.argv = [f"{program} {name}", *words[1:]]
    return int(module.main())


def help_text() -> str:
    """Every command with its description."""
    return "\n\n".join(
        [
            "usage: bsbr COMMAND [argument …]",
            columns("Commands", {name: description for name, _, description in find_commands()}),
            "bsbr COMMAND --help describes a command.",
        ]
    )


def modules() -> dict[str, str]:
    """The module of every command, by the name of the command."""
    return {name: module for name, module, _ in find_commands()}


def find_commands() -> Iterator[tuple[str, str, str]]:
    """Finds all commands without importing them: the name, the module, and the first sentence of the module's docstring."""
    for path in sorted([*FOLDER.glob("*.py"), *FOLDER.glob("*/__main__.py")], key=_name):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" and _is_command(node) for node in tree.body):
            module = ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts)
            yield _name(path), module, _first_sentence(ast.get_docstring(tree) or "")


def _name(path: Path) -> str:
    return (path.parent.name if path.stem == "__main__" else path.stem).replace("_", "-")


def _is_command(function: ast.FunctionDef) -> bool:
    return any(isinstance(one, ast.Call) and ast.unparse(one.func) == "command" for one in function.decorator_list)


def _first_sentence(docstring: str) -> str:
    """The first sentence of a command's docstring, without the name of the command."""
    text = re.sub(r"^`.*?`: ", "", " ".join(docstring.partition("\n\n")[0].split()))
    sentence = re.split(r"(?<=[.;])\s+(?=[A-Z])", text)[0]
    return sentence[0].upper() + sentence[1:]
