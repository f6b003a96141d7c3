"""The doctor as users run it: healthy jobs, and each of the usual mistakes, made for real."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import doctor_jobs
from tests.launch.jobs import CHECKOUT, make_environment

ALTERED = ("-m", "tests.launch.altered_doctor")
# Where some ranks arrive and others do not; they take some 3 s to start on a busy machine.
SHORT = ("--timeout", 8)
# Where nobody is to arrive.
SHORTEST = ("--timeout", 2)


def test_a_healthy_job_is_reported_once_as_json() -> None:
    finished = doctor_jobs.torchrun(2, "--json", "--model", "tests.launch.factories:alike", GLOO_SOCKET_IFNAME="lo")
    assert finished.status == 0, finished.stderr
    report = finished.report
    assert report["healthy"]
    assert report["findings"] == []
    assert [r["rank"] for r in report["ranks"]] == [0, 1]
    for rank in report["ranks"]:
        assert (rank["host"], rank["address"], rank["interface"]) == (socket.gethostname(), "127.0.0.1", "lo")
        assert rank["backend"] == "gloo"
        assert rank["python"] == ".".join(map(str, sys.version_info[:3]))
        assert 0 <= rank["commit_errors"]["gloo"] <= report["commit_tolerance"]
    assert report["layers"] == {"count": 2, "channels": 10}


def test_a_healthy_job_is_a_table_for_people() -> None:
    finished = doctor_jobs.torchrun(2)
    assert finished.status == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[0] == "syncaccum doctor: 2 of 2 rank(s), on 1 node(s), gloo"
    assert [line.split()[0] for line in lines[1:4]] == ["rank", "0", "1"]
    assert sum(line.startswith("commit over gloo: as nn.BatchNorm") for line in lines) == 1
    assert lines[-1] == "no problem found"


def test_alone_it_looks_at_this_machine() -> None:
    finished = subprocess.run(
        [sys.executable, *doctor_jobs.DOCTOR],
        capture_output=True,
        text=True,
        check=False,
        cwd=CHECKOUT,
        env=make_environment(),
    )
    assert finished.returncode == 0, finished.stderr
    assert "this process is alone" in finished.stdout


def test_an_unknown_interface_is_found_before_gloo_aborts() -> None:
    finished = doctor_jobs.torchrun(2, "--json", GLOO_SOCKET_IFNAME="nonesuch0")
    assert finished.status == 1
    (problem,) = finished.problems()
    assert problem["what"] == "GLOO_SOCKET_IFNAME names 'nonesuch0': this machine has no such interface"
    assert "lo (127.0.0.1)" in problem["remedy"]
    assert problem["ranks"] == [0, 1]


def test_unequal_versions() -> None:
    finished, _ = doctor_jobs.ranks([{}, {}], "versions", 1, "--json", module=ALTERED)
    assert finished.status == 1
    said = [problem["what"] for problem in finished.problems()]
    versions = {"python": "3.9.1", "torch": "2.6.0", "syncaccum": "0.0.1"}
    assert len(said) == len(versions)
    for (name, version), what in zip(versions.items(), said, strict=True):
        assert what.startswith(f"versions of {name} differ: ")
        assert f" on rank 0, {version} on rank 1; " in what


def test_a_note_of_another_program_is_refused() -> None:
    first, _ = doctor_jobs.ranks([{}, {}], "note", 1, *SHORT, "--json", module=ALTERED)
    assert first.status == 1
    (problem,) = first.problems()
    assert problem["what"].startswith("the store has a note in this rank's place that is not this doctor's: ")
    assert "MASTER_PORT" in problem["remedy"]
    assert problem["ranks"] == [1]
    assert first.stderr == ""


def test_wrong_sums_are_found() -> None:
    finished, _ = doctor_jobs.ranks([{}, {}], "sums", 1, "--json", module=ALTERED)
    assert finished.status == 1
    (problem,) = finished.problems()
    assert problem["what"].startswith("a commit over gloo is wrong")
    assert problem["ranks"] == [1]


def test_models_that_differ_are_named_by_layer_and_ranks() -> None:
    finished, _ = doctor_jobs.ranks([{}, {}], "--json", "--model", "tests.launch.factories:wider_on_rank_1")
    assert finished.status == 1
    (problem,) = finished.problems()
    assert "rank 0 has '3' (6 channels" in problem["what"]
    assert "rank 1 has '3' (7 channels" in problem["what"]


def test_a_factory_that_fails_on_one_rank_is_named_with_it() -> None:
    finished, _ = doctor_jobs.ranks([{}, {}], "--json", "--model", "tests.launch.factories:failing_on_rank_1")
    assert finished.status == 1
    (problem,) = finished.problems()
    assert "FileNotFoundError: no weights here" in problem["what"]
    assert problem["ranks"] == [1]


def test_a_taken_port_is_named_by_rank_0_and_every_rank_ends() -> None:
    with socket.create_server(("", 0)) as taken:  # accepts, and never answers
        port = str(taken.getsockname()[1])
        first, second = doctor_jobs.ranks([{"MASTER_PORT": port}, {"MASTER_PORT": port, "LOCAL_RANK": "0"}], *SHORTEST)
    assert (first.status, second.status) == (1, 1)
    assert f"cannot open the store on port {port}" in first.stdout
    assert "the port is taken" in first.stdout
    assert second.stdout == ""
    assert "but it is no store of torch" in second.stderr


def test_missing_ranks_are_counted_and_named() -> None:
    here = {"WORLD_SIZE": "4"}
    first, second = doctor_jobs.ranks([here, {**here, "RANK": "2"}], *SHORT)
    assert (first.status, second.status) == (1, 1)
    assert "2 of 4 ranks arrived within 8 s; ranks 1, 3 missing" in first.stdout


def test_without_rank_0_each_node_says_that_no_store_answers() -> None:
    variables = [
        {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "3"},
        {"RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "3"},
    ]
    spoke, silent = doctor_jobs.ranks(variables, *SHORTEST)
    assert (spoke.status, silent.status) == (1, 1)
    assert "no store answers at 127.0.0.1:" in spoke.stderr
    assert spoke.stdout == silent.stdout == silent.stderr == ""


def test_a_rank_that_two_processes_have() -> None:
    first, *others = doctor_jobs.ranks([{}, {}, {"RANK": "1"}], *SHORT, "--json")
    assert first.status == 1
    (problem,) = first.problems()
    assert problem["what"] == "more than one process says that it is rank 1"
    assert [other.status for other in others] == [1, 1]


def test_world_sizes_that_differ() -> None:
    first, second = doctor_jobs.ranks([{}, {"WORLD_SIZE": "3"}], *SHORT, "--json")
    assert (first.status, second.status) == (1, 1)
    (problem,) = first.problems()
    assert problem["what"] == "WORLD_SIZE differs: 2 on rank 0, 3 on rank 1"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE not set"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 1"),
        ({"RANK": "first"}, "RANK is 'first', not a number"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', not a number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
    ],
)
def test_variables_that_cannot_be(variables: dict[str, str], message: str) -> None:
    (finished,) = doctor_jobs.ranks([{"LOCAL_RANK": "0", **variables}])
    assert finished.status == 1
    assert message in finished.stdout + finished.stderr


def test_a_master_that_does_not_resolve() -> None:
    (finished,) = doctor_jobs.ranks(
        [{"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x.invalid"}], *SHORTEST
    )
    assert finished.status == 1
    assert "MASTER_ADDR is 'x.invalid', which does not resolve" in finished.stderr


@pytest.mark.parametrize("fate", ["killed", "stopped"])
def test_a_rank_lost_in_the_commit_is_named(fate: str) -> None:
    first, lost, third = doctor_jobs.ranks([{}, {}, {}], fate, 1, *SHORT, "--json", module=ALTERED, wait_for=[0, 2])
    assert (first.status, third.status) == (1, 1)
    assert lost.status < 0
    silent, *broken = first.problems()
    assert silent["what"] == "rank 1 fell silent while the group was measured"
    assert {rank for problem in broken for rank in problem["ranks"]} == {0, 2}
    assert all(problem["what"].startswith("the group broke while it was measured") for problem in broken)


# --- nodes of their own, in network namespaces ------------------------------------------------------------------

_NODES = """
set -e
mount -t tmpfs none /run
hostname node-a
printf "$HOSTS" > "$FOLDER/hosts"
mount --bind "$FOLDER/hosts" /etc/hosts
ip link set lo up
ip netns add b
ip -n b link set lo up
ip link add va type veth peer name vb netns b
ip address add 10.77.0.1/24 dev va
ip link set va up
ip -n b address add 10.77.0.2/24 dev vb
ip -n b link set vb up
# gloo lets the rank with the higher address connect, so this one must be below b's
ip link add apart type veth peer name other
ip address add 10.76.0.1/24 dev apart
ip link set apart up
ip link set other up
ip link add idle type veth peer name nothing
export WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=10.77.0.1 MASTER_PORT=29500
RANK=1 GLOO_SOCKET_IFNAME=$SECOND ip netns exec b "$@" > /dev/null 2> "$FOLDER/second" &
status=0
RANK=0 GLOO_SOCKET_IFNAME=$FIRST "$@" || status=$?
wait $! || exit 3
exit $status
"""
_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--uts", "--mount")


def run_on_two_nodes(folder: Path, hosts: str, interfaces: tuple[str, str]) -> doctor_jobs.Outcome:
    """The doctor on two nodes of one rank each; skips where the system gives users no namespaces."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*_UNSHARE, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this system does not let this user make namespaces")
    finished = subprocess.run(
        [*_UNSHARE, "bash", "-c", _NODES, "nodes", sys.executable, *doctor_jobs.DOCTOR, *map(str, SHORT), "--json"],
        cwd=CHECKOUT,
        env={
            **make_environment(FOLDER=str(folder), HOSTS=hosts, FIRST=interfaces[0], SECOND=interfaces[1]),
            "PATH": f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    return doctor_jobs.Outcome(finished.returncode, finished.stdout, finished.stderr)


LOOPBACK = "127.0.0.1 localhost\\n127.0.1.1 node-a\\n"


def test_a_hostname_that_resolves_to_loopback(tmp_path: Path) -> None:
    finished = run_on_two_nodes(tmp_path, LOOPBACK, ("", ""))
    assert finished.status == 3, finished.stderr  # the second node's exit was non-zero, too
    (problem,) = finished.problems()
    assert problem["what"].startswith("node-a will listen on 127.0.1.1 (hostname 'node-a' resolves to it)")
    assert "set GLOO_SOCKET_IFNAME" in problem["remedy"]


def test_the_remedy_for_that_works(tmp_path: Path) -> None:
    finished = run_on_two_nodes(tmp_path, LOOPBACK, ("va", "vb"))
    assert finished.status == 0, finished.stdout + finished.stderr
    first, second = finished.report["ranks"]
    assert (first["address"], first["interface"]) == ("10.77.0.1", "va")
    assert (second["address"], second["interface"]) == ("10.77.0.2", "vb")


def test_a_hostname_that_does_not_resolve(tmp_path: Path) -> None:
    finished = run_on_two_nodes(tmp_path, "127.0.0.1 localhost\\n", ("", "vb"))
    assert finished.status == 3, finished.stderr
    (problem,) = finished.problems()
    assert "the hostname 'node-a' does not resolve" in problem["what"]
    assert problem["ranks"] == [0]


def test_an_interface_without_address(tmp_path: Path) -> None:
    finished = run_on_two_nodes(tmp_path, LOOPBACK, ("idle", "vb"))
    assert finished.status == 3, finished.stderr
    (problem,) = finished.problems()
    assert problem["what"].startswith("GLOO_SOCKET_IFNAME names 'idle': gloo cannot use that interface")
    assert "va (10.77.0.1)" in problem["remedy"]
    assert problem["ranks"] == [0]


def test_an_interface_that_the_other_node_does_not_reach(tmp_path: Path) -> None:
    finished = run_on_two_nodes(tmp_path, LOOPBACK, ("apart", "vb"))
    assert finished.status == 3, finished.stderr
    problems = finished.problems()
    assert {rank for problem in problems for rank in problem["ranks"]} == {0, 1}
    assert all("could not connect to each other" in problem["what"] for problem in problems)
    assert "node-a on 10.76.0.1 (apart)" in problems[0]["remedy"]
