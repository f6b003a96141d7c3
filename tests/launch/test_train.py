"""train.py from start to finish, killed and resumed, in real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.arguments import Arguments
from launch.checkpoint import find_checkpoints, load_checkpoint
from launch.train import main
from tests.launch import jobs, warm

TRAIN = "launch/train.py"
# Two epochs of eight steps, and a checkpoint after each of them.
SHORT = Arguments(window=16, train_images=120, epochs=2, checkpoint_every=1)
# Two epochs of four steps of four micro-batches, the same ones for 1, 2 and 4 ranks.
# Under "window" a rank looks at its own micro-batches: other ranks train differently.
ELASTIC = Arguments(window=16, train_images=64, epochs=2, checkpoint_every=1, dtype="float64", normalization="renorm")


def make_options(output: Path, arguments: Arguments = SHORT) -> list[str]:
    return [
        f"--window={arguments.window}",
        f"--train-images={arguments.train_images}",
        f"--epochs={arguments.epochs}",
        f"--checkpoint-every={arguments.checkpoint_every}",
        f"--dtype={arguments.dtype}",
        f"--normalization={arguments.normalization}",
        f"--output={output}",
    ]


def read_checkpoint(output: Path, arguments: Arguments = SHORT) -> dict[str, Any]:
    state = load_checkpoint(output, arguments)
    assert state is not None
    return state


def wait_for_step(output: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while count_steps(output) < step:
        assert time.monotonic() < deadline, f"no checkpoint of step {step} came"
        time.sleep(0.005)


def count_steps(output: Path) -> int:
    """Optimizer steps behind the newest checkpoint."""
    return next(iter(find_checkpoints(output)), -1)


def read_steps(output: Path, scalar: str) -> list[int]:
    """The steps at which TensorBoard shows a scalar."""
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    return [event.step for event in events.Scalars(scalar)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two ranks that nobody disturbed."""
    output = tmp_path_factory.mktemp("uninterrupted")
    finished = jobs.run(jobs.LOCAL, 2, TRAIN, *make_options(output))
    assert finished.returncode == 0, finished.stdout
    (output / "console.txt").write_text(finished.stdout)
    return output


def test_a_run_leaves_metrics_plot_scalars_and_table(uninterrupted: Path) -> None:
    metrics = json.loads((uninterrupted / "metrics.json").read_text())
    assert (metrics["ranks"], metrics["steps"]) == (2, 16)
    assert metrics["arguments"]["window"] == 16
    assert len(metrics["history"]) == 2
    assert metrics["test_accuracy"] == metrics["history"][-1]["test_accuracy"]
    assert (uninterrupted / "training.png").read_bytes().startswith(b"\x89PNG")
    assert f"{metrics['test_accuracy']:.2%}" in (uninterrupted / "console.txt").read_text()
    assert read_steps(uninterrupted, "step/train_loss") == list(range(1, 17))
    assert read_steps(uninterrupted, "epoch/test_accuracy") == [8, 16]


def test_a_run_killed_in_the_middle_and_resumed_equals_an_undisturbed_one(uninterrupted: Path, tmp_path: Path) -> None:
    options = make_options(tmp_path)
    with warm.started_ranks(2, TRAIN, *options):
        wait_for_step(tmp_path, 3)
    assert 3 <= count_steps(tmp_path) < 16  # leaving the block was SIGKILL, somewhere in the midst of a step
    with warm.started_ranks(2, TRAIN, *options, "--resume") as ranks:
        assert [rank.wait(timeout=180) for rank in ranks] == [0, 0]
    assert_same_run(tmp_path, uninterrupted)
    assert read_steps(tmp_path, "step/train_loss") == list(range(1, 17))


