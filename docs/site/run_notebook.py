"""Run the notebook anew, and keep in it what it shows: `make notebook`."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "small-batches.ipynb"

notebook = nbformat.read(NOTEBOOK, as_version=4)
# Without the time of day: else each run would change every cell.
NotebookClient(notebook, record_timing=False).execute()
nbformat.write(notebook, NOTEBOOK)
