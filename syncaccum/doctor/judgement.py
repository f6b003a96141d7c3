"""What is wrong with a job as a whole, judged from what its ranks tell; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

from syncaccum.doctor.rank import Finding, Rank, name_ranks

BACKENDS, STOP = ("gloo", "nccl", "one process"), "stop"

# What must be equal, and what goes wrong otherwise.
_VERSIONS = {
    "python": "objects pickled by one may not load in the other",
    "torch": "collectives of one build may not understand the other's, and hang",
    "syncaccum": "the messages of a commit may differ",
    "cuda": "NCCL and kernels differ between builds",
    "nccl": "NCCL's protocol differs between versions, and ranks hang or abort",
    "mpi": "the ranks cannot speak to each other",
}


def choose_backend(ranks: Collection[Rank]) -> str:
    """NCCL if every rank has a GPU of its own; if not, all of them stay on the CPU."""
    if any(rank.launcher == "alone" for rank in ranks):
        return "one process"
    return "nccl" if all(rank.gpus >= rank.local_size for rank in ranks) else "gloo"


def judge_arrivals(heard: list[int], size: int, duplicates: list[int], timeout: float | None) -> Iterator[Finding]:
    """Whether each of the ranks arrived within so many seconds; None is for ranks that had arrived before."""
    missing = tuple(sorted(set(range(size)) - set(heard)))
    if duplicates:  # others may be late: nobody waited for them
        what = f"more than one process says that it is {name_ranks(duplicates)}"
        remedy = "give every process a RANK of its own, on every node, from 0 to WORLD_SIZE - 1"
        yield Finding("problem", what, remedy, tuple(duplicates))
    elif missing and timeout is not None:
        what = f"{len(heard)} of {size} ranks arrived within {timeout:g} s; {name_ranks(missing)} missing"
        remedy = "see what they print, their MASTER_ADDR and MASTER_PORT, and firewalls; --timeout waits longer"
        yield Finding("problem", what, remedy, missing)
    elif missing:
        what = f"{name_ranks(missing)} fell silent while the group was measured"
        remedy = "see what they print, and whether the system killed them for the memory they took (dmesg)"
        yield Finding("problem", what, remedy, missing)


def judge_facts(ranks: Collection[Rank]) -> Iterator[Finding]:
    """What does not fit together before there is a group."""
    if len({rank.size for rank in ranks}) > 1:
        what = f"WORLD_SIZE differs: {_say_by_value(ranks, 'size')}"
        yield Finding("problem", what, "set the same number of ranks on every node")
    for name, consequence in _VERSIONS.items():
        # Patch releases of Python read each other's pickles, and run the same torch.
        parts = 2 if name == "python" else None
        if len({tuple(getattr(rank, name).split(".")[:parts]) for rank in ranks}) > 1:
            what = f"versions of {name} differ: {_say_by_value(ranks, name)}; {consequence}"
            remedy = "install the same versions on every node, from one constraints file or as one container image"
            yield Finding("problem", what, remedy)
    several, some_gpus = len({rank.network for rank in ranks}) > 1, any(rank.gpus for rank in ranks)
    for rank in ranks:
        if several and rank.is_loopback:
            what = f"{rank.host} will listen on {rank.address} ({rank.address_reason}), which no other node can reach"
            remedy = "set GLOO_SOCKET_IFNAME there to the interface that reaches the others, or mend its /etc/hosts"
            yield Finding("problem", what, remedy, (rank.rank,))
        if some_gpus and rank.gpus < rank.local_size:
            what = f"{rank.host} has {rank.gpus} GPUs for {rank.local_size} ranks, so all were examined on the CPU"
            remedy = "start as many ranks per node as it has GPUs; see CUDA_VISIBLE_DEVICES if there should be more"
            yield Finding("warning", what, remedy, (rank.rank,))
    if any(rank.launcher == "alone" for rank in ranks):
        yield Finding("note", "this process is alone", "to examine a job, start the doctor as the job")


def _say_by_value(ranks: Collection[Rank], name: str) -> str:
    by_value: dict[object, list[int]] = defaultdict(list)
    for rank in ranks:
        by_value[getattr(rank, name)].append(rank.rank)
    return ", ".join(f"{value or 'none'} on {name_ranks(of)}" for value, of in by_value.items())
