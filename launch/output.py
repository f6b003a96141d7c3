"""The output folder: rank 0 writes there, and where it cannot every rank stops, with one line."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from launch.arguments import MISSING_PACKAGE_REMEDY, Arguments
from launch.checkpoint import CheckpointError, load_checkpoint, refuse_checkpoints
from launch.placement import Placement
from launch.processes import from_rank_zero

T = TypeVar("T")


def open_output(arguments: Arguments, placement: Placement) -> dict[str, Any] | None:
    """Make sure that the folder can take this run; the checkpoint to go on from, if any. For rank 0 alone."""
    folder = Path(arguments.output)
    try:
        if arguments.resume != "no":
            saved = load_checkpoint(folder, arguments)
        else:
            saved = None
            if not arguments.overwrite:
                refuse_checkpoints(folder)
        _try_to_write(folder)
    except CheckpointError as error:
        placement.stop(f"train.py: error: {error}", 2)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        placement.stop(f"train.py: error: {_describe(folder, error)}", 2)
    return saved


def _try_to_write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"one byte, for a full disk takes empty files")


def write_output(write: Callable[[], T], folder: Path, placement: Placement) -> T | None:
    """``write()`` on rank 0; None on the others. Collective: where it fails, every rank stops."""
    result, problem = None, ""
    if placement.rank == 0:
        try:
            result = write()
        except OSError as error:
            problem = _describe(folder, error)
        except ImportError as error:
            problem = f"{error}; {MISSING_PACKAGE_REMEDY}"
    problem = from_rank_zero(problem, placement)
    if problem:
        placement.stop(f"train.py: error: {problem}", 1)
    return result


def _describe(folder: Path, error: Exception) -> str:
    return (
        f"--output {folder}: cannot be written ({error}); make room or get the rights to write there and, if it has "
        "checkpoints, go on with --resume; or give another --output"
    )
