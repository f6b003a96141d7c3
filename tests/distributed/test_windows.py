"""Open windows saved by some ranks and taken up by others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncaccum import (
    LayoutMismatchError,
    SyncAccumBatchNorm,
    commit,
    convert_sync_accum,
    gather_window_state_dict,
    load_window_state_dict,
    window_state_dict,
)
from tests.oracle import (
    as_columns,
    assert_committed,
    assert_same_statistics,
    assert_unchanged,
    feed_layers,
    gather_global_batch,
    make_layers,
    make_reference,
    make_references,
    take_snapshot,
)
from tests.ranks import Rank, on_ranks, run_on_ranks

State = dict[str, Tensor]
Fed = dict[str, list[Tensor]]


def feed_and_save(rank: Rank) -> State:
    layers = make_layers(a=3, b=4)
    feed_layers(layers, rank)
    return window_state_dict(layers)


def feed_and_gather(rank: Rank) -> State:
    layers = make_layers(a=3, b=4)
    feed_layers(layers, rank)
    before = take_snapshot(layers)
    state = gather_window_state_dict(layers)
    assert_unchanged(layers, before)
    return state


def feed_and_commit(rank: Rank) -> list[Tensor]:
    layers = make_layers(a=3, b=4)
    feed_layers(layers, rank)
    commit(layers)
    return list(layers.buffers())


def load_and_commit(rank: Rank, state: State) -> list[Tensor]:
    layers = make_layers(a=3, b=4)
    feed_layers(layers, rank, seed=9)  # a window that loading replaces
    load_window_state_dict(layers, state)
    commit(layers)
    return list(layers.buffers())


def stack(states: Sequence[State]) -> State:
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


@pytest.mark.parametrize("saved", ["gathered", "stacked"])
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(3, 2), (3, 1), (2, 3), (1, 3), (2, 2)])
def test_windows_saved_by_some_ranks_are_committed_by_any_number(saved_by: int, loaded_by: int, saved: str) -> None:
    if saved == "gathered":
        state, *others = run_on_ranks(feed_and_gather, saved_by)
        assert all(torch.equal(other[name], state[name]) for other in others for name in state)
    else:
        state = stack(run_on_ranks(feed_and_save, saved_by))
    expected = run_on_ranks(feed_and_commit, saved_by)[0]
    for buffers in run_on_ranks(load_and_commit, loaded_by, state):
        # The order of summation changed, so not bit for bit; float64 has 16 digits.
        torch.testing.assert_close(buffers, expected, rtol=1e-14, atol=1e-14)


@on_ranks(2)
def test_a_run_resumed_in_mid_window_commits_what_one_that_never_stopped_does(rank: Rank) -> None:
    """torchgpipe's layer breaks when it resumes in the middle of a window."""
    layers = make_layers(a=3, b=4)
    references = make_references(layers)
    first = feed_layers(layers, rank, seed=0)
    file = rank.folder / f"{rank.index}.pt"
    torch.save((layers.state_dict(), window_state_dict(layers)), file)

    resumed = make_layers(a=3, b=4)
    statistics, windows = torch.load(file, weights_only=True)
    resumed.load_state_dict(statistics)
    load_window_state_dict(resumed, windows)
    for model in (layers, resumed):
        second = feed_layers(model, rank, seed=1)
        commit(model)
    assert all(torch.equal(a, b) for a, b in zip(resumed.buffers(), layers.buffers(), strict=True))
    assert_committed(resumed, references, {name: first[name] + second[name] for name in first})


def save_in_mid_window(rank: Rank, folder: Path) -> tuple[State, Fed]:
    """The statistics before the window, and what the ranks have seen of it when they save."""
    layers = make_layers(a=3, b=4)
    feed_layers(layers, rank, seed=0)
    commit(layers)
    fed = feed_layers(layers, rank, seed=1)
    dcp.save({"model": layers.state_dict(), "windows": gather_window_state_dict(layers)}, checkpoint_id=folder)
    return layers.state_dict(), fed


def resume_and_finish_window(rank: Rank, folder: Path) -> tuple[State, Fed]:
    """The statistics after the window, and what these ranks have seen of it."""
    layers = make_layers(a=3, b=4)
    state = {"model": layers.state_dict(), "windows": gather_window_state_dict(layers)}
    dcp.load(state, checkpoint_id=folder)
    layers.load_state_dict(state["model"])
    load_window_state_dict(layers, state["windows"])
    fed = feed_layers(layers, rank, seed=2)
    commit(layers)
    return layers.state_dict(), fed


