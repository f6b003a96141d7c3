"""Checkpoints: written atomically, read without running code from them, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from launch.arguments import Arguments
from launch.files import write_atomically

_FORMAT = 1


class CheckpointError(RuntimeError):
    """There is no checkpoint to go on from, or it is another run's."""


def checkpoint_path(arguments: Arguments) -> Path:
    return Path(arguments.output) / "checkpoint.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint; a kill at any moment leaves the old one or the new one."""
    write_atomically(path, lambda file: torch.save({"format": _FORMAT, **state}, file))


def load_checkpoint(path: Path, arguments: Arguments) -> dict[str, Any]:
    """The saved state, on the CPU.

    Raises:
        CheckpointError: the file is missing or unreadable, or the arguments contradict its own.
    """
    if not path.exists():
        raise CheckpointError(f"--resume: there is no {path}; start without --resume, or give its --output")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        complete = state["format"] == _FORMAT
    except Exception as error:  # torch.load raises whatever the damage happens to cause
        raise CheckpointError(f"--resume: {path} is not a checkpoint of train.py: {error}") from error
    if not complete:
        raise CheckpointError(f"--resume: {path} has format {state['format']}, this train.py reads {_FORMAT}")
    _check_fit(path, arguments, state)
    return state


def _check_fit(path: Path, arguments: Arguments, state: dict[str, Any]) -> None:
    contradictions = arguments.contradictions(state["arguments"])
    if contradictions:
        raise CheckpointError(
            f"--resume contradicts {path}: {'; '.join(contradictions)}. Give the checkpoint's values, or "
            "another --output without --resume"
        )
    done = state["progress"]["epoch"]
    if arguments.epochs < done:
        raise CheckpointError(f"--epochs {arguments.epochs}: {path} has {done} epochs behind it; give {done} or more")
