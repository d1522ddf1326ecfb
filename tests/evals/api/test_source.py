"""The source of a class of a cell travels with all that it uses, and its name changes with its code alone."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from baselines.standard import StandardAttention
from bsbr import MultiHeadAttention
from evals.api.attentions import write_module
from evals.api.source import home_module, module_source
from evals.errors import UsageError
from tests.evals.api.cells import COSINE, executed


def imported(folder: Path, name: str) -> ModuleType:
    """Imports a module from its file, as a process does that knows nothing of the notebook."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(folder: Path, source: str = COSINE, names: dict[str, Any] | None = None) -> str:
    return write_module(executed(source, names)["Cosine"], folder)


def test_the_written_class_computes_the_same(tmp_path: Path) -> None:
    here = executed(COSINE)["Cosine"]
    there = imported(tmp_path, write_module(here, tmp_path)).Cosine
    assert there is not here
    x = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(0))
    outputs = []
    for cls in (here, there):
        torch.manual_seed(0)
        outputs.append(cls(16, 2, temperature=3.0)(x))
    assert torch.equal(*outputs)


EDITS = {
    "a comment": (("    return SCALE", "    # of the scores\n    return SCALE"), True),
    "a docstring": (("    def attend", '    """Attends by angle."""\n\n    def attend'), True),
    "a blank line": (("        m, n = q", "\n        m, n = q"), True),
    "what it does not use": (("SCALE = 1.0", "SCALE = 1.0\nOTHER = [1, 2]\n\n\ndef unused():\n    return OTHER\n"), True),
    "the order of a cell": (("SCALE = 1.0\n", ""), True),
    "a method": (("dim=-1), F", "dim=-1), 2 * F"), False),
    "a default": (("temperature: float = 8.0", "temperature: float = 9.0"), False),
    "a function that it calls": (("return SCALE *", "return 2 * SCALE *"), False),
    "a constant of that": (("SCALE = 1.0", "SCALE = 1.5"), False),
    "an import": (("import torch.nn.functional as F", "import tests.evals.api.other_functional as F"), False),
}


@pytest.mark.parametrize("edit", EDITS)
def test_the_name_changes_with_the_code_and_only_then(edit: str, tmp_path: Path) -> None:
    (old, new), same = EDITS[edit]
    names = {"__name__": "__main__", "SCALE": 1.0} if edit == "the order of a cell" else None
    edited = COSINE.replace(old, new)
    assert edited != COSINE
    assert (written(tmp_path, edited, names) == written(tmp_path)) == same


def test_a_cell_that_is_run_again_and_one_of_another_session_give_the_same_name(tmp_path: Path) -> None:
    assert written(tmp_path / "a") == written(tmp_path / "b", f"x = 1\n{COSINE}")
    (text,) = {path.read_text() for path in tmp_path.rglob("*.py")}
    assert "x = 1" not in text


USES = "from bsbr import MultiHeadAttention\n{}\nclass Uses(MultiHeadAttention):\n    def c(self): return C\n"
CONSTANTS = {
    "numbers": "C = (1, -2.5, 3j, True, None, float('inf'))",
    "texts": "C = [b'x', 'it\\'s', '\\n']",
    "nested": "C = {'a': {3, 1, 2}, 1: [(4,)], 'd': frozenset({'x', 'y'})}",
    "a dtype": "import torch\nC = torch.float16",
    "a class of a library": "from collections import OrderedDict as C",
    "a function in C": "from torch import tanh as C",
    "a module": "import torch.nn.functional as C",
    "a type": "from typing import Any as C",
}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_what_a_class_uses_has_the_same_value_there(constant: str, tmp_path: Path) -> None:
    cell = (
        f"from bsbr import MultiHeadAttention\n{CONSTANTS[constant]}\nclass Uses(MultiHeadAttention):\n    def c(self): return C\n"
    )
    names = executed(cell)
    there = imported(tmp_path, write_module(names["Uses"], tmp_path))
    assert names["C"] == there.C
    assert repr(there.C) == repr(names["C"]) or isinstance(names["C"], dict)


def test_a_class_of_a_function_takes_the_variables_around_it_along(tmp_path: Path) -> None:
    factor = 3

    class Base(StandardAttention):
        def times(self, x: int) -> int:
            return factor * x

    class Derived(Base):
        """Uses Base by its name alone."""

        def times(self, x: int) -> int:
            return super().times(x) + 1

    there = imported(tmp_path, write_module(Derived, tmp_path)).Derived
    assert there(8, 2).times(5) == 16


def test_decorators_recursion_and_later_annotations_travel(tmp_path: Path) -> None:
    cell = """
from __future__ import annotations
from functools import cache
from bsbr import MultiHeadAttention

@cache
def even(n: Missing) -> int:
    return n == 0 or odd(n - 1)

def odd(n): return n != 0 and even(n - 1)

class Uses(MultiHeadAttention):
    @property
    def ten(self) -> Missing: return even(10)
"""
    there = imported(tmp_path, write_module(executed(cell)["Uses"], tmp_path))
    assert there.Uses.ten.fget(None)


REFUSED = {
    "a module of weights": ("from torch import nn\nC = nn.Linear(2, 2)", "uses C, which holds a Linear"),
    "a tensor": ("import torch\nC = torch.zeros(2)", "uses C, which holds a Tensor"),
    "a lambda": ("C = lambda x: x", "write it with def or class"),
    "another name": ("def D(): return 1\nC = D", "uses D under the name C"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_travel_is_one_sentence(case: str) -> None:
    cell, message = REFUSED[case]
    names = executed(USES.format(cell))
    with pytest.raises(UsageError, match=message) as caught:
        module_source(names["Uses"])
    assert "\n" not in str(caught.value)


def test_a_class_without_source_is_one_sentence() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec("from bsbr import MultiHeadAttention\nclass Uses(MultiHeadAttention):\n    def c(self): return 1\n", names)
    with pytest.raises(UsageError, match="the source of Uses, which attention Uses needs, is not known to Python"):
        module_source(names["Uses"])


def test_classes_of_modules_need_no_source() -> None:
    assert home_module(MultiHeadAttention, "MultiHeadAttention") == "bsbr.interface"
    assert home_module(executed(COSINE)["Cosine"], "Cosine") is None
