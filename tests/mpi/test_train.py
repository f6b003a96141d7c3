"""train.py under mpirun, with either transport, gives what it gives under torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch import warm
from tests.mpi import jobs
from tests.multinode.same_weights import read_tensors

# Six steps of six micro-batches, the same ones for 2 and for 3 ranks.
OPTIONS = [
    "--window=12",
    "--micro-batch=2",
    "--train-images=72",
    "--epochs=1",
    "--dtype=float64",
    "--normalization=renorm",
]
# Trains once for each list of options: starting ranks takes longer than training.
PROGRAM = "import sys\nfrom launch.train import main\nfor options in sys.argv[1:]: main(options.split())"


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What two ranks left."""
    output = tmp_path_factory.mktemp("torchrun")
    finished = warm.run_ranks(2, "launch/train.py", *OPTIONS, f"--output={output}")
    assert finished.returncode == 0, finished.stdout
    return read_tensors(str(output))


# Each library once: test_commit has the sums of both on any number of ranks.
@pytest.mark.parametrize(
    ("implementation", "ranks", "tolerance"),
    [
        ("openmpi", 2, 0.0),  # a sum of two terms has one order
        ("mpich", 3, 1e-12),  # float64; three ranks sum in another order, and six steps let that grow a little
    ],
)
def test_train_gives_the_same_model(
    under_torchrun: dict[str, torch.Tensor],
    tmp_path: Path,
    implementation: str,
    ranks: int,
    tolerance: float,
) -> None:
    transports = ("torch", "mpi")
    runs = [" ".join([*OPTIONS, f"--transport={name}", f"--output={tmp_path / name}"]) for name in transports]
    finished = jobs.run(implementation, ranks, "-c", PROGRAM, *runs)
    assert finished.returncode == 0, finished.stdout
    for name in transports:
        left = read_tensors(str(tmp_path / name))
        torch.testing.assert_close(left, under_torchrun, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", jobs.IMPLEMENTATIONS)
def test_a_bad_option_ends_the_job_with_one_message(implementation: str) -> None:
    finished = jobs.run(implementation, 2, "launch/train.py", "--lr=-1")
    assert finished.returncode == 2
    assert finished.stdout.count("train.py: error: --lr -1.0: give a finite number above 0") == 1


def test_the_mpi_transport_without_mpi_is_refused_by_name() -> None:
    finished = warm.run("-m", "launch.train", "--transport=mpi")
    assert finished.returncode == 2
    assert "--transport mpi: no MPI started this process; use launch/mpirun.sh, or torch" in finished.stdout
