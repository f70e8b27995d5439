"""The example notebook runs in a fresh kernel."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import lorashrink_example

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


@pytest.mark.filterwarnings("default")  # Jupyter's own
def test_notebook_runs_and_leaves_smaller_files(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kinds = [[output.output_type for output in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(
        notebook, timeout=600, startup_timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    again = [[output.output_type for output in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]
    assert again == kinds
    before = lorashrink_example.path("loras", "style.safetensors").stat().st_size
    outputs = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(outputs) == 2
    assert all(size < before for size in outputs)
