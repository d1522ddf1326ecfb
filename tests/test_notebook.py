"""The notebook of the documentation runs from its first cell to its last, and shows what it promises."""

import os
from pathlib import Path
from typing import Any

import pytest

from evals.paths import ROOT

nbformat = pytest.importorskip("nbformat", reason="NOT TESTED: nbclient is not installed")
nbclient = pytest.importorskip("nbclient", reason="NOT TESTED: nbclient is not installed")
NOTEBOOK = ROOT / "docs" / "examples" / "notebook.ipynb"


def shown(cell: Any) -> dict[str, str]:
    """What a cell shows, by its media type."""
    kinds = [output["data"] for output in cell["outputs"] if output["output_type"] in ("execute_result", "display_data")]
    return {kind: data for one in kinds for kind, data in one.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the packages that run notebooks
def test_the_notebook_compares_and_draws_a_class_of_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell["outputs"] for cell in notebook.cells if cell["cell_type"] == "code"), "commit it without outputs"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    by_source = {cell["source"]: shown(cell) for cell in notebook.cells if cell["cell_type"] == "code"}
    (table,) = [data["text/html"] for source, data in by_source.items() if source.endswith("results")]
    assert "<td>CosineAttention</td>" in table
    assert "image/png" in by_source['results.plot("latency")']
    (speedup,) = [data["text/plain"] for source, data in by_source.items() if source.startswith("results.speedup")]
    assert speedup.startswith("CosineAttention over standard, seq_len 512: ")
    assert (tmp_path / "results" / "seq_len" / "report.html").is_file()
