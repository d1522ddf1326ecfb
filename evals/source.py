"""The source that an attention runs: when it changes, results are made anew, and when other source does, they are not."""

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from bsbr.interface import Attention
from evals.config import digest

AROUND = ("bsbr.model", "bsbr.convolution")
"""What every attention is measured inside of. What these import beside is no other attention's matter."""


def of_attention(attention: Attention) -> str:
    """A digest of it."""
    return digest([path.read_text() for path in files_of(attention)])


def files_of(attention: Attention) -> list[Path]:
    """Those of its classes, and of all that these import of their own packages, anywhere in them, and so on; and of `AROUND`.

    Beside a module its C++, of the same name.
    """
    modules = [cls.__module__ for cls in type(attention).__mro__ if issubclass(cls, Attention)]
    packages = frozenset(name.partition(".")[0] for name in modules)
    modules += (type(part).__module__ for part in attention.modules() if type(part).__module__.partition(".")[0] in packages)
    seen: set[str] = set()
    while modules:
        name = modules.pop()
        if name not in seen:
            seen.add(name)
            modules += _imported(name, packages)
    files = [_file(name) for name in seen.union(AROUND)]
    return sorted(path for file in files for path in (file, file.with_suffix(".cpp")) if path.exists())


@functools.cache
def _imported(name: str, packages: frozenset[str]) -> tuple[str, ...]:
    """The modules of these packages that a module imports; for what it takes from a package's front, the module that has it.

    Read once a process: what it has imported, it goes on with.
    """
    return tuple(_imports(name, packages))


def _imports(name: str, packages: frozenset[str]) -> Iterator[str]:
    file = _file(name)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name.partition(".")[0] in packages)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package or None)
            if base.partition(".")[0] in packages:
                yield from (_home(base, one.name) for one in node.names)


def _home(base: str, name: str) -> str:
    """The module that `from base import name` is about."""
    if _file(base).name != "__init__.py":
        return base
    if importlib.util.find_spec(f"{base}.{name}") is not None:
        return f"{base}.{name}"
    return str(getattr(getattr(importlib.import_module(base), name, None), "__module__", base))


def _file(name: str) -> Path:
    """Where a module's source lies; of one that is imported, whence it came."""
    found = getattr(sys.modules.get(name), "__file__", None)
    spec = None if found else importlib.util.find_spec(name)
    found = found or (spec and spec.origin)
    if not found:
        raise ModuleNotFoundError(f"there is no source of module '{name}'")
    return Path(found)
