"""A checkpoint is whole whenever the writer stops, and only its own run goes on from it."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from launch.arguments import Arguments
from launch.checkpoint import CheckpointError, find_checkpoints, load_checkpoint, save_checkpoint
from launch.files import write_atomically
from launch.progress import EpochRecord, Progress, Sums
from tests import ranks  # noqa: F401  has the forkserver import torch once, not in every child

KEEP = 3
# Two megabytes: writing takes long enough for a kill to come in the midst of it.
ELEMENTS = 250_000


def make_state(step: int = 0, arguments: Arguments | None = None, progress: Progress | None = None) -> dict[str, Any]:
    return {
        "arguments": dataclasses.asdict(arguments or Arguments()),
        "progress": (progress or Progress(total_steps=step)).state_dict(),
        "learner": {"weight": torch.full((3,), float(step))},
    }


def save_steps(folder: Path, *steps: int, keep: int = KEEP) -> None:
    for step in steps:
        save_checkpoint(folder, make_state(step), keep)


def load_step(folder: Path) -> int:
    """The step that a resumed run goes on from; its weight is that step's too."""
    state = load_checkpoint(folder, Arguments())
    assert state is not None
    step: int = state["progress"]["total_steps"]
    assert torch.equal(state["learner"]["weight"], torch.full((3,), float(step)))
    return step


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    progress = Progress(1, 2, 25, Sums(1 / 3, 2.0, 3.0), [EpochRecord(0.1, 0.2, 0.3, 0.4)], 5.0)
    save_checkpoint(tmp_path, make_state(7, progress=progress), KEEP)
    state = load_checkpoint(tmp_path, Arguments())
    assert state is not None
    assert Progress.from_state_dict(state["progress"]) == progress
    assert torch.equal(state["learner"]["weight"], torch.full((3,), 7.0))


def test_a_checkpoint_is_readable_with_torch_alone(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    assert torch.load(tmp_path / "checkpoint-00000005.pt", weights_only=True)["progress"]["total_steps"] == 5


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


def test_file_and_folder_are_on_the_disk_before_an_older_checkpoint_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power failure would tell and a kill does not: the kernel keeps a killed process's writes."""
    save_steps(tmp_path, 1, keep=1)
    calls: list[str] = []

    def record(owner: Any, name: str, describe: Callable[..., str]) -> None:
        function = getattr(owner, name)

        def recorded(*args: Any) -> Any:
            calls.append(f"{name} {describe(*args)}")
            return function(*args)

        monkeypatch.setattr(owner, name, recorded)

    record(os, "fsync", lambda descriptor: Path(f"/dev/fd/{descriptor}").resolve().name)
    record(os, "replace", lambda _, new: new.name)
    record(Path, "unlink", lambda path: path.name)
    save_steps(tmp_path, 2, keep=1)
    assert calls == [
        "fsync checkpoint-00000002.pt.tmp",
        "replace checkpoint-00000002.pt",
        f"fsync {tmp_path.name}",
        "unlink checkpoint-00000001.pt",
    ]


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(0, 50, 10), keep=3)
    assert list(find_checkpoints(tmp_path)) == [40, 30, 20]
    save_steps(tmp_path, 50, keep=1)
    assert list(find_checkpoints(tmp_path)) == [50]


def test_a_run_started_anew_leaves_none_of_an_earlier_run(tmp_path: Path) -> None:
    save_steps(tmp_path, 100, 200)
    save_steps(tmp_path, 0)
    assert list(find_checkpoints(tmp_path)) == [0]


