"""What is wrong with a job, judged from what its ranks say and measured; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from syncaccum.doctor.facts import Facts
from syncaccum.doctor.findings import Finding, name_ranks
from syncaccum.doctor.known_answer import TOLERANCE
from syncaccum.doctor.layers import Layers
from syncaccum.doctor.measurement import Measurement

# What must be equal, how much of it, and what goes wrong otherwise.
_VERSIONS: dict[str, tuple[Callable[[str], str], str]] = {
    # Patch releases of Python read each other's pickles, and torch is built for all of a minor version.
    "python": (lambda version: ".".join(version.split(".")[:2]), "objects pickled by one may not load in the other"),
    "torch": (str, "collectives of one build may not understand the other's, and hang"),
    "syncaccum": (str, "the messages of a commit may differ"),
    "cuda": (str, "NCCL and kernels differ between builds"),
    "nccl": (str, "NCCL's protocol differs between versions, and ranks hang or abort"),
    "mpi": (str, "the ranks cannot speak to each other"),
}


def judge_facts(facts: Sequence[Facts], size: int, duplicates: Collection[int], timeout: float) -> list[Finding]:
    """What is wrong with the job before it has a group.

    Args:
        facts: of the ranks that arrived, rank 0 among them.
        size: how many should have.
        duplicates: ranks that more than one process has.
        timeout: seconds that they were waited for.
    """
    return [
        *_judge_arrivals(facts, size, duplicates, timeout),
        *_judge_versions(facts),
        *_judge_addresses(facts),
        *_judge_gpus(facts),
        *(finding for f in facts for finding in f.findings),
    ]


def judge_forming(facts: Sequence[Facts], errors: Mapping[int, str]) -> list[Finding]:
    """Why the ranks could not form a group, from what each of them got; an empty error is none."""
    findings = _judge_silence({f.rank for f in facts}, errors, "while the group was formed")
    for rank, error in errors.items():
        if error:
            listening = ", ".join(sorted({f"{f.host} on {f.address} ({f.interface})" for f in facts}))
            findings.append(
                Finding(
                    "problem",
                    f"the ranks met at the store, but could not connect to each other: {error}",
                    "set GLOO_SOCKET_IFNAME on every node to the interface that reaches the others, and let a firewall "
                    f"pass all ports between nodes, not only MASTER_PORT; they listen: {listening}",
                    (rank,),
                )
            )
    return findings


def judge_measurements(measurements: Mapping[int, Measurement], size: int, factory: str | None) -> list[Finding]:
    """What is wrong with the group's work, from what each rank measured."""
    findings = _judge_silence(set(range(size)), measurements, "while the group was measured")
    for rank, measured in measurements.items():
        if measured.error:
            findings.append(
                Finding(
                    "problem",
                    f"the group broke while it was measured: {measured.error}",
                    "see what the other ranks print: one of them died, hangs, or is cut off",
                    (rank,),
                )
            )
        findings += [*_judge_skew(rank, measured), *_judge_commits(rank, measured)]
        if measured.layers is not None:
            findings += _judge_layers(rank, measured.layers, factory)
    return findings


def _judge_silence(expected: Collection[int], heard: Collection[int], when: str) -> list[Finding]:
    silent = sorted(set(expected) - set(heard))
    if not silent:
        return []
    remedy = "see what they print, and whether the system killed them: dmesg names processes that took too much memory"
    return [Finding("problem", f"{name_ranks(silent)} fell silent {when}", remedy, tuple(silent))]


def _judge_skew(rank: int, measured: Measurement) -> list[Finding]:
    skew = measured.skew
    if abs(skew.offset) - skew.bound <= _LARGEST_SKEW:
        return []
    ahead = "ahead of" if skew.offset > 0 else "behind"
    return [
        Finding(
            "warning",
            f"the clock is {abs(skew.offset):.3g} s {ahead} rank 0's (within {skew.bound:.2g} s)",
            "let chrony or ntpd set the clocks: logs of the nodes do not line up, and files seem newer than they are",
            (rank,),
        )
    ]


_LARGEST_SKEW = 1.0
"""Seconds; etcd warns at the same, and make compares files by the second."""