def test_a_job_whose_launcher_restarts_it_goes_on_by_itself(uninterrupted: Path, tmp_path: Path) -> None:
    command = [jobs.LOCAL, "2", TRAIN, *make_options(tmp_path), "--resume=auto"]
    with jobs.started(command, PET_MAX_RESTARTS="1") as launcher:
        wait_for_step(tmp_path, 3)
        os.kill(jobs.find_children(launcher.pid)[0], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, output
    assert "exitcode: -9" in output
    assert_same_run(tmp_path, uninterrupted)


def assert_same_run(output: Path, expected: Path) -> None:
    ours, theirs = read_checkpoint(output), read_checkpoint(expected)
    assert ours["progress"]["history"] == theirs["progress"]["history"]
    assert ours["learner"]["model"].keys() == theirs["learner"]["model"].keys()
    for name, value in theirs["learner"]["model"].items():
        assert torch.equal(ours["learner"]["model"][name], value), name
    for index, state in theirs["learner"]["optimizer"]["state"].items():
        momentum = ours["learner"]["optimizer"]["state"][index]["momentum_buffer"]
        assert torch.equal(momentum, state["momentum_buffer"])


@pytest.fixture(scope="module")
def undisturbed_and_killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The outputs of two ranks that ran to the end, and of two that were killed on the way."""
    undisturbed, killed = tmp_path_factory.mktemp("undisturbed"), tmp_path_factory.mktemp("killed")
    finished = warm.run_ranks(2, TRAIN, *make_options(undisturbed, ELASTIC))
    assert finished.returncode == 0, finished.stdout
    with warm.started_ranks(2, TRAIN, *make_options(killed, ELASTIC)):
        wait_for_step(killed, 3)
    assert 3 <= count_steps(killed) < 8
    return undisturbed, killed


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_goes_on_with_fewer_or_more_ranks(
    undisturbed_and_killed: tuple[Path, Path], tmp_path: Path, ranks: int
) -> None:
    undisturbed, killed = undisturbed_and_killed
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    with warm.started_ranks(ranks, TRAIN, *make_options(tmp_path, ELASTIC), "--resume") as processes:
        assert [process.wait(timeout=180) for process in processes] == [0] * ranks
    assert json.loads((tmp_path / "metrics.json").read_text())["ranks"] == ranks
    ours, theirs = (read_checkpoint(output, ELASTIC) for output in (tmp_path, undisturbed))
    assert ours["progress"]["total_steps"] == 8
    # Only the order of summation over ranks differs, by float64's 1e-16; some steps amplify that.
    torch.testing.assert_close(ours["learner"]["model"], theirs["learner"]["model"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        ours["learner"]["optimizer"]["state"], theirs["learner"]["optimizer"]["state"], rtol=1e-12, atol=1e-12
    )


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_and_no_more(
    uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    newest, before, *_ = find_checkpoints(tmp_path).values()
    newest.write_bytes(newest.read_bytes()[:1000])
    finished = warm.run_ranks(2, TRAIN, *make_options(tmp_path), "--resume=auto")
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.count(f"{newest} is damaged (its checksum is wrong); going on from {before.name}") == 1
    assert_same_run(tmp_path, uninterrupted)
    assert len(find_checkpoints(tmp_path)) == SHORT.keep_checkpoints


def test_resuming_with_other_arguments_is_refused_by_name(uninterrupted: Path) -> None:
    finished = warm.run("-m", "launch.train", "--resume", "--lr=0.2", *make_options(uninterrupted))
    assert finished.returncode == 2
    assert "--lr is 0.2, the checkpoint's is 0.1" in finished.stdout


def test_a_diverging_run_says_so_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--lr=1e30", *make_options(tmp_path)])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "training diverged at step" in error
    assert "Lower --lr 1e+30" in error


def test_a_single_process_learns_and_may_go_on_later(tmp_path: Path) -> None:
    options = ["--model=mlp", "--micro-batch=16", f"--output={tmp_path}"]
    main([*options, "--epochs=1"])
    main([*options, "--epochs=2", "--resume"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["history"]) == 2
    assert metrics["test_accuracy"] > 0.9
