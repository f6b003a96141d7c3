"""The examples run as a newcomer runs them: copied to an empty folder, alone and on two ranks.

Each is run once by python, and by torchrun; what needs more runs has them from `warm`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import jobs, warm
from tests.mpi import jobs as mpi_jobs

EXAMPLES = jobs.CHECKOUT / "launch" / "examples"
# 96 to 97.5 % are seen after three epochs. One run's chance is 0.9 points for 360 images; this is four below.
LEARNT = 0.93


def run(folder: Path, ranks: int, script: str, *options: object) -> str:
    """What an example prints that was copied to a folder and runs there."""
    shutil.copy(EXAMPLES / script, folder)
    launcher = ["python"] if ranks == 1 else [jobs.CHECKOUT / jobs.LOCAL, ranks]
    return check(jobs.run(*launcher, script, *options, folder=folder))


def run_again(folder: Path, ranks: int, script: str, *options: object) -> str:
    """As `run`, without the start of Python and of a launcher."""
    shutil.copy(EXAMPLES / script, folder)
    finished = (
        warm.run(script, *options, folder=folder)
        if ranks == 1
        else warm.run_ranks(ranks, script, *options, folder=folder)
    )
    return check(finished)


def check(finished: subprocess.CompletedProcess[str]) -> str:
    """The output of a run that must have ended well, without a word more than its own."""
    assert finished.returncode == 0, finished.stdout
    lines = finished.stdout.splitlines()
    assert all(re.match(r"epoch \d of \d|test accuracy", line) for line in lines), finished.stdout
    return finished.stdout


def read_accuracy(printed: str) -> float:
    (accuracy,) = re.findall(r"^test accuracy ([\d.]+)%", printed, re.MULTILINE)
    return float(accuracy) / 100


def load_checkpoint(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "digits.pt", weights_only=True)
    return state


@pytest.mark.parametrize("script", ["train.py", "exact.py", "mpi.py"])
def test_an_example_is_short_and_needs_no_other_file(script: str) -> None:
    text = (EXAMPLES / script).read_text()
    assert len(text.splitlines()) < 80
    assert not re.search(r"^\s*(from|import) (\.|launch|tests|benchmarks)", text, re.MULTILINE)


@pytest.mark.parametrize("ranks", [1, 2])
def test_train_learns_and_goes_on_as_if_it_had_never_stopped(tmp_path: Path, ranks: int) -> None:
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    undisturbed.mkdir()
    resumed.mkdir()
    printed = run(undisturbed, ranks, "train.py")
    assert read_accuracy(printed) > LEARNT
    assert re.findall(r"^epoch (\d)", printed, re.MULTILINE) == ["1", "2", "3"]
    run_again(resumed, ranks, "train.py", "--epochs", 1)
    again = run_again(resumed, ranks, "train.py")
    assert re.findall(r"^epoch (\d)", again, re.MULTILINE) == ["2", "3"]
    assert load_checkpoint(resumed)["epochs"] == 3
    expected = load_checkpoint(undisturbed)
    if ranks == 1:
        torch.testing.assert_close(load_checkpoint(resumed), expected, rtol=0, atol=0)
    else:
        # Two ranks go on with the mean of what their last windows were worth to each.
        assert read_accuracy(again) == pytest.approx(read_accuracy(printed), abs=0.02)
    assert int(expected["model"]["1.num_batches_tracked"]) == 3 * 23  # one commit for each step of 64 of 1437 images


def test_train_started_again_keeps_its_checkpoint(tmp_path: Path) -> None:
    first = run_again(tmp_path, 1, "train.py", "--epochs", 1)
    written = (tmp_path / "digits.pt").read_bytes()
    assert run_again(tmp_path, 1, "train.py", "--epochs", 1) == first.replace("epoch 1 of 1\n", "")
    assert (tmp_path / "digits.pt").read_bytes() == written


def test_exact_trains_the_network_of_the_large_batch_however_it_is_split(tmp_path: Path) -> None:
    losses = []
    for ranks, micro_batch in ((1, 64), (1, 4), (2, 5)):
        start = run_again if ranks == 1 else run
        printed = start(tmp_path, ranks, "exact.py", "--float64", "--micro-batch", micro_batch)
        assert read_accuracy(printed) > LEARNT
        (loss,) = re.findall(r"test loss ([\d.]+)", printed)
        losses.append(float(loss))
    # float64: sums in another order differ by 1e-16, and 69 steps let that grow; without lockstep it is 3e-3 and more.
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-10)


def test_exact_learns_in_float32(tmp_path: Path) -> None:
    assert read_accuracy(run(tmp_path, 1, "exact.py")) > LEARNT


@pytest.mark.parametrize("implementation", mpi_jobs.IMPLEMENTATIONS)
def test_mpi_learns_on_two_ranks(implementation: str) -> None:
    printed = check(mpi_jobs.run(implementation, 2, "launch/examples/mpi.py"))
    assert read_accuracy(printed) > LEARNT
    assert "on 2 rank(s)" in printed


def test_mpi_runs_alone_without_mpirun(tmp_path: Path) -> None:
    assert read_accuracy(run(tmp_path, 1, "mpi.py")) > LEARNT
