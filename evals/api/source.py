"""The source of a class that no worker process can import, such as one of a notebook's cell, as the text of a module.

A worker is a fresh process. It imports an attention by name, and the digest of its code is that of a file, so a class of a cell
or of the script that runs is written to a file, with all that it uses. cloudpickle would pickle the class instead; but then
its digest would change with every session, and torch.compile, Triton and tracebacks, which read sources, would find none.
"""

import ast
import inspect
import linecache
import math
import symtable
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import FunctionType, ModuleType
from typing import Any

import torch

from evals.errors import UsageError

FUTURE_ANNOTATIONS = 0x1000000
"""The flag of code under `from __future__ import annotations`."""


def home_module(value: Any, name: str) -> str | None:
    """The module from which any process can import a value under its own name, or under `name`; None if there is none.

    A class of a notebook, of the script that runs, or of a function has none.
    """
    own = getattr(value, "__module__", None)
    if isinstance(own, str) and _holds(sys.modules.get(own), getattr(value, "__qualname__", name), value):
        return own
    if isinstance(value, type | FunctionType) or not callable(value):
        return None
    # Functions in C, such as torch.tanh, do not know their module.
    original = getattr(value, "__name__", name)
    holders = [module for module, loaded in list(sys.modules.items()) if _holds(loaded, original, value)]
    return min(holders, key=lambda module: ("._" in f".{module}", module.count("."), module), default=None)


def _holds(module: ModuleType | None, name: str, value: Any) -> bool:
    if not isinstance(module, ModuleType) or module.__name__ == "__main__" or module.__spec__ is None:
        return False
    return vars(module).get(name) is value


