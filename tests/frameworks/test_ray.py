"""Ray Train: the script runs as a newcomer runs it, with two workers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.frameworks.test_examples import LEARNT
from tests.launch.jobs import CHECKOUT, started

# Ray starts a dozen processes; a busy machine took four minutes for what takes twenty seconds.
_PATIENCE = 500


@pytest.mark.timeout(_PATIENCE + 60)
def test_two_workers_learn(tmp_path: Path) -> None:
    shutil.copy(CHECKOUT / "launch" / "ray_train.py", tmp_path)
    # Its results are in the home folder.
    told = {"PYTHONPATH": str(CHECKOUT), "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    patient = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_PATIENCE)}
    command = ["python", "ray_train.py", "--workers", "2", "--epochs", "2"]
    with started(command, folder=tmp_path, **told, **patient) as script:
        output, _ = script.communicate(timeout=_PATIENCE)
    assert script.returncode == 0, output
    assert "'syncaccum/ranks': 2" in output, output
    (accuracy,) = re.findall(r"^test accuracy ([\d.]+)%", output, re.MULTILINE)
    assert float(accuracy) / 100 > LEARNT, output


def test_the_script_is_short() -> None:
    assert len((CHECKOUT / "launch" / "ray_train.py").read_text().splitlines()) <= 60
