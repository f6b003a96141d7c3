"""Which transport a group needs, and what ranks may tell each other in words."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import torch

from syncaccum.errors import CommitError
from syncaccum.ranks.groups import Communicator, Group, check_communicator
from syncaccum.ranks.mpi_transport import MPITransport
from syncaccum.ranks.torch_transport import TorchTransport
from syncaccum.ranks.transport import Alone, Transport

_LONGEST = 2**20
"""Bytes of text from one rank, at most: enough to describe some 10,000 layers."""

# What torchrun, Open MPI and MPICH set for every rank.
_COUNTS_OF_RANKS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def connect(group: Group, timeout: float | None = None, call: str = "commit") -> Transport:
    """The transport of a resolved group. Not collective.

    Args:
        group: what ``resolve_group`` returned.
        timeout: seconds from now in which its collectives must end, instead of the group's own timeout for each.
        call: what its collectives are for, in messages.

    Raises:
        CommitError: no group, although a launcher started several ranks; or a group that was destroyed.
    """
    if group is None:
        _refuse_to_be_alone(os.environ)
        return Alone()
    try:
        # Both constructors raise ValueError for a group that is gone.
        if isinstance(group, Communicator):
            check_communicator(group.comm)
            return MPITransport(group, timeout, call)
        return TorchTransport(group, timeout, call)
    except ValueError as error:
        raise CommitError(
            f"the process group of some layers is of no use ({error}): it was destroyed or freed, or this rank is not "
            "in it. Revert those layers and convert them with a group that exists"
        ) from error


def _refuse_to_be_alone(environment: Mapping[str, str]) -> None:
    """Raise where a launcher started several ranks, each of which would take itself for alone."""
    for name in _COUNTS_OF_RANKS:
        ranks = environment.get(name, "")
        # Not set, or set to no number, is no launcher.
        if ranks.isdecimal() and int(ranks) > 1:
            raise CommitError(
                f"this is one of {ranks} ranks ({name}={ranks}), and which one is not known before "
                "torch.distributed.init_process_group(): call that first and destroy the group last, else each rank "
                "would take its own data for the global batch. Or give the layers a process_group: one of a single "
                "rank, as dist.new_group([rank]) or MPI.COMM_SELF, keeps it to itself. If there are no peers, "
                f"unset {name}"
            )


def gather_texts(transport: Transport, texts: Sequence[str], *, at_least: int = 0) -> list[list[str]]:
    """Every rank's texts, in rank order. Collective: two all-reduces.

    Not ``all_gather_object``: it unpickles what peers send, MPI has none of it, and it knows no timeout of ours. These
    are JSON, and checked. All ranks judge the same bytes, so they decide alike.

    Raises:
        CommitError: a peer is gone, or sent something else than ``at_least`` so many texts.
    """
    mine = json.dumps(list(texts)).encode()
    if len(mine) > _LONGEST:
        mine = json.dumps([f"{len(mine):,} bytes of text, too long to send"]).encode()
    # First the lengths: all ranks' tables must have one size.
    # A sum is a gather if each rank fills its place.
    home = transport.choose_device(torch.device("cpu"))
    sizes = torch.zeros(transport.size, dtype=torch.float64, device=home)
    sizes[transport.rank] = len(mine)
    transport.all_reduce(sizes)
    # A peer with another version may send anything.
    if not ((sizes >= 0) & (sizes <= _LONGEST) & (sizes == sizes.floor())).all():
        raise CommitError(f"a peer sent texts of impossible lengths: {sizes.tolist()}")
    lengths = [int(length) for length in sizes.tolist()]
    # Then the bytes, a row for each rank, as numbers.
    # float64, because transports sum nothing else.
    table = torch.zeros(transport.size, max(lengths), dtype=torch.float64)
    table[transport.rank, : len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    table = table.to(home)
    transport.all_reduce(table)
    everyones = table.to("cpu")
    if not ((everyones >= 0) & (everyones <= 255)).all():
        raise CommitError("a peer sent something that is no text")
    rows = zip(everyones.to(torch.uint8), lengths, strict=True)
    return [_read_texts(bytes(row[:length].tolist()), rank, at_least) for rank, (row, length) in enumerate(rows)]


def _read_texts(sent: bytes, rank: int, at_least: int) -> list[str]:
    try:
        texts = json.loads(sent)
    # RecursionError: thousands of brackets inside each other.
    except (ValueError, RecursionError) as error:
        raise CommitError(f"rank {rank} sent something that is no text: {type(error).__name__}") from error
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(texts) < at_least:
        raise CommitError(f"rank {rank} sent something else than a list of {at_least} or more texts")
    return texts
