"""docker/'s scripts where no engine is: usage, and refusals that name the value and the remedy."""

from __future__ import annotations

import pytest

from tests.launch import jobs

SCRIPTS = ["run.sh", "replace_node.sh", "build.sh", "engine.sh", "base_offline.sh", "wheelhouse.sh"]
NO_ENGINE = "unix:///no/engine/listens/here"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str) -> None:
    finished = jobs.run(f"docker/{script}", "--help", DOCKER_HOST=NO_ENGINE)
    assert finished.returncode == 0
    assert finished.stdout.startswith(f"usage: {script}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "5"], "--nodes is 5: docker/compose.yaml has four, give 1 to 4"),
        (["--nodes"], "--nodes needs a value"),
        (["--rendezvous=etcd"], "--rendezvous is etcd: give static or c10d"),
        (["--ranks-per-node", "0"], "--ranks-per-node is 0: give a number"),
        (["--timeout", "1m"], "--timeout is 1m: give a number"),
        (["--timeout="], "--timeout is empty: give a number"),
        (["--colour", "red"], "--colour is not an option"),
        (["launch/train.py"], "a script comes after --"),
        (["--"], "there is no SCRIPT after --"),
    ],
)
def test_run_refuses_by_name(arguments: list[str], message: str) -> None:
    finished = jobs.run("docker/run.sh", *arguments, DOCKER_HOST=NO_ENGINE)
    assert finished.returncode == 2
    assert message in finished.stdout


@pytest.mark.parametrize("script", ["replace_node.sh", "build.sh", "engine.sh", "base_offline.sh"])
def test_there_are_no_arguments(script: str) -> None:
    finished = jobs.run(f"docker/{script}", "now", DOCKER_HOST=NO_ENGINE)
    assert finished.returncode == 2
    assert "now is not an argument" in finished.stdout


def test_wheels_for_another_python_than_3_are_refused() -> None:
    finished = jobs.run("docker/wheelhouse.sh", "2.7")
    assert finished.returncode == 2
    assert "PYTHON_VERSION is 2.7: give one such as 3.11" in finished.stdout


@pytest.mark.parametrize("script", ["run.sh", "replace_node.sh", "build.sh", "base_offline.sh"])
def test_without_an_engine_the_remedy_is_named(script: str) -> None:
    finished = jobs.run(f"docker/{script}", DOCKER_HOST=NO_ENGINE)
    assert finished.returncode == 2
    assert "no container engine answers: docker/engine.sh installs and starts one" in finished.stdout
