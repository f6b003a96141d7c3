"""The wheel, in an environment where nothing else of this checkout is, runs README's code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from tests.launch import jobs

pytest.importorskip("hatchling")  # builds it

_BEFORE = """
import torch
from torch import nn

model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
_AFTER = """
from syncaccum.layer import native

for _ in range(2):
    model(torch.randn(2, 1, 8, 8)).sum().backward()
optimizer.step()
print(int(model[1].num_batches_tracked), syncaccum.__file__, native.which(), sep="\\n")
"""


def check(finished: subprocess.CompletedProcess[str]) -> str:
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From a copy: the build puts compiled passes beside their source, where other tests load them."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    ignored = shutil.ignore_patterns("__pycache__", "passes.*.so")
    shutil.copytree(jobs.CHECKOUT / "syncaccum", source / "syncaccum", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(jobs.CHECKOUT / name, source)
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    check(jobs.run("python", "-m", "pip", "wheel", *offline, "--wheel-dir", wheels, source))
    (built,) = wheels.glob("syncaccum-*.whl")
    return built


def make_environment_with(wheel: Path, folder: Path) -> Path:
    """The Python of an environment with the wheel, and with the torch that runs this test."""
    check(jobs.run("python", "-m", "venv", "--without-pip", folder))
    python = folder / "bin/python"
    check(jobs.run("python", "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel))
    (packages,) = folder.glob("lib/python*/site-packages")
    # A plain line adds a folder, but not what the .pth files in it add: so not this checkout.
    (packages / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return python


def test_the_wheel_runs_readmes_code(wheel: Path, tmp_path: Path) -> None:
    python = make_environment_with(wheel, tmp_path / "clean")
    (code,) = re.findall(r"```python\n(.*?)```", (jobs.CHECKOUT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "readme.py"
    script.write_text(_BEFORE + code + _AFTER)
    # -I: without PYTHONPATH, and without the folder that the script is in.
    batches, where, passes = check(jobs.run(python, "-I", script, folder=tmp_path)).splitlines()
    assert batches == "1"
    assert Path(where).is_relative_to(tmp_path / "clean")
    has_compiler = shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is not None
    assert passes.startswith("compiled" if has_compiler else "torch")


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist()}
    ours = {p.relative_to(jobs.CHECKOUT) for p in (jobs.CHECKOUT / "syncaccum").rglob("*") if p.is_file()}
    source = {path for path in ours if "__pycache__" not in path.parts and path.suffix != ".so"}
    assert source <= names
    assert all(path.suffix == ".so" or path.parts[0].endswith(".dist-info") for path in names - source)
