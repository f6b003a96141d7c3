"""Groups that are not what a layer takes them for, and peers that send what they should not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncaccum
from syncaccum import (
    CommitError,
    LayoutMismatchError,
    NonFiniteStatisticsError,
    SyncAccumBatchNorm,
    commit,
    convert_sync_accum,
    gather_window_state_dict,
    lockstep,
    recalibrate,
)
from syncaccum.ranks.connect import connect, gather_texts
from syncaccum.ranks.groups import resolve_group
from syncaccum.ranks.torch_transport import TorchTransport
from tests.ranks import Rank, on_ranks

ROOT = Path(__file__).resolve().parent.parent.parent


def make_model(**arguments: str) -> nn.Sequential:
    torch.manual_seed(0)
    return convert_sync_accum(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), **arguments)


def draw(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)) + seed


# --- alone, although a launcher says otherwise -----------------------------------------------------------------

_ALONE = """
import os, sys, torch, torch.distributed as dist, torch.nn as nn, syncaccum
net = syncaccum.convert_sync_accum(nn.Sequential(nn.BatchNorm1d(4)))
if os.environ.get("AFTER"):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    net(torch.randn(3, 4)); syncaccum.commit(net)
    dist.destroy_process_group()
try:
    if sys.argv[1] == "lockstep":
        syncaccum.lockstep(net, net, [torch.randn(3, 4)])
    elif sys.argv[1] == "recalibrate":
        syncaccum.recalibrate(net, [torch.randn(3, 4)])
    else:
        net(torch.randn(3, 4))
        net[0].update_stats() if sys.argv[1] == "update_stats" else getattr(syncaccum, sys.argv[1])(net)
except syncaccum.CommitError as error:
    print("refused:", error)
