"""The Python in documents and docstrings runs as it is printed: on two ranks, a real network and real images."""

from __future__ import annotations

import pytest

from tests.docs.blocks import ROOT, run_examples
from tests.mpi import jobs
from tests.ranks import Rank, on_ranks

_WITH_PYTHON = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "launch/*.md")
    for path in ROOT.glob(pattern)
    if "```python" in path.read_text()
)
_WITH_FRAMEWORKS = ["docs/frameworks.md"]  # run in tests/frameworks, where Lightning and fastai are
_UNDER_MPI = [document for document in _WITH_PYTHON if "from mpi4py import" in (ROOT / document).read_text()]
_WITH_DOCTESTS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "syncaccum").rglob("*.py") if ">>> " in path.read_text()
)


@pytest.mark.parametrize("document", sorted({*_WITH_PYTHON} - {*_UNDER_MPI, *_WITH_FRAMEWORKS}))
@on_ranks(2)
def test_a_documents_python_runs(rank: Rank, document: str) -> None:
    assert run_examples(ROOT / document, rank.index, rank.folder) > 0


@pytest.mark.parametrize("document", _UNDER_MPI)
def test_a_documents_python_runs_under_mpi(document: str) -> None:
    finished = jobs.run("openmpi", 2, "-m", "tests.docs.run_under_mpi", ROOT / document)
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.count(" examples ran") == 2, finished.stdout
    assert "0 examples ran" not in finished.stdout


@pytest.mark.parametrize("module", _WITH_DOCTESTS)
@on_ranks(2)
def test_a_modules_docstring_examples_run(rank: Rank, module: str) -> None:
    assert run_examples(ROOT / module, rank.index, rank.folder) > 0
