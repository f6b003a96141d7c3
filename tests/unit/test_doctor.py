"""The doctor's judgement, and what it makes of a machine's resolver, without processes."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch

from syncaccum.doctor.clock import Skew
from syncaccum.doctor.facts import Facts, gather_facts
from syncaccum.doctor.findings import Finding, ProblemError, name_ranks, sort_findings
from syncaccum.doctor.judgement import can_use_gpus, judge_facts, judge_measurements
from syncaccum.doctor.known_answer import TOLERANCE, measure_commit_error
from syncaccum.doctor.measurement import Measurement
from syncaccum.doctor.network import find_endpoint
from syncaccum.doctor.placement import Placement, locate
from syncaccum.doctor.report import Report, render_json, render_text


def make_facts(*changes: dict[str, Any]) -> list[Facts]:
    """One rank for each, as on a node of its own that all others reach."""
    size = len(changes)
    usual = dataclasses.replace(
        gather_facts(Placement()), size=size, address="10.0.0.1", is_loopback=False, gpus=0, findings=()
    )
    return [
        dataclasses.replace(usual, **{"rank": rank, "network": f"node {rank}", **change})
        for rank, change in enumerate(changes)
    ]


def judge(facts: list[Facts], size: int | None = None) -> list[Finding]:
    return judge_facts(facts, len(facts) if size is None else size, [], 60.0)


def resolve_to(*addresses: str) -> Any:
    return lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]


@pytest.mark.parametrize(
    ("ranks", "name"),
    [([3], "rank 3"), ([2, 0], "ranks 0, 2"), ([5, 3, 4, 0], "ranks 0, 3-5"), (range(9), "ranks 0-8")],
)
def test_ranks_are_named_in_short(ranks: Any, name: str) -> None:
    assert name_ranks(ranks) == name


def test_findings_that_differ_only_in_ranks_become_one_and_the_worst_comes_first() -> None:
    warning, problem = Finding("warning", "a", "b", (1,)), Finding("problem", "c", "d", (2,))
    merged = sort_findings([warning, problem, dataclasses.replace(problem, ranks=(0,))])
    assert merged == [dataclasses.replace(problem, ranks=(0, 2)), warning]


def test_equal_ranks_have_no_findings() -> None:
    assert judge(make_facts({}, {}, {})) == []


@pytest.mark.parametrize("name", ["torch", "syncaccum", "cuda", "nccl", "mpi"])
def test_each_version_is_compared(name: str) -> None:
    (finding,) = judge(make_facts({}, {name: "0.0"}, {}))
    assert finding.severity == "problem"
    assert finding.what.startswith(f"versions of {name} differ: ")
    assert "on ranks 0, 2, 0.0 on rank 1; " in finding.what


def test_patch_releases_of_python_may_differ() -> None:
    assert judge(make_facts({"python": "3.11.2"}, {"python": "3.11.9"})) == []
    assert len(judge(make_facts({"python": "3.11.2"}, {"python": "3.12.2"}))) == 1


def test_loopback_is_a_problem_only_between_nodes() -> None:
    loopback = {"address": "127.0.1.1", "is_loopback": True}
    assert judge(make_facts({**loopback, "network": "one"}, {**loopback, "network": "one"})) == []
    (finding,) = judge(make_facts({}, loopback))
    assert (finding.severity, finding.ranks) == ("problem", (1,))


def test_gpus_are_used_if_every_rank_has_one() -> None:
    assert can_use_gpus(make_facts({"gpus": 2, "local_size": 2}, {"gpus": 2, "local_size": 2}))
    assert not can_use_gpus(make_facts({}, {}))
    few = make_facts({"gpus": 1, "local_size": 2}, {"gpus": 2, "local_size": 2})
    assert not can_use_gpus(few)
    (finding,) = judge(few)
    assert (finding.severity, finding.ranks) == ("warning", (0,))
    assert "1 GPUs for 2 ranks" in finding.what


def test_skew_counts_beyond_its_bound() -> None:
    measured = {0: Measurement(), 1: Measurement(skew=Skew(-1.5, 0.6)), 2: Measurement(skew=Skew(-1.5, 0.1))}
    (finding,) = judge_measurements(measured, 3, None)
    assert (finding.severity, finding.ranks) == ("warning", (2,))
    assert "1.5 s behind rank 0's" in finding.what


def test_silent_ranks_are_named() -> None:
    (finding,) = judge_measurements({0: Measurement()}, 3, None)
    assert (finding.severity, finding.ranks) == ("problem", (1, 2))


def test_the_first_address_of_this_machine_counts() -> None:
    # 192.0.2.0/24 is for documentation: no machine has an address of it.
    endpoint, findings = find_endpoint({}, resolve_to("192.0.2.77", "127.0.1.1", "127.0.0.1"))
    assert endpoint.address == "127.0.1.1"
    assert endpoint.is_loopback
    assert findings == []


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces are looked up as Linux tells them")
def test_any_loopback_address_is_the_loopback_interface() -> None:
    endpoint, _ = find_endpoint({}, resolve_to("127.0.1.1"))
    assert endpoint.interface == "lo"
    assert find_endpoint({"GLOO_SOCKET_IFNAME": "lo"})[0].address == "127.0.0.1"


def test_a_hostname_of_another_machine_falls_back_to_loopback() -> None:
    endpoint, (finding,) = find_endpoint({}, resolve_to("192.0.2.77"))
    assert endpoint.is_loopback
    assert finding.severity == "warning"
    assert "resolves to 192.0.2.77, which is no address of this machine" in finding.what


def test_a_hostname_that_does_not_resolve_falls_back_to_loopback() -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    endpoint, (finding,) = find_endpoint({}, fail)
    assert endpoint.is_loopback
    assert "does not resolve" in finding.what


def test_every_named_interface_must_be_there() -> None:
    _, findings = find_endpoint({"GLOO_SOCKET_IFNAME": "lo,nonesuch0"})
    assert [finding.what for finding in findings] == [
        "GLOO_SOCKET_IFNAME names 'nonesuch0': this machine has no such interface"
    ]


def test_without_a_launcher_the_process_is_alone() -> None:
    assert locate({}) == Placement()


def test_local_ranks_without_number_are_on_one_node() -> None:
    placement = locate({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5"})
    assert (placement.local_rank, placement.local_size, placement.speaks) == (1, 2, True)


def test_more_local_ranks_than_ranks_are_refused() -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5", "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(ProblemError, match="LOCAL_WORLD_SIZE is 4, more than WORLD_SIZE 2"):
        locate(variables)


def test_a_commit_of_one_process_has_its_known_answer() -> None:
    assert measure_commit_error(None, 0, 1, torch.device("cpu"), 10.0) < TOLERANCE


def test_facts_and_measurements_survive_json() -> None:
    facts = dataclasses.replace(gather_facts(Placement()), findings=(Finding("warning", "a", "b", (0,)),))
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    measured = Measurement(skew=Skew(1.0, 2.0), commit_errors={"gloo": 0.5})
    assert Measurement.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_a_report_of_nothing_can_be_rendered() -> None:
    report = Report(timeout=1.0, default_timeout=2.0)
    report.add([Finding("problem", "what", "do this")])
    assert not json.loads(render_json(report))["healthy"]
    assert render_text(report).endswith("PROBLEM: what\n    remedy: do this")


def test_the_package_does_not_import_the_doctor() -> None:
    code = "import sys, syncaccum; sys.exit(any('doctor' in name or 'mpi4py' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