def test_what_a_killed_run_left_half_written_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000007.pt.tmp").write_bytes(b"half")
    save_steps(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000005.pt"]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    for name in ("checkpoint-best.pt", "checkpoint-00000001.pt.bak", "metrics.json.tmp"):
        (tmp_path / name).touch()
    save_steps(tmp_path, 0, 1, 2, keep=1)
    assert list(find_checkpoints(tmp_path)) == [2]
    assert len(list(tmp_path.iterdir())) == 4


def flip_a_bit(content: bytearray) -> None:
    at = random.Random(len(content)).randrange(len(content))
    content[at] ^= 1 << 3


def lose_the_end(content: bytearray) -> None:
    del content[-1:]


def lose_half(content: bytearray) -> None:
    del content[len(content) // 2 :]


def lose_a_page(content: bytearray) -> None:
    """A page that never got to the disk reads as zeros."""
    content[64:128] = bytes(64)


@pytest.mark.parametrize("damage", [flip_a_bit, lose_the_end, lose_half, lose_a_page, bytearray.clear])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: Callable[[bytearray], None]) -> None:
    save_steps(tmp_path, 10, 20, 30)
    for step in (20, 30):
        path = tmp_path / f"checkpoint-000000{step}.pt"
        content = bytearray(path.read_bytes())
        damage(content)
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged") as warned:
        assert load_step(tmp_path) == 10
    said = [str(warning.message) for warning in warned]
    assert len(said) == 2
    for step, message in zip((30, 20), said, strict=True):
        assert f"checkpoint-000000{step}.pt is damaged" in message
        assert "going on from checkpoint-00000010.pt" in message
    # The run goes on, with a checkpoint sooner than last time: those that are damaged count for nothing.
    save_steps(tmp_path, 10, 15)
    assert list(find_checkpoints(tmp_path)) == [15, 10]
    assert load_step(tmp_path) == 15


def test_an_unreadable_checkpoint_counts_as_damaged(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    (tmp_path / "checkpoint-00000020.pt").mkdir()  # reading it is an OSError, as of a bad disk
    with pytest.warns(
        UserWarning, match=r"checkpoint-00000020.pt cannot be read .*; going on from checkpoint-00000010"
    ):
        assert load_step(tmp_path) == 10


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """torch.load takes most for weights, and zip's own checksums do not cover its directory."""
    save_steps(tmp_path, 1)
    path = tmp_path / "checkpoint-00000001.pt"
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match="is damaged"):
            load_checkpoint(tmp_path, Arguments())


def test_if_all_are_damaged_the_run_does_not_silently_start_from_scratch(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    for resume in ("yes", "auto"):
        with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*2\.pt is damaged.*1\.pt is damaged"):
            load_checkpoint(tmp_path, Arguments(resume=resume))


def write_without_end(folder: Path, about_to_write: Connection) -> None:
    state = load_checkpoint(folder, Arguments(resume="auto"))
    step = state["progress"]["total_steps"] + 1 if state else 0
    about_to_write.send_bytes(b"!")
    while True:
        state = make_state(step)
        state["learner"]["weights"] = torch.full((ELEMENTS,), float(step), dtype=torch.float64)
        save_checkpoint(folder, state, KEEP)
        step += 1


def test_a_kill_at_any_moment_leaves_a_whole_newest_checkpoint_and_no_litter(tmp_path: Path) -> None:
    moments = random.Random(0)
    context = multiprocessing.get_context("forkserver")
    newest, killed_while_writing, killed_before_pruning = -1, 0, 0
    for _ in range(40):
        ours, theirs = context.Pipe()
        writer = context.Process(target=write_without_end, args=(tmp_path, theirs), daemon=True)
        writer.start()
        ours.recv_bytes()
        time.sleep(moments.uniform(0.0, 0.1))
        writer.kill()
        writer.join()
        names = sorted(path.name for path in tmp_path.iterdir())
        checkpoints = find_checkpoints(tmp_path)
        unfinished = [name for name in names if name.endswith(".tmp")]
        killed_while_writing += len(unfinished)
        killed_before_pruning += len(checkpoints) == KEEP + 1
        assert len(unfinished) <= 1
        # One more than are kept where the kill came between the writing of one and the removal of another.
        assert len(names) == len(checkpoints) + len(unfinished) <= KEEP + 2
        if not checkpoints:
            assert newest == -1
            continue
        state = load_checkpoint(tmp_path, Arguments())  # a warning of a damaged one would fail this test
        assert state is not None
        step = state["progress"]["total_steps"]
        assert step == next(iter(checkpoints)) >= newest
        assert torch.equal(state["learner"]["weights"], torch.full((ELEMENTS,), float(step), dtype=torch.float64))
        newest = step
    print(f"40 kills: {killed_while_writing} while writing, {killed_before_pruning} before pruning; {newest} steps")
    assert newest > 0
    assert killed_while_writing > 0


def test_contradicting_arguments_are_named_with_both_values(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_state(arguments=Arguments(lr=0.1, window=64)), KEEP)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(tmp_path, Arguments(lr=0.2, window=32))
    assert "--lr is 0.2, the checkpoint's is 0.1" in str(refused.value)
    assert "--window is 32, the checkpoint's is 64" in str(refused.value)
    assert "seed" not in str(refused.value)


def test_a_run_may_go_on_for_longer_but_not_for_less_than_it_has(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_state(arguments=Arguments(epochs=4), progress=Progress(epoch=3)), KEEP)
    load_checkpoint(tmp_path, Arguments(epochs=9, resume="yes", checkpoint_every=1, keep_checkpoints=9))
    with pytest.raises(CheckpointError, match=r"--epochs 2: .* has 3 epochs behind it; give 3 or more"):
        load_checkpoint(tmp_path, Arguments(epochs=2))


def test_without_a_checkpoint_a_run_starts_only_if_told_auto(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*; start without --resume"):
        load_checkpoint(tmp_path, Arguments(resume="yes"))
    assert load_checkpoint(tmp_path, Arguments(resume="auto")) is None


def write_sealed(folder: Path, content: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a good checksum and another content than train.py writes."""
    with monkeypatch.context() as patch:
        save = torch.save
        patch.setattr(torch, "save", lambda _, file: save(content, file))
        save_steps(folder, 0)


def test_files_of_other_programs_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sealed(tmp_path, [1, 2], monkeypatch)
    with pytest.raises(CheckpointError, match=r"checkpoint-00000000\.pt is not a checkpoint of train\.py"):
        load_checkpoint(tmp_path, Arguments())
    write_sealed(tmp_path, {"format": 0}, monkeypatch)
    with pytest.raises(CheckpointError, match=r"format 0, this train\.py reads 1"):
        load_checkpoint(tmp_path, Arguments())


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Any class of ours is a stranger to torch.
    write_sealed(tmp_path, {"format": 1, "arguments": Arguments()}, monkeypatch)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path, Arguments())
