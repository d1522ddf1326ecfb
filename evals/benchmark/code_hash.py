"""Digests of source code, which are part of the keys of results: changed code makes them stale.

Comments, docstrings and blank lines of Python do not count, so that better prose does not.
"""

import ast
import functools
import importlib
import importlib.util
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from bsbr.interface import Attention
from evals.results.ids import digest

MODEL_MODULES = ("bsbr.model", "bsbr.convolution")
"""The decoder around every attention. What these modules import belongs to other attentions and does not count."""


def attention_digest(attention: Attention) -> str:
    """Digest of all code that an attention runs."""
    return files_digest(source_files(attention))


def modules_digest(*modules: str) -> str:
    """Digest of the source of modules, without what they import. Raises ModuleNotFoundError for a module that does not exist."""
    return files_digest(map(_source_file, modules))


def files_digest(paths: Iterable[Path]) -> str:
    """Digest of files; of Python files without comments and docstrings."""
    texts = ((path, path.read_text(encoding="utf-8")) for path in paths)
    return digest([without_prose(text) if path.suffix == ".py" else text for path, text in texts])


@functools.cache  # attentions share most files, and every job of a sweep asks for all of them
def without_prose(source: str) -> str:
    """Python source without comments, docstrings, string statements and blank lines; its other lines stay as they are."""
    prose = [
        (token.start, token.end)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    numbered = dict(enumerate(source.splitlines(keepends=True), 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            # ast counts columns in bytes of UTF-8, tokenize in characters.
            first, last = (
                len(numbered[line].encode()[:column].decode())
                for line, column in ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0))
            )
            prose.append(((node.lineno, first), (node.end_lineno or 0, last)))
    for (top, left), (bottom, right) in sorted(prose, reverse=True):
        numbered[top] = numbered[top][:left] + numbered[bottom][right:]
        for number in range(top + 1, bottom + 1):
            numbered[number] = ""
    return "\n".join(line.rstrip() for line in numbered.values() if line.strip())


def source_files(attention: Attention) -> list[Path]:
    """Files that an attention's results depend on, sorted.

    These are the sources of its classes, of its submodules in the same packages and of `MODEL_MODULES`; all modules of these
    packages that the classes import, directly or not; and the C++ files that any of them names, with their includes.
    """
    attentions = [part for part in attention.modules() if isinstance(part, Attention)]  # one may be made of others
    modules = [cls.__module__ for one in attentions for cls in type(one).__mro__ if issubclass(cls, Attention)]
    packages = frozenset(name.partition(".")[0] for name in modules)
    modules += (type(part).__module__ for part in attention.modules() if type(part).__module__.partition(".")[0] in packages)
    seen: set[str] = set()
    while modules:
        name = modules.pop()
        if name not in seen:
            seen.add(name)
            modules += _imported_modules(name, packages)
    files = {_source_file(name) for name in seen.union(MODEL_MODULES)}
    return sorted(files.union(*map(_cpp_files, files)))


@functools.cache
def _cpp_files(file: Path) -> frozenset[Path]:
    """C++ files in a source's folder, or the one above, that it names in a string or includes, directly or not."""
    text = file.read_text(encoding="utf-8")
    names = re.findall(r"""["']([\w./-]+\.(?:cpp|h))["']""", text)
    direct = {path for path in (folder / name for folder in (file.parent, file.parent.parent) for name in names) if path.is_file()}
    direct -= {file}
    return frozenset(direct.union(*map(_cpp_files, direct)))


@functools.cache
def _imported_modules(name: str, packages: frozenset[str]) -> tuple[str, ...]:
    """Modules of some packages that a module imports, at the top or in a function.

    A name that is imported from a package counts as the module that defines it. Cached, since loaded modules do not change.
    """
    return tuple(_parse_imports(name, packages))


def _parse_imports(name: str, packages: frozenset[str]) -> Iterator[str]:
    file = _source_file(name)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in packages)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package or None)
            if base.partition(".")[0] in packages:
                yield from (_defining_module(base, alias.name) for alias in node.names)


def _defining_module(base: str, name: str) -> str:
    """The module that `from base import name` loads: a submodule, or the one that defines the name."""
    if _source_file(base).name != "__init__.py":
        return base
    if importlib.util.find_spec(f"{base}.{name}") is not None:
        return f"{base}.{name}"
    home = str(getattr(getattr(importlib.import_module(base), name, None), "__module__", base))
    # A type alias names the module of its generic type, such as collections.abc, instead of the module that defines it.
    return home if home.partition(".")[0] == base.partition(".")[0] else base


def _source_file(name: str) -> Path:
    """Path of a module's source: the file that was imported, or the one that would be."""
    path = getattr(sys.modules.get(name), "__file__", None)
    if not path:
        spec = importlib.util.find_spec(name)
        path = spec and spec.origin
    if not path:
        raise ModuleNotFoundError(f"there is no source of module '{name}'")
    return Path(path)