def _judge_commits(rank: int, measured: Measurement) -> list[Finding]:
    return [
        Finding(
            "problem",
            f"a commit over {transport} is wrong: running statistics are off by {error:.1e} of their value",
            "the all-reduce returns wrong sums, or syncaccum does: try gloo on the CPU (CUDA_VISIBLE_DEVICES=), NCCL "
            "without peer-to-peer (NCCL_P2P_DISABLE=1), and report what this prints with --json",
            (rank,),
        )
        for transport, error in measured.commit_errors.items()
        if error > TOLERANCE
    ]


def _judge_layers(rank: int, layers: Layers, factory: str | None) -> list[Finding]:
    if layers.own_error:
        remedy = "give --model as package.module:function, of a function that takes no arguments and returns the model"
        return [Finding("problem", f"{factory} built no model: {layers.own_error}", remedy, (rank,))]
    if layers.mismatch:
        remedy = "look for what the factory takes from its rank, its environment or its files"
        return [Finding("problem", f"{factory} builds different models: {layers.mismatch}", remedy)]
    return []


def can_use_gpus(facts: Sequence[Facts]) -> bool:
    """Whether every rank has a GPU of its own; if not, all of them stay on the CPU."""
    return all(f.gpus >= f.local_size for f in facts)


def _judge_arrivals(facts: Sequence[Facts], size: int, duplicates: Collection[int], timeout: float) -> list[Finding]:
    findings = []
    arrived = {f.rank for f in facts}
    missing = sorted(set(range(size)) - arrived)
    if duplicates:
        findings.append(
            Finding(
                "problem",
                f"more than one process says that it is {name_ranks(duplicates)}",
                "give every process a RANK of its own, on every node, from 0 to WORLD_SIZE - 1",
                tuple(sorted(duplicates)),
            )
        )
    if missing and not duplicates:  # where a rank is taken twice, the wait for others was cut short
        findings.append(
            Finding(
                "problem",
                f"{len(arrived)} of {size} ranks arrived within {timeout:g} s; {name_ranks(missing)} missing",
                "see whether those processes started and what they print; whether they were given the same MASTER_ADDR "
                "and MASTER_PORT; and whether a firewall lets them reach that port. --timeout waits longer",
                tuple(missing),
            )
        )
    sizes = {f.size for f in facts}
    if len(sizes) > 1:
        said = _say_by_value(facts, lambda f: str(f.size))
        findings.append(Finding("problem", f"WORLD_SIZE differs: {said}", "set the same number of ranks on every node"))
    return findings


def _judge_versions(facts: Sequence[Facts]) -> list[Finding]:
    findings = []
    for name, (shorten, consequence) in _VERSIONS.items():
        if len({shorten(getattr(f, name)) for f in facts}) > 1:
            said = _say_by_value(facts, lambda f, name=name: getattr(f, name) or "none")  # type: ignore[misc]
            findings.append(
                Finding(
                    "problem",
                    f"versions of {name} differ: {said}; {consequence}",
                    "install the same versions on every node, from one constraints file or as one container image",
                )
            )
    return findings


def _judge_addresses(facts: Sequence[Facts]) -> list[Finding]:
    if len({f.network for f in facts}) == 1:
        return []
    return [
        Finding(
            "problem",
            f"{f.host} will listen on {f.address} ({f.address_reason}), which the other nodes cannot reach",
            "set GLOO_SOCKET_IFNAME on this node to the interface that reaches the others (ip -brief address lists "
            f"them), or give {f.host} its network address instead of a loopback one in /etc/hosts",
            (f.rank,),
        )
        for f in facts
        if f.is_loopback
    ]


def _judge_gpus(facts: Sequence[Facts]) -> list[Finding]:
    if can_use_gpus(facts) or not any(f.gpus for f in facts):
        return []
    return [
        Finding(
            "warning",
            f"{f.host} has {f.gpus} GPUs for {f.local_size} ranks, so all ranks were examined on the CPU over gloo",
            "start as many ranks per node as it has GPUs; see CUDA_VISIBLE_DEVICES if there should be more",
            (f.rank,),
        )
        for f in facts
        if f.gpus < f.local_size
    ]


def _say_by_value(facts: Sequence[Facts], value: Callable[[Facts], str]) -> str:
    ranks: dict[str, list[int]] = defaultdict(list)
    for f in facts:
        ranks[value(f)].append(f.rank)
    return ", ".join(f"{what} on {name_ranks(of)}" for what, of in ranks.items())
