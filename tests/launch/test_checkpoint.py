"""A checkpoint is whole whenever the writer stops, and only its own run goes on from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from launch.arguments import Arguments
from launch.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from launch.files import write_atomically
from launch.progress import EpochRecord, Progress, Sums


def make_state(arguments: Arguments, progress: Progress | None = None) -> dict[str, Any]:
    return {
        "arguments": dataclasses.asdict(arguments),
        "progress": (progress or Progress()).state_dict(),
        "learner": {"weight": torch.arange(3.0)},
    }


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    progress = Progress(1, 2, 25, Sums(1 / 3, 2.0, 3.0), [EpochRecord(0.1, 0.2, 0.3, 0.4)], 5.0)
    save_checkpoint(tmp_path / "c.pt", make_state(Arguments(), progress))
    state = load_checkpoint(tmp_path / "c.pt", Arguments())
    assert Progress.from_state_dict(state["progress"]) == progress
    assert torch.equal(state["learner"]["weight"], torch.arange(3.0))


def test_a_write_that_stops_halfway_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def stop_halfway(file: IO[bytes]) -> None:
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, stop_halfway)
    assert path.read_bytes() == b"old"
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_contradicting_arguments_are_named_with_both_values(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, make_state(Arguments(lr=0.1, window=64)))
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path, Arguments(lr=0.2, window=32))
    assert "--lr is 0.2, the checkpoint's is 0.1" in str(refused.value)
    assert "--window is 32, the checkpoint's is 64" in str(refused.value)
    assert "seed" not in str(refused.value)


def test_a_run_may_go_on_for_longer_but_not_for_less_than_it_has(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, make_state(Arguments(epochs=4), Progress(epoch=3)))
    load_checkpoint(path, Arguments(epochs=9, resume=True, checkpoint_every=1))
    with pytest.raises(CheckpointError, match=r"--epochs 2: .* has 3 epochs behind it; give 3 or more"):
        load_checkpoint(path, Arguments(epochs=2))


def test_missing_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(CheckpointError, match=r"there is no .*c\.pt; start without --resume"):
        load_checkpoint(path, Arguments())
    save_checkpoint(path, make_state(Arguments()))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"c\.pt is not a checkpoint"):
        load_checkpoint(path, Arguments())
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=r"c\.pt is not a checkpoint"):
        load_checkpoint(path, Arguments())
    torch.save({"format": 0}, path)
    with pytest.raises(CheckpointError, match=r"format 0, this train\.py reads 1"):
        load_checkpoint(path, Arguments())


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save({"format": 1, "arguments": Arguments()}, path)  # any class of ours is a stranger to torch
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(path, Arguments())
