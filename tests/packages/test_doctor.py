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

from syncaccum.doctor.judgement import choose_backend, judge_arrivals, judge_facts
from syncaccum.doctor.launcher import locate
from syncaccum.doctor.machine import find_address, gather_facts
from syncaccum.doctor.measurement import TOLERANCE, measure_commit_error
from syncaccum.doctor.rank import Finding, ProblemError, Rank, name_ranks, read_rank, sort_findings
from syncaccum.doctor.report import Report


def make_ranks(*changes: dict[str, Any]) -> list[Rank]:
    """One rank for each, as on a node of its own that all others reach."""
    usual = Rank()
    gather_facts(usual)
    usual = dataclasses.replace(
        usual,
        size=len(changes),
        launcher="variables",
        address="10.0.0.1",
        is_loopback=False,
        gpus=0,
        nccl="",
        findings=[],
    )
    return [
        dataclasses.replace(usual, **{"rank": rank, "network": f"node {rank}", **change})
        for rank, change in enumerate(changes)
    ]


def judge(ranks: list[Rank]) -> list[Finding]:
    return list(judge_facts(ranks))


def find_by(monkeypatch: pytest.MonkeyPatch, interfaces: str = "", resolve: Any = None) -> Rank:
    """What a rank finds with GLOO_SOCKET_IFNAME or with this resolver."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interfaces)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    us = Rank()
    find_address(us)
    return us


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
    assert judge(make_ranks({}, {}, {})) == []


@pytest.mark.parametrize(
    ("name", "consequence"),
    [
        ("python", "objects pickled by one may not load in the other"),
        ("torch", "collectives of one build may not understand the other's, and hang"),
        ("syncaccum", "the messages of a commit may differ"),
        ("cuda", "NCCL and kernels differ between builds"),
        ("nccl", "NCCL's protocol differs between versions, and ranks hang or abort"),
        ("mpi", "the ranks cannot speak to each other"),
    ],
)
def test_each_version_is_compared(name: str, consequence: str) -> None:
    (finding,) = judge(make_ranks({}, {name: "0.0"}, {}))
    assert finding.severity == "problem"
    assert finding.what.startswith(f"versions of {name} differ: ")
    assert finding.what.endswith(f"on ranks 0, 2, 0.0 on rank 1; {consequence}")


def test_patch_releases_of_python_may_differ() -> None:
    assert judge(make_ranks({"python": "3.11.2"}, {"python": "3.11.9"})) == []
    assert len(judge(make_ranks({"python": "3.11.2"}, {"python": "3.12.2"}))) == 1


def test_loopback_is_a_problem_only_between_nodes() -> None:
    loopback = {"address": "127.0.1.1", "is_loopback": True}
    assert judge(make_ranks({**loopback, "network": "one"}, {**loopback, "network": "one"})) == []
    (finding,) = judge(make_ranks({}, loopback))
    assert (finding.severity, finding.ranks) == ("problem", (1,))


def test_gpus_are_used_if_every_rank_has_one() -> None:
    everywhere = {"gpus": 2, "local_size": 2}
    assert choose_backend(make_ranks(everywhere, everywhere)) == "nccl"
    few = make_ranks({**everywhere, "gpus": 1}, everywhere)
    assert choose_backend(few) == "gloo"
    (finding,) = judge(few)
    assert (finding.severity, finding.ranks) == ("warning", (0,))
    assert "1 GPUs for 2 ranks" in finding.what


def test_silent_ranks_are_named() -> None:
    (finding,) = judge_arrivals([0], 3, [], None)
    assert (finding.severity, finding.ranks) == ("problem", (1, 2))
    assert list(judge_arrivals([0, 1, 2], 3, [], None)) == []


def test_the_first_address_of_this_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # 198.51.100.0/24 is for documentation: no machine has an address of it.
    us = find_by(monkeypatch, resolve=resolve_to("198.51.100.77", "127.0.1.1", "127.0.0.1"))
    assert us.address == "127.0.1.1"
    assert us.is_loopback
    assert us.findings == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the loopback interface has other names")
def test_any_loopback_address_is_the_loopback_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_by(monkeypatch, resolve=resolve_to("127.0.1.1")).interface == "lo"
    assert find_by(monkeypatch, interfaces="lo").address == "127.0.0.1"


def test_a_hostname_of_another_machine_falls_back_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    us = find_by(monkeypatch, resolve=resolve_to("198.51.100.77"))
    assert us.is_loopback
    (finding,) = us.findings
    assert finding.severity == "warning"
    assert "resolves to 198.51.100.77, which is no address of this machine" in finding.what


# getaddrinfo raises the latter for names that cannot be, such as "a..b".
@pytest.mark.parametrize("error", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label empty")])
def test_a_hostname_that_does_not_resolve_falls_back_to_loopback(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    us = find_by(monkeypatch, resolve=fail)
    assert us.is_loopback
    (finding,) = us.findings
    assert "does not resolve" in finding.what


def test_every_named_interface_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    us = find_by(monkeypatch, interfaces="lo,nonesuch0")
    assert [finding.what for finding in us.findings] == [
        "GLOO_SOCKET_IFNAME names 'nonesuch0': this machine has no such interface"
    ]


def test_a_missing_psutil_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ProblemError, match="psutil is not installed") as raised:
        find_address(Rank())
    assert "pip install syncaccum[doctor]" in raised.value.args[1]


def test_without_a_launcher_the_process_is_alone() -> None:
    assert locate({}) == Rank()


def test_local_ranks_without_number_are_on_one_node() -> None:
    us = locate({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5"})
    assert (us.local_rank, us.local_size, us.speaks) == (1, 2, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4, more than WORLD_SIZE 2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2 and LOCAL_WORLD_SIZE is 2: ranks count from 0"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2: ranks count from 0"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(changes: dict[str, str], message: str) -> None:
    usual = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5", "LOCAL_RANK": "1"}
    with pytest.raises(ProblemError, match=message):
        locate({**usual, **changes})


def test_an_unusable_mpi_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ProblemError, match="an MPI launcher started this process, but mpi4py is unusable") as raised:
        locate({"PMI_SIZE": "2"})
    assert "pip install syncaccum[mpi]" in raised.value.args[1]


def test_a_commit_of_one_process_has_its_known_answer() -> None:
    assert measure_commit_error(None, 0, 1, torch.device("cpu"), 10.0) < TOLERANCE


def make_note(**changes: Any) -> bytes:
    return json.dumps({**dataclasses.asdict(Rank(rank=1, size=2)), **changes}).encode()


def test_a_rank_survives_json() -> None:
    us = Rank(rank=1, size=2, host="a", commit_errors={"gloo": 0.5}, layers={"count": 1, "channels": 2})
    us.add("what", "do this", "warning")
    assert read_rank(1, json.dumps(dataclasses.asdict(us)).encode()) == us


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"rank": 1}',
        b"[" * 100_000,
        make_note(rank=0),
        make_note(rank=True),
        make_note(size="2"),
        make_note(gpus=1e400),
        make_note(commit_errors={"gloo": float("nan")}),
        make_note(commit_errors={"gloo": "small"}),
        make_note(findings=[{"severity": "fatal", "what": "a", "remedy": "b", "ranks": [1]}]),
        make_note(findings=[{"severity": [], "what": "a", "remedy": "b", "ranks": [1]}]),
        make_note(findings={}),
        make_note(version=2),
    ],
    ids=lambda note: repr(note[-40:]),
)
def test_a_note_of_another_shape_is_refused(note: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):  # JSON's own, or ours
        read_rank(1, note)


def test_a_report_of_nothing_can_be_rendered() -> None:
    report = Report(timeout=1.0, as_json=True)
    report.add([Finding("problem", "what", "do this")])
    assert not json.loads(report.render())["healthy"]
    assert report.render_text().endswith("PROBLEM: what\n    remedy: do this")


def test_the_package_does_not_import_the_doctor() -> None:
    others = ("doctor", "mpi4py", "psutil")
    code = f"import sys, syncaccum; sys.exit(any(o in name for name in sys.modules for o in {others}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