@pytest.mark.parametrize("loaded_by", [1, 2, 3])
def test_a_distributed_checkpoint_in_mid_window_is_resumed_by_any_number_of_ranks(
    tmp_path: Path, loaded_by: int
) -> None:
    saved = run_on_ranks(save_in_mid_window, 2, tmp_path)
    finished = run_on_ranks(resume_and_finish_window, loaded_by, tmp_path)
    seen = [fed for _, fed in (*saved, *finished)]
    references = make_layers(a=3, b=4)
    for name in references:
        reference = make_reference(references[name])
        before, after = saved[0][0], finished[0][0]
        reference.load_state_dict({key: before[f"{name}.{key}"] for key in reference.state_dict()})
        reference(torch.cat([as_columns(x) for fed in seen for x in fed[name]]))
        for key, value in reference.state_dict().items():
            torch.testing.assert_close(after[f"{name}.{key}"], value, rtol=1e-13, atol=1e-13)  # of float64's 1e-16


@on_ranks(2)
def test_a_distributed_checkpoint_with_keys_named_by_rank_goes_on_bit_for_bit(rank: Rank) -> None:
    layers, resumed = make_layers(a=3, b=4), make_layers(a=3, b=4)
    feed_layers(layers, rank)
    mine = f"windows of rank {rank.index}"
    dcp.save({mine: window_state_dict(layers)}, checkpoint_id=rank.folder / "checkpoint")
    state = {mine: window_state_dict(resumed)}
    dcp.load(state, checkpoint_id=rank.folder / "checkpoint")
    load_window_state_dict(resumed, state[mine])
    assert_unchanged(resumed, take_snapshot(layers))


@on_ranks(3)
def test_a_gathered_state_holds_what_the_groups_of_its_rank_saw(rank: Rank) -> None:
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    group = pair if rank.index < 2 else single
    layers, resumed = (
        nn.ModuleDict(
            {
                "everyone": SyncAccumBatchNorm(3, dtype=torch.float64),
                "group": SyncAccumBatchNorm(2, process_group=group, dtype=torch.float64),
            }
        )
        for _ in range(2)
    )
    fed = feed_layers(layers, rank)
    state = gather_window_state_dict(layers)
    assert list(dict.fromkeys(name.partition("/")[0] for name in state)) == ["everyone", "group"]
    for name, members in (("everyone", None), ("group", group)):
        assert state[name][0, 0] == len(gather_global_batch(fed[name], members))
    references = make_references(resumed)
    load_window_state_dict(resumed, state)
    commit(resumed)
    for name, members in (("everyone", None), ("group", group)):
        references[name](gather_global_batch(fed[name], members))
        assert_same_statistics(resumed[name], references[name])


@on_ranks(2)
def test_a_state_fits_whatever_the_model_is_wrapped_in(rank: Rank) -> None:
    ddp = DistributedDataParallel(convert_sync_accum(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))).double())
    ddp(torch.randn(4, 2, dtype=torch.float64) + rank.index)
    plain = convert_sync_accum(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))).double()
    load_window_state_dict(plain, gather_window_state_dict(ddp))
    assert commit(plain).values == {"1": 8}


@on_ranks(2)
def test_ranks_that_gather_while_others_commit_are_told_and_nothing_changes(rank: Rank) -> None:
    layers = make_layers(a=3)
    feed_layers(layers, rank)
    commit(layers)
    feed_layers(layers, rank)
    before = take_snapshot(layers)
    verb = gather_window_state_dict if rank.index == 0 else commit
    with pytest.raises(LayoutMismatchError, match="call the same function on every rank"):
        verb(layers)
    assert_unchanged(layers, before)
    assert gather_window_state_dict(layers)["a"][0, 0] == 2 * 5 * 5 + 5


@on_ranks(2)
def test_ranks_with_different_layers_cannot_gather(rank: Rank) -> None:
    with pytest.raises(LayoutMismatchError, match=r"'a' \(3 channels.*'a' \(4 channels"):
        gather_window_state_dict(make_layers(a=3 + rank.index))


@on_ranks(2)
def test_a_saved_state_is_a_copy(rank: Rank) -> None:
    layers: nn.ModuleDict = make_layers(a=3)
    feed_layers(layers, rank)
    states = [window_state_dict(layers), gather_window_state_dict(layers)]
    before = [state["a"].clone() for state in states]
    commit(layers)
    assert all(torch.equal(state["a"], value) for state, value in zip(states, before, strict=True))