def module_source(cls: type) -> str:
    """Writes the text of a module that defines a class, with the imports, constants, functions and classes that it uses.

    The same definitions give the same text in every session.

    Raises:
        UsageError: if a source is not known, or if the class uses a value that cannot be written.
    """
    module = _Module(cls)
    module.define(cls.__name__, cls)
    future = ["from __future__ import annotations"] if module.has_future_annotations else []
    parts = [
        ["# Written by evals.compare: a class of a notebook or script, and what it uses."],
        [*future, *sorted(module.imports)],
        list(module.constants.values()),
        *([text] for text in module.definitions.values()),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


@dataclass
class _Module:
    """The parts of the module: each name is defined once, and after all that its definition needs."""

    cls: type
    values: dict[str, Any] = field(default_factory=dict)
    imports: set[str] = field(default_factory=set)
    constants: dict[str, str] = field(default_factory=dict)
    definitions: dict[str, str] = field(default_factory=dict)
    has_future_annotations: bool = False

    def define(self, name: str, value: Any) -> None:
        """Adds the definition of a name, and first those of all names that it uses."""
        if name in self.values:
            if self.values[name] is not value:
                raise UsageError(f"{self._subject} uses two different things that are called {name}: rename one of them")
            return
        self.values[name] = value
        if isinstance(value, ModuleType):
            self.imports.add(_import(value.__name__, name))
        elif home := home_module(value, name):
            original = str(getattr(value, "__name__", name))
            self.imports.add(f"from {home} import {original}" + (f" as {name}" if name != original else ""))
        elif isinstance(plain := _unwrapped(value), type | FunctionType):
            self._define_from_source(name, plain)
        else:
            self.constants[name] = f"{name} = {self._literal(name, value)}"

    def _define_from_source(self, name: str, value: type | FunctionType) -> None:
        definition = _Definition(value)
        if definition.text is None:
            raise UsageError(
                f"the source of {value.__qualname__}, which {self._subject} needs, is not known to Python: write it with def or "
                f"class and at least one method in a cell or a file, or put it into a module and import it"
            )
        if value.__name__ != name:
            raise UsageError(f"{self._subject} uses {value.__qualname__} under the name {name}: use it under its own name")
        self.has_future_annotations |= definition.has_future_annotations
        for used in _global_names(definition.text):
            if used in definition.namespace:
                self.define(used, definition.namespace[used])
        self.definitions[name] = definition.text

    def _literal(self, name: str, value: Any) -> str:
        """Writes a constant as an expression, the same in every session."""
        kind, write = type(value), partial(self._literal, name)
        if kind in (type(None), bool, int, complex, str, bytes):
            return repr(value)
        if kind is float:
            return repr(value) if math.isfinite(value) else f"float('{value}')"
        if kind is torch.dtype:
            self.imports.add("import torch")
            return repr(value)
        if kind is dict:
            return f"{{{', '.join(f'{write(key)}: {write(one)}' for key, one in value.items())}}}"
        if kind in (tuple, list, set, frozenset):
            parts = map(write, value)
            items = f"[{', '.join(parts if kind in (tuple, list) else sorted(parts))}]"
            return items if kind is list else f"{kind.__name__}({items})"
        raise UsageError(
            f"{self._subject} uses {name}, which holds a {kind.__name__} and cannot be written into a module: create it in the "
            "class, give it as an option, or put the class into a module of its own and import it"
        )

    @property
    def _subject(self) -> str:
        return f"attention {self.cls.__qualname__}"


class _Definition:
    """The source of a class or function, and the names that it can see."""

    def __init__(self, thing: type | FunctionType) -> None:
        self.thing = thing
        self.functions = [thing] if isinstance(thing, FunctionType) else list(_methods(thing))

    @cached_property
    def text(self) -> str | None:
        """The statement that defines it, with its decorators and without indentation; None if it is not known."""
        for function in self.functions:
            code = function.__code__
            lines = linecache.getlines(code.co_filename)
            node = self._find("".join(lines), code.co_firstlineno)
            if node is not None:
                first = min(part.lineno for part in (node, *node.decorator_list))
                return textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).rstrip()
        if isinstance(self.thing, FunctionType):  # a lambda
            return None
        try:  # a class without methods, of a script
            return textwrap.dedent(inspect.getsource(self.thing)).rstrip()
        except (OSError, TypeError):
            return None

    def _find(self, source: str, line: int) -> ast.ClassDef | ast.FunctionDef | None:
        """The innermost statement that defines it and contains the line."""
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return None
        kind = ast.FunctionDef if isinstance(self.thing, FunctionType) else ast.ClassDef
        found = [
            node
            for node in ast.walk(tree)
            if isinstance(node, kind)
            and node.name == self.thing.__name__
            and min(part.lineno for part in (node, *node.decorator_list)) <= line <= (node.end_lineno or 0)
        ]
        return max(found, key=lambda node: node.lineno, default=None)

    @cached_property
    def namespace(self) -> dict[str, Any]:
        """Names of the module, then base classes, then variables of functions around it."""
        module = sys.modules.get(self.thing.__module__)
        names: dict[str, Any] = dict(vars(module)) if module else {}
        for function in self.functions:
            names |= function.__globals__
        if isinstance(self.thing, type):
            names |= {base.__name__: base for base in self.thing.__bases__ if base.__name__ not in names}
        for function in self.functions:
            cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            names |= {name: cell.cell_contents for name, cell in cells if name != "__class__"}
        return names

    @property
    def has_future_annotations(self) -> bool:
        return any(function.__code__.co_flags & FUTURE_ANNOTATIONS for function in self.functions)


def _methods(cls: type) -> Iterator[FunctionType]:
    """The functions that a class's own statement defines."""
    for value in vars(cls).values():
        for part in (value, *(getattr(value, name, None) for name in ("__func__", "fget", "fset", "func"))):
            function = _unwrapped(part)
            if isinstance(function, FunctionType) and function.__qualname__.startswith(f"{cls.__qualname__}."):
                yield function


def _unwrapped(value: Any) -> Any:
    """What a decorator such as functools.cache has wrapped."""
    return inspect.unwrap(value) if callable(value) else value


def _global_names(source: str) -> list[str]:
    """The names that a statement takes from its module or from builtins, in alphabetical order."""

    def used(table: symtable.SymbolTable) -> Iterator[str]:
        is_top = table.get_type() == "module"
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (not symbol.is_assigned() if is_top else symbol.is_global()):
                yield symbol.get_name()
        for child in table.get_children():
            yield from used(child)

    names = used(symtable.symtable(source, "<attention>", "exec"))
    return sorted({name for name in names if not name.startswith("__")})


def _import(module: str, name: str) -> str:
    return f"import {module}" if name == module else f"import {module} as {name}"
