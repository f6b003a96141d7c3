"""What is tried on every rank of an MPI job; see run_bodies.py."""

from __future__ import annotations

import copy
import pickle
import socket
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncaccum import (
    CommitError,
    LayoutMismatchError,
    LockstepError,
    NonFiniteStatisticsError,
    SyncAccumBatchNorm,
    TooFewValuesError,
    commit,
    commit_on_step,
    convert_sync_accum,
    lockstep,
    lookahead,
    summary,
)
from syncaccum.integrations import mpi
from tests.oracle import assert_unchanged, gather_global_batch, take_snapshot

Body = Callable[[MPI.Intracomm], None]
BODIES: list[Body] = []


def body(function: Body) -> Body:
    BODIES.append(function)
    return function


class Counting(MPI.Intracomm):
    """A communicator that counts what commits call."""

    all_reduces = 0

    def Allreduce(self, *args: Any, **options: Any) -> None:  # noqa: N802 - mpi4py's name
        self.all_reduces += 1
        super().Allreduce(*args, **options)


def make_layers(comm: MPI.Comm, dtype: torch.dtype = torch.float64, **widths: int) -> Any:  # a ModuleDict
    layers = {name: SyncAccumBatchNorm(width, process_group=comm, dtype=dtype) for name, width in widths.items()}
    return nn.ModuleDict(layers)


def draw(comm: MPI.Comm, step: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """This rank's micro-batches: uneven, and none at all on the last of several ranks."""
    generator = torch.Generator().manual_seed(100 * step + comm.rank)
    sizes = () if comm.size > 1 and comm.rank == comm.size - 1 else (2 + comm.rank, 3)
    return [3 * torch.randn(n, width, 4, generator=generator, dtype=dtype) + 1 for n in sizes]


def feed(comm: MPI.Comm, layers: nn.ModuleDict, step: int) -> None:
    layer: Any
    for layer in layers.values():
        for x in draw(comm, step, layer.num_features):
            layer(x)


@body
def statistics_are_those_of_the_global_batch(comm: MPI.Intracomm) -> None:
    layers = make_layers(comm, a=3, b=5)
    references = {name: nn.BatchNorm1d(layer.num_features, dtype=torch.float64) for name, layer in layers.items()}
    for step in range(3):
        for name, layer in layers.items():
            micro_batches = draw(comm, step, layer.num_features)
            for x in micro_batches:
                layer(x)
            references[name](gather_global_batch([torch.empty(0, layer.num_features), *micro_batches], comm))
        assert commit(layers, timeout=60.0 if step == 1 else None).ranks == comm.size
        for name, layer in layers.items():
            torch.testing.assert_close(dict(layer.named_buffers()), dict(references[name].named_buffers()))
            assert layer.window.count == 0


@body
def statistics_in_float32_lose_nothing_on_the_way(comm: MPI.Intracomm) -> None:
    layers = make_layers(comm, torch.float32, a=3)
    reference = nn.BatchNorm1d(3, dtype=torch.float64)
    micro_batches = draw(comm, 0, 3, torch.float32)
    for x in micro_batches:
        layers["a"](x)
    commit(layers)
    reference(gather_global_batch([torch.empty(0, 3), *micro_batches], comm))
    # The default tolerance of float32: running statistics are stored in it.
    torch.testing.assert_close(layers["a"].running_var, reference.running_var.float())


@body
def a_commit_is_one_all_reduce_after_a_comparison_of_layers(comm: MPI.Intracomm) -> None:
    counting = Counting(comm.Dup())
    layers = make_layers(counting, a=3, b=5)
    counts = []
    for step in range(3):
        feed(comm, layers, step)
        commit(layers)
        counts.append(counting.all_reduces)
    assert counts == [2, 3, 4]


@body
def overlap_sends_before_the_step_and_gives_the_same_bits(comm: MPI.Intracomm) -> None:
    counting = Counting(comm.Dup())
    ends = []
    for overlap in (True, False):
        layers = make_layers(counting, a=3, b=5)
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
        handle = commit_on_step(layers, optimizer, overlap=overlap)
        for step in range(3):
            feed(comm, layers, step)
            if overlap:
                handle.start_commit()
            sent = counting.all_reduces
            optimizer.step()
            if overlap and step > 0:
                assert counting.all_reduces == sent
        ends.append(take_snapshot(layers))
    assert_unchanged(layers, ends[0])


@body
def every_rank_has_the_same_bits(comm: MPI.Intracomm) -> None:
    layers = make_layers(comm, a=3, b=5)
    feed(comm, layers, 0)
    commit(layers)
    for theirs in comm.allgather(take_snapshot(layers)):
        assert_unchanged(layers, theirs)


@body
def communicators_commit_apart(comm: MPI.Intracomm) -> None:
    own = comm.Split(comm.rank % 2)
    layers = make_layers(own, a=3)
    layers["everyone"] = SyncAccumBatchNorm(3, process_group=comm, dtype=torch.float64)
    references = {"a": nn.BatchNorm1d(3, dtype=torch.float64), "everyone": nn.BatchNorm1d(3, dtype=torch.float64)}
    x = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(comm.rank), dtype=torch.float64)
    for name, group in (("a", own), ("everyone", comm)):
        layers[name](x)
        references[name](gather_global_batch([x], group))
    assert commit(layers).ranks == comm.size
    for name, layer in layers.items():
        torch.testing.assert_close(dict(layer.named_buffers()), dict(references[name].named_buffers()))


