"""train.py under mpirun, with either transport, gives what it gives under torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch import jobs as processes
from tests.mpi import jobs
from tests.multinode.same_weights import read_tensors

OPTIONS = ["--window=16", "--train-images=96", "--epochs=1", "--dtype=float64"]


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, torch.Tensor]]:
    """What the trained run left, by number of ranks."""
    models = {}
    for ranks in (2, 3):
        output = tmp_path_factory.mktemp("torchrun")
        finished = processes.run(processes.LOCAL, ranks, "launch/train.py", *OPTIONS, f"--output={output}")
        assert finished.returncode == 0, finished.stdout
        models[ranks] = read_tensors(str(output))
    return models


@pytest.mark.parametrize(
    ("transport", "ranks", "tolerance"),
    [
        ("torch", 2, 0.0),  # a sum of two terms has one order
        ("mpi", 2, 0.0),
        ("mpi", 3, 1e-12),  # float64; libraries add three in different orders, and six steps let that grow a little
    ],
)
@pytest.mark.parametrize("implementation", jobs.IMPLEMENTATIONS)
def test_train_gives_the_same_model(
    under_torchrun: dict[int, dict[str, torch.Tensor]],
    tmp_path: Path,
    implementation: str,
    transport: str,
    ranks: int,
    tolerance: float,
) -> None:
    options = [*OPTIONS, f"--transport={transport}", f"--output={tmp_path}"]
    finished = jobs.run(implementation, ranks, "launch/train.py", *options)
    assert finished.returncode == 0, finished.stdout
    torch.testing.assert_close(read_tensors(str(tmp_path)), under_torchrun[ranks], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", jobs.IMPLEMENTATIONS)
def test_a_bad_option_ends_the_job_with_one_message(implementation: str) -> None:
    finished = jobs.run(implementation, 2, "launch/train.py", "--lr=-1")
    assert finished.returncode == 2
    assert finished.stdout.count("train.py: error: --lr -1.0: give a finite number above 0") == 1


def test_the_mpi_transport_without_mpi_is_refused_by_name() -> None:
    finished = processes.run("python", "-m", "launch.train", "--transport=mpi")
    assert finished.returncode == 2
    assert "--transport mpi: no MPI started this process; use launch/mpirun.sh, or torch" in finished.stdout
