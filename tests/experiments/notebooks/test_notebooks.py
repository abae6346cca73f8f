"""Every notebook runs from top to bottom in a fresh kernel.

The language model's first layers stand for the whole, whose thirty take minutes to compile for each
program; `make notebooks` has them all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.py"))


def test_there_are_notebooks():
    assert NOTEBOOKS


SHALLOW = "import models\nfrom tests.experiments import shallow\nmodels.load = shallow.load"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiled once, and run once
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = jupytext.read(path)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SHALLOW))
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the figures are shown"