@body
def layers_that_differ_are_named_on_every_rank(comm: MPI.Intracomm) -> None:
    last = comm.size - 1
    layers = make_layers(comm, a=3, b=5 if comm.rank < last or comm.size == 1 else 6)
    before = take_snapshot(layers)
    if comm.size == 1:
        return  # nobody to differ from
    with pytest.raises(LayoutMismatchError, match=rf"rank 0 has 'b' \(5 channels.*rank {last} has 'b' \(6 channels"):
        commit(layers)
    assert_unchanged(layers, before)


@body
def nan_is_named_on_every_rank(comm: MPI.Intracomm) -> None:
    layers = make_layers(comm, a=3, b=5)
    feed(comm, layers, 0)
    last = comm.size - 1
    if comm.rank == last:
        layers["b"](torch.full((2, 5, 4), torch.nan, dtype=torch.float64))
    before = take_snapshot(layers)
    with pytest.raises(NonFiniteStatisticsError, match=rf"rank {last}: b\)"):
        commit(layers)
    assert_unchanged(layers, before)


@body
def a_single_value_is_refused_on_every_rank(comm: MPI.Intracomm) -> None:
    layers = make_layers(comm, a=3)
    if comm.rank == 0:
        layers["a"](torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(TooFewValuesError):
        commit(layers)


def make_network() -> nn.Module:
    """Two BatchNorm layers, the same weights on all ranks."""
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), nn.BatchNorm1d(3)
    return nn.Sequential(*layers).double()


@body
def lockstep_equals_the_large_batch(comm: MPI.Intracomm) -> None:
    plain = make_network()
    model = convert_sync_accum(copy.deepcopy(plain), comm)
    micro_batches = [torch.randn(n + comm.rank, 4, dtype=torch.float64) for n in (2, 3)]
    everyones = comm.allgather(micro_batches)
    losses = lockstep(model, lambda x: model(x).pow(3).sum(), micro_batches)
    sum(losses).backward()
    plain(torch.cat([x for theirs in everyones for x in theirs])).pow(3).sum().backward()
    for parameter, reference in zip(model.parameters(), plain.parameters(), strict=True):
        total = sum(comm.allgather(parameter.grad))
        # Float64 with headroom for two layers of cancellation; a gradient that is zero by algebra needs an absolute.
        torch.testing.assert_close(total, reference.grad, rtol=1e-10, atol=1e-10)
    commit(model)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)


def draw_unequal(comm: MPI.Comm, step: int) -> list[Tensor]:
    """This rank's micro-batches: other sizes and numbers than the next rank's, and an empty one."""
    generator = torch.Generator().manual_seed(100 * step + comm.rank)
    sizes = (3, 0, 2, 4) if comm.rank % 2 else (2 + comm.rank, 4)
    return [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in sizes]


def walk(losses: Iterable[Tensor]) -> None:
    for loss in losses:
        loss.backward()


@body
def lookahead_has_the_large_batchs_losses_and_statistics(comm: MPI.Intracomm) -> None:
    plain = make_network()
    # The layers talk over MPI, DistributedDataParallel over gloo.
    mpi.init_process_group(comm, backend="gloo", timeout=60)
    model = convert_sync_accum(copy.deepcopy(plain), comm)
    ddp = DistributedDataParallel(model)
    for step in range(2):
        micro_batches = draw_unequal(comm, step)
        total = 0.0
        for loss in lookahead(ddp, lambda x: ddp(x).pow(3).sum(), micro_batches):
            total += loss.item()
            loss.backward()
        whole = torch.cat([x for theirs in comm.allgather(micro_batches) for x in theirs])
        torch.testing.assert_close(sum(comm.allgather(total)), plain(whole).pow(3).sum().item())
        assert commit(model).ranks == comm.size
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer)
        # A parameter without a gradient would end the test here.
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert gradient.any()
        for theirs in comm.allgather(gradient):
            assert torch.equal(gradient, theirs)
    dist.destroy_process_group()


