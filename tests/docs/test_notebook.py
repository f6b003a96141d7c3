"""The notebook runs from top to bottom, and what it shows is of such a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.blocks import ROOT


def _read() -> Any:
    return nbformat.read(ROOT / "docs/small-batches.ipynb", as_version=4)


def _describe_outputs(notebook: Any) -> list[list[str]]:
    """For each cell with code, what kinds of output it has: streams by name, others by their media types."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[output.get("name") or ", ".join(sorted(output.data)) for output in cell.outputs] for cell in cells]


# Five small trainings, and a kernel that imports torch: 12 s of processor time.
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages; the kernel is another process
def test_the_notebook_runs_and_its_assertions_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for folder in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):  # else in the home of who runs it
        monkeypatch.setenv(folder, str(tmp_path / folder))
    notebook = _read()
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert _describe_outputs(notebook) == _describe_outputs(_read())


def test_what_it_shows_is_of_one_run_in_order() -> None:
    notebook = _read()
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    shown = [kind for kinds in _describe_outputs(notebook) for kind in kinds]
    assert shown == ["image/png, text/plain"] * 2 + ["stdout", "image/png, text/plain", "stdout"]
