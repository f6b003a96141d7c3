"""Checkpoints: written atomically, the last few kept, damage noticed, read without running code from them."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from launch.arguments import Arguments
from launch.files import write_atomically

_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)\.pt")
_SEAL = hashlib.sha256
_SEAL_SIZE = _SEAL().digest_size


class CheckpointError(RuntimeError):
    """There is no checkpoint to go on from, or it is another run's."""


class _DamagedError(Exception):
    """The file is not what was written."""


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by optimizer step, the newest first."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*.pt"))
    return dict(sorted(((int(match[1]), path) for match, path in named if match), reverse=True))


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int) -> None:
    """Add the checkpoint of this step to those of the steps before, and keep the last ``keep``.

    A kill at any moment leaves them as they were, or with the new one. Not to be called by two processes at once.
    """
    step = state["progress"]["total_steps"]
    content = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, content)
    # torch.load takes a flipped bit for a weight. The seal finds it, and torch.load reads past the seal.
    sealed = content.getvalue() + _SEAL(content.getbuffer()).digest()
    write_atomically(folder / f"checkpoint-{step:08d}.pt", lambda file: file.write(sealed))
    _prune(folder, step, keep)


def _prune(folder: Path, newest: int, keep: int) -> None:
    """Now that the newest is safe on the disk, remove what nobody will go on from."""
    checkpoints = find_checkpoints(folder)
    # Steps to come are an earlier run's that was started anew, or were too damaged to go on from.
    abandoned = [step for step in checkpoints if step > newest]
    surplus = [step for step in checkpoints if step <= newest][keep:]
    for step in abandoned + surplus:
        checkpoints[step].unlink()
    for half_written in folder.glob("checkpoint-*.pt.tmp"):  # by a run that was killed
        half_written.unlink()


def refuse_checkpoints(folder: Path) -> None:
    """For a run that starts anew and would remove them.

    Raises:
        CheckpointError: there are some.
    """
    for newest in find_checkpoints(folder).values():
        raise CheckpointError(
            f"--output {folder}: a run has left its checkpoints there, up to {newest.name}; give --resume to go on "
            "from it, --overwrite to remove them and start anew, or another --output"
        )


def load_checkpoint(folder: Path, arguments: Arguments) -> dict[str, Any] | None:
    """The newest state that is undamaged, on the CPU; None where ``--resume auto`` finds no checkpoint at all.

    Warns:
        For each damaged checkpoint that it passes over.

    Raises:
        CheckpointError: there is none, all are damaged, or the arguments contradict its own.
    """
    checkpoints = find_checkpoints(folder)
    if not checkpoints:
        if arguments.resume == "auto":
            return None
        raise CheckpointError(
            f"--resume: there is no checkpoint in {folder}; start without --resume, or give its --output"
        )
    damage = []
    for path in checkpoints.values():
        try:
            content = _read_sealed(path)
        except _DamagedError as error:
            damage.append(str(error))
            continue
        for damaged in damage:
            warnings.warn(f"{damaged}; going on from {path.name}, the newest before it that is whole", stacklevel=2)
        state = _parse(path, content)
        _check_fit(path, arguments, state)
        return state
    raise CheckpointError(f"--resume: no checkpoint is whole: {'; '.join(damage)}. Start anew: --overwrite")


def _read_sealed(path: Path) -> bytes:
    try:
        sealed = path.read_bytes()
    except OSError as error:
        raise _DamagedError(f"{path} cannot be read ({error})") from error
    content, seal = sealed[:-_SEAL_SIZE], sealed[-_SEAL_SIZE:]
    if _SEAL(content).digest() != seal:
        raise _DamagedError(f"{path} is damaged (its checksum is wrong)")
    return content


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        complete = state["format"] == _FORMAT
    except Exception as error:  # torch.load raises whatever the content happens to cause
        raise CheckpointError(f"--resume: {path} is not a checkpoint of train.py: {error}") from error
    if not complete:
        raise CheckpointError(f"--resume: {path} has format {state['format']}, this train.py reads {_FORMAT}")
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
