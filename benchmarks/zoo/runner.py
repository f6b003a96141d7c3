"""A run through the libraries, in processes that are replaced after some models, so that memory stays small."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.report import RESULTS
from benchmarks.zoo.families import Model
from benchmarks.zoo.table import write_page
from benchmarks.zoo.trial import Outcome, try_model

LIBRARIES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "smp": "segmentation-models-pytorch",
    "transformers": "transformers",
    "monai": "monai",
}
"""Names of packages, by what the modules beside this one are called."""

_FILE = RESULTS / "zoo.json"
_MODELS_A_PROCESS = 20

Found = dict[str, Any]
"""What the file holds of a library: its version, and its models with their outcomes, or None where not tried yet."""


def run(libraries: Sequence[str], *, fresh: bool) -> None:
    found: dict[str, Found] = {} if fresh or not _FILE.exists() else json.loads(_FILE.read_text())
    for library in libraries:
        if found.get(library, {}).get("version") != version(LIBRARIES[library]):
            with _begin_process() as process:
                models = process.submit(_list_models, library).result()
            package = LIBRARIES[library]
            found[library] = {
                "package": package,
                "version": version(package),
                "torch": torch.__version__,
                "models": models,
            }
        _try_library(library, found[library]["models"], lambda: _keep(found))
    _keep(found)
    write_page(found)


def _keep(found: dict[str, Found]) -> None:
    _FILE.write_text(json.dumps(found, indent=1) + "\n")


def _begin_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare)


def _prepare() -> None:
    """One thread: small layers gain nothing by more."""
    warnings.simplefilter("ignore")  # of what libraries deprecate in each other
    torch.set_num_threads(1)


def _list_models(library: str) -> list[Found]:
    models: Sequence[Model] = list(import_module(f"benchmarks.zoo.{library}_models").list_models())
    return [{**asdict(model), "outcome": None} for model in models]


def _try_library(library: str, models: list[Found], keep: Any) -> None:
    left = [model for model in models if model["outcome"] is None]
    columns = TextColumn("{task.description:60}"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task(library, total=len(models), completed=len(models) - len(left))
        while left:
            some, left = left[:_MODELS_A_PROCESS], left[_MODELS_A_PROCESS:]
            with _begin_process() as process:
                for model in some:
                    progress.update(task, description=f"{library}: {model['name']}")
                    try:
                        model["outcome"] = process.submit(_try, library, model["name"]).result()
                    except BrokenProcessPool:
                        model["outcome"] = asdict(Outcome(failure="its process was killed, as for want of memory"))
                        left = [other for other in some if other["outcome"] is None] + left
                        break
                    finally:
                        progress.advance(task)
                        keep()


def _try(library: str, name: str) -> Found:
    torch.manual_seed(0)
    try:
        model, forward = import_module(f"benchmarks.zoo.{library}_models").build(name)
    except Exception as error:
        return asdict(Outcome(failure=f"not built: {type(error).__name__}: {error}"[:300]))
    return asdict(try_model(model, forward))
