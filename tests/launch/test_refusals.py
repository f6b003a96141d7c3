"""What cannot work is told in one line that says what, where and what to do; nothing is lost by it."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from launch.arguments import Arguments
from launch.checkpoint import find_checkpoints
from launch.placement import Placement
from launch.train import main
from tests.launch import jobs, warm

# Eight steps of the small network.
TINY = ["--model=mlp", "--train-images=64", "--window=16", "--epochs=2"]


def read_checkpoints(folder: Path) -> dict[int, bytes]:
    return {step: path.read_bytes() for step, path in find_checkpoints(folder).items()}


def refuse(capsys: pytest.CaptureFixture[str], *options: object, status: int = 2) -> str:
    """What ``train.py`` says before it stops: its last line, below the usage where an option is wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*TINY, *map(str, options)])
    assert stopped.value.code == status
    (line,) = re.findall(r"^train\.py: error: .*", capsys.readouterr().err, re.MULTILINE)
    return str(line)


def check_said_once(finished: subprocess.CompletedProcess[str], *parts: str, tracebacks: int = 0) -> None:
    """One error line with these parts. torchrun prints a traceback of its own where a rank fails."""
    assert finished.returncode not in (0, None), finished.stdout
    (line,) = re.findall(r"^train\.py: error: .*", finished.stdout, re.MULTILINE)
    assert all(part in line for part in parts), line
    assert finished.stdout.count("Traceback (most recent call last)") == tracebacks, finished.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run; tests leave it as it is."""
    output = tmp_path_factory.mktemp("finished")
    main([*TINY, f"--output={output}"])
    return output


@pytest.mark.parametrize("options", [[], ["--lr=0.2"], ["--resume=no"]], ids=str)
def test_the_same_command_again_keeps_the_checkpoints(
    finished: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_checkpoints(finished)
    line = refuse(capsys, f"--output={finished}", *options)
    for part in (f"--output {finished}: ", "checkpoint-00000008.pt", "--resume", "--overwrite"):
        assert part in line
    assert read_checkpoints(finished) == before


def test_the_same_command_again_is_refused_once_on_two_ranks(finished: Path) -> None:
    before = read_checkpoints(finished)
    again = jobs.run(jobs.LOCAL, 2, "launch/train.py", *TINY, f"--output={finished}")
    check_said_once(again, f"--output {finished}: ", "--overwrite", tracebacks=1)
    assert read_checkpoints(finished) == before


def test_a_folder_with_a_damaged_checkpoint_alone_is_not_overwritten_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint-00000100.pt").write_bytes(b"half")
    assert "checkpoint-00000100.pt" in refuse(capsys, f"--output={tmp_path}")
    assert "--overwrite" in refuse(capsys, f"--output={tmp_path}", "--resume")
    assert read_checkpoints(tmp_path) == {100: b"half"}


def test_overwrite_starts_anew_and_contradicts_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint-00000100.pt").write_bytes(b"half")
    assert "--overwrite" in refuse(capsys, f"--output={tmp_path}", "--overwrite", "--resume=auto")
    main([*TINY, f"--output={tmp_path}", "--overwrite"])
    assert list(find_checkpoints(tmp_path)) == [8, 4, 0]


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "WORLD_SIZE is '2', and must be a number from 3 "),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"RANK": "0", "WORLD_SIZE": "1.5"}, "WORLD_SIZE is '1.5'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is '1'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is '3'"),
    ],
    ids=str,
)
def test_a_wrong_variable_of_the_launcher_is_named_with_the_remedy(
    environment: dict[str, str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as stopped:
        Placement.from_environment(environment)
    assert stopped.value.code == 2
    # Local rank 1 leaves the word to local rank 0.
    expected = [] if environment.get("LOCAL_RANK") == "1" else [named]
    lines = capsys.readouterr().err.splitlines()
    assert [named] * len(lines) == expected
    for line in lines:
        assert line.startswith(f"train.py: error: environment variable {named}")
        assert "unset RANK and WORLD_SIZE to train alone" in line


def test_what_torchrun_sets_and_the_least_that_is_enough_are_taken() -> None:
    least = {"RANK": "3", "WORLD_SIZE": "4"}
    assert Placement.from_environment(least) == Placement(3, 4, 3, 4, launched=True)
    assert Placement.from_environment({**least, "LOCAL_WORLD_SIZE": "2"}) == Placement(3, 4, 1, 2, launched=True)
    torchrun = {**least, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert Placement.from_environment(torchrun) == Placement(3, 4, 0, 2, launched=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": ""}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "y"}, "MASTER_PORT"),
    ],
    ids=["RANK", "no MASTER_ADDR", "MASTER_PORT"],
)
def test_ranks_that_cannot_meet_say_so_in_one_line(changes: dict[str, str], named: str, tmp_path: Path) -> None:
    check_said_once(warm.run("launch/train.py", *TINY, f"--output={tmp_path}", **changes), named)


def test_an_interface_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    command = [jobs.LOCAL, 2, "launch/train.py", *TINY, f"--output={tmp_path}"]
    finished = jobs.run(*command, GLOO_SOCKET_IFNAME="nonesuch0")
    check_said_once(finished, "nonesuch0", "syncaccum.doctor", tracebacks=1)


# sklearn is met before the ranks are; rich, tensorboard and matplotlib are rank 0's.
@pytest.mark.parametrize("package", ["sklearn", "rich", "tensorboard", "matplotlib"])
def test_a_missing_package_is_named_before_training(package: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    stopped = warm.run("-m", "tests.launch.without_package", package, *TINY, f"--output={output}")
    check_said_once(stopped, package, "pip install 'syncaccum[demo]'")
    assert find_checkpoints(output) == {}


def test_a_package_missing_on_two_ranks_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'rich'\")")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [jobs.LOCAL, 2, "launch/train.py", *TINY, f"--output={tmp_path / 'output'}"]
    check_said_once(jobs.run(*command, PYTHONPATH=path), "No module named 'rich'", "pip install", tracebacks=1)


# Root may write everywhere, but for these.
@pytest.mark.parametrize("output", ["/proc/run", "/proc/1/run", "x" * 300, "a\0b"], ids=lambda name: ascii(name[:9]))
def test_a_folder_that_cannot_be_written_is_refused_at_once(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refuse(capsys, f"--output={output}")
    assert f"--output {output}: cannot be written" in line
    assert "give another --output" in line


def test_a_file_in_a_folders_place_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("")
    assert f"--output {tmp_path}: cannot be written" in refuse(capsys, f"--output={tmp_path}", status=1)
    assert "give a folder" in refuse(capsys, f"--output={tmp_path / 'tensorboard'}")


@pytest.mark.parametrize(
    ("file", "left"), [("checkpoint-00000000.pt", []), ("metrics.json", [8, 4, 0]), ("training.png", [8, 4, 0])]
)
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    file: str, left: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{file}.tmp").symlink_to("/dev/full")
    line = refuse(capsys, f"--output={tmp_path}", status=1)
    assert f"--output {tmp_path}: cannot be written ([Errno {errno.ENOSPC}] " in line
    assert "make room" in line
    assert "--resume" in line
    assert list(find_checkpoints(tmp_path)) == left
    main([*TINY, f"--output={tmp_path}", "--resume=auto"])
    assert {"metrics.json", "training.png", "checkpoint-00000008.pt"} <= {path.name for path in tmp_path.iterdir()}


def test_no_room_for_a_checkpoint_ends_two_ranks_with_one_line(tmp_path: Path) -> None:
    # 300 KiB: room for the first checkpoint, which has no momenta yet, and not for the next.
    limited = ["bash", "-c", 'ulimit -f 300; exec "$@"', "bash"]
    finished = jobs.run(*limited, jobs.LOCAL, 2, "launch/train.py", *TINY, f"--output={tmp_path}")
    check_said_once(finished, f"--output {tmp_path}: cannot be written", "make room", tracebacks=1)
    assert list(find_checkpoints(tmp_path)) == [0]
    assert not list(tmp_path.glob("*.tmp"))


def test_scalars_that_cannot_be_written_end_the_run_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []

    def fill_up(writer: Any, data: bytes) -> None:
        written.append(data)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", fill_up)
    assert os.strerror(errno.ENOSPC) in refuse(capsys, f"--output={tmp_path}", status=1)
    assert len(written) > 3
    assert find_checkpoints(tmp_path)


def test_whether_to_overwrite_may_change_between_a_run_and_its_continuation() -> None:
    assert Arguments(overwrite=True).contradictions(vars(Arguments())) == []