"""


def run_alone(call: str, **variables: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", _ALONE, call],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stdout


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize("call", ["commit", "lockstep"])
def test_a_rank_that_takes_itself_for_alone_is_told(call: str, name: str) -> None:
    assert f"refused: this is one of 2 ranks ({name}=2)" in run_alone(call, **{name: "2"})


@pytest.mark.parametrize("call", ["update_stats", "gather_window_state_dict", "recalibrate"])
def test_so_it_is_by_every_other_call_and_after_the_group_was_destroyed(call: str) -> None:
    said = run_alone(call, WORLD_SIZE="4", AFTER="1")
    assert "torch.distributed.init_process_group(): call that first and destroy the group last" in said
    assert run_alone(call, WORLD_SIZE="1", AFTER="1") == ""


@on_ranks(2)
def test_a_group_of_one_rank_says_alone(rank: Rank) -> None:
    groups = [dist.new_group([index]) for index in range(2)]
    model = convert_sync_accum(nn.Sequential(nn.BatchNorm1d(4)), groups[rank.index])
    model(draw(3 + rank.index, rank.index))
    assert commit(model).values == {"0": 3 + rank.index}


# --- several groups in one model -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 1])
@on_ranks(2)
def test_with_two_groups_the_error_says_which_layers_were_committed(rank: Rank, bad: int) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    convert_sync_accum(model[0], dist.new_group())
    convert_sync_accum(model)
    for index, layer in enumerate(model):
        layer(torch.full((3, 4), float("nan")) if index == bad else draw(3, index))
    unchanged, done = ("0", "1, 2") if bad == 0 else ("1, 2", "0")
    with pytest.raises(NonFiniteStatisticsError, match=f"unchanged are {unchanged}; done are {done}"):
        commit(model)
    expected = [0, 1, 1] if bad == 0 else [1, 0, 0]
    assert [int(layer.get_buffer("num_batches_tracked")) for layer in model] == expected


@on_ranks(2)
def test_a_destroyed_group_is_an_error_of_its_layers_alone(rank: Rank) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    group = dist.new_group()
    convert_sync_accum(model[0], group)
    convert_sync_accum(model)
    model(draw(3, rank.index))
    dist.destroy_process_group(group)
    with pytest.raises(CommitError, match=r"of no use .*destroyed.*unchanged are 0; done are 1"):
        commit(model)
    assert [int(layer.get_buffer("num_batches_tracked")) for layer in model] == [0, 1]


# --- layers that differ between ranks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("renorm", "batch"), ("renorm", "running"), ("r_max", "3.0"), ("d_max", "0.1"), ("prior_count", "2.0")],
)
@on_ranks(2)
def test_policies_that_differ_between_ranks_are_named(rank: Rank, ours: str, theirs: str) -> None:
    model = make_model()
    layer = model[1]
    assert isinstance(layer, SyncAccumBatchNorm)
    layer.normalization = "renorm"
    if rank.index == 1 and ours == "renorm":
        layer.normalization = theirs
    elif rank.index == 1:
        setattr(layer, ours, float(theirs))
    model(draw(3, rank.index))
    with pytest.raises(LayoutMismatchError, match=rf"layer 1 differs between ranks.*{theirs}"):
        commit(model)
    assert model[1].window.count == 3


@on_ranks(2)
def test_different_calls_on_two_ranks_are_named(rank: Rank) -> None:
    model = make_model()
    model(draw(3, rank.index))
    commit(model)
    model(draw(3, rank.index))
    with pytest.raises(CommitError, match="rank 0 gather_window_state_dict, rank 1 commit"):
        (gather_window_state_dict, commit)[rank.index](model)
    assert commit(model).values == {"0": 6, "1": 6}


# --- what peers can send ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ['{"a": 1}', "[1]", "[[", "[" * 5000, "\x80", '"text"', "[]"])
@on_ranks(2)
def test_texts_that_are_none_are_an_error_on_every_rank(rank: Rank, sent: str) -> None:
    transport = connect(resolve_group(None))
    dumps = json.dumps
    if rank.index == 1:
        json.dumps = lambda *_: sent
    try:
        with pytest.raises(CommitError, match="rank 1 sent something"):
            gather_texts(transport, ["fine"], at_least=1)
    finally:
        json.dumps = dumps
    assert gather_texts(transport, [f"rank {rank.index}"]) == [["rank 0"], ["rank 1"]]


@pytest.mark.parametrize("length", [-5.0, 0.5, 1e300, float("nan"), 2.0**40])
@on_ranks(2)
def test_lengths_that_cannot_be_are_an_error_on_every_rank(rank: Rank, length: float) -> None:
    all_reduce = TorchTransport.all_reduce

    def lie(self: TorchTransport, flat: torch.Tensor) -> None:
        if flat.numel() == 2:
            flat[1] = length
        all_reduce(self, flat)

    transport = connect(resolve_group(None))
    if rank.index == 1:
        TorchTransport.all_reduce = lie  # type: ignore[method-assign]
    try:
        with pytest.raises(CommitError, match="impossible lengths"):
            gather_texts(transport, ["fine"])
    finally:
        TorchTransport.all_reduce = all_reduce  # type: ignore[method-assign]


def test_nothing_that_peers_send_is_unpickled() -> None:
    package = Path(syncaccum.__file__).parent
    assert not [path for path in package.rglob("*.py") if "import pickle" in path.read_text()]


# --- recalibrate over ranks ------------------------------------------------------------------------------------


@on_ranks(3)
def test_recalibrate_measures_the_data_of_all_ranks(rank: Rank) -> None:
    sizes = [[5, 3], [], [2, 2, 7]]  # rank 1 has none
    parts = [[draw(n, 10 * r + i) for i, n in enumerate(ns)] for r, ns in enumerate(sizes)]
    model = make_model()
    model(draw(4, rank.index) * 9)
    commit(model)
    report = recalibrate(model[0], parts[rank.index])
    plain = nn.BatchNorm1d(4, momentum=None)
    plain(torch.cat([x for of_rank in parts for x in of_rank]))
    assert report.values == {"SyncAccumBatchNorm1d": 19}
    torch.testing.assert_close(model[0].running_mean, plain.running_mean)
    torch.testing.assert_close(model[0].running_var, plain.running_var)


@pytest.mark.parametrize("committed", [False, True])
@on_ranks(2)
def test_a_failure_on_one_rank_ends_the_recalibration_of_all(rank: Rank, committed: bool) -> None:
    model = make_model()
    if committed:
        model(draw(4, rank.index))
        commit(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def batches() -> Iterator[torch.Tensor]:
        yield draw(4, 0)
        if rank.index == 1:
            raise OSError("disk gone")

    if rank.index == 1:
        with pytest.raises(OSError, match="disk gone"):
            recalibrate(model, batches())
    else:
        with pytest.raises(CommitError, match="rank 1 recalibrate, whose forward failed"):
            recalibrate(model, batches())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model(draw(4, rank.index))
    assert commit(model).values == {"0": 8, "1": 8}
    assert len(lockstep(model, model, [draw(4, 5)])) == 1