@body
def lookahead_with_all_data_in_one_micro_batch_has_the_large_batchs_gradient(comm: MPI.Intracomm) -> None:
    plain = make_network()
    model = convert_sync_accum(copy.deepcopy(plain), comm)
    x = comm.bcast(torch.randn(5, 4, dtype=torch.float64))
    # The other ranks have an empty micro-batch: nothing is left to later ones.
    walk(lookahead(model, lambda x: model(x).pow(3).sum(), [x if comm.rank == 0 else x[:0]]))
    plain(x).pow(3).sum().backward()
    for parameter, reference in zip(model.parameters(), plain.parameters(), strict=True):
        # As for lockstep.
        torch.testing.assert_close(sum(comm.allgather(parameter.grad)), reference.grad, rtol=1e-10, atol=1e-10)
    commit(model)


@body
def a_rank_that_leaves_its_lookahead_is_named_and_nobody_waits(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        return  # nobody to wait
    model = convert_sync_accum(make_network(), comm)
    before = take_snapshot(model)
    last = comm.size - 1
    results: Any = lookahead(model, lambda x: model(x).pow(3).sum(), draw_unequal(comm, 0))
    if comm.rank == last:
        next(results).backward()
        results.close()
    else:
        # Ranks with fewer micro-batches still sit rounds out then.
        with pytest.raises(LockstepError, match=rf"rank {last} given up"):
            walk(results)
    assert_unchanged(model, before)
    # The communicator is of use as before.
    walk(lookahead(model, lambda x: model(x).pow(3).sum(), draw_unequal(comm, 1)))
    assert commit(model).ranks == comm.size


@body
def ranks_in_different_layers_are_told(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        return  # nobody to meet
    layers = convert_sync_accum(nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)]), comm)
    mine = layers[0 if comm.rank == 0 else 1]
    with pytest.raises(LockstepError, match="rank 0 0, rank 1 1"):
        lockstep(layers, lambda x: mine(x).sum(), [torch.randn(3, 2)])


@body
def a_copy_commits_over_the_same_communicator_and_pickling_is_refused(comm: MPI.Intracomm) -> None:
    layers = make_layers(comm, a=3)
    copied = copy.deepcopy(layers)
    assert copied["a"].process_group is comm
    feed(comm, copied, 0)
    assert commit(copied).ranks == comm.size
    with pytest.raises(TypeError, match="save its state_dict"):
        pickle.dumps(layers)


@body
def communicators_that_cannot_be_are_refused(comm: MPI.Intracomm) -> None:
    with pytest.raises(ValueError, match="this rank is not a member"):
        SyncAccumBatchNorm(3, process_group=MPI.COMM_NULL)
    if comm.size > 1:
        half = comm.Split(comm.rank % 2)
        between = MPI.Intracomm(half).Create_intercomm(0, comm, 1 - comm.rank % 2)
        with pytest.raises(ValueError, match="intercommunicator"):
            SyncAccumBatchNorm(3, process_group=between)
    freed = comm.Dup()
    layers = make_layers(freed, a=3)
    assert summary(layers).layers[0].group == f"MPI, {comm.size} rank{'s' if comm.size > 1 else ''}"
    freed.Free()
    assert summary(layers).layers[0].group == "MPI, freed"
    with pytest.raises(CommitError, match="it was freed"):
        commit(layers)


@body
def torch_distributed_starts_and_all_ranks_meet(comm: MPI.Intracomm) -> None:
    everyone = comm.size == MPI.COMM_WORLD.size
    here = mpi.init_process_group(None if everyone else comm, backend="gloo", timeout=60)
    expected = MPI.COMM_WORLD.rank if everyone else comm.rank
    assert here == mpi.MPIRank(expected, comm.size, expected, comm.size)  # all ranks are on this machine
    total = torch.tensor(here.rank)
    dist.all_reduce(total)
    assert (dist.get_rank(), int(total)) == (expected, sum(range(comm.size)))
    dist.destroy_process_group()


@body
def a_taken_port_is_named_on_every_rank(comm: MPI.Intracomm) -> None:
    with pytest.MonkeyPatch.context() as patch, socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        patch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(RuntimeError, match=r"could not be started from MPI: rank 0 on .* Unset MASTER_PORT"):
            mpi.init_process_group(comm)
