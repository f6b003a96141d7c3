"""Ray Train: the script runs as a newcomer runs it, with two workers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.frameworks.test_examples import LEARNT
from tests.launch.jobs import CHECKOUT, run


def test_two_workers_learn(tmp_path: Path) -> None:
    script = CHECKOUT / "launch" / "ray_train.py"
    assert len(script.read_text().splitlines()) <= 60
    shutil.copy(script, tmp_path)
    # Its results are in the home folder.
    told = {"PYTHONPATH": str(CHECKOUT), "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    finished = run("python", "ray_train.py", "--workers", 2, "--epochs", 2, folder=tmp_path, **told)
    assert finished.returncode == 0, finished.stdout
    assert "'syncaccum/ranks': 2" in finished.stdout, finished.stdout
    (accuracy,) = re.findall(r"^test accuracy ([\d.]+)%", finished.stdout, re.MULTILINE)
    assert float(accuracy) / 100 > LEARNT, finished.stdout
