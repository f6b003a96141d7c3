"""Open windows saved by some ranks and taken up by others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from syncaccum import (
    commit,
    load_window_state_dict,
    window_state_dict,
)
from tests.distributed.oracle import assert_committed, feed_layers, make_layers, make_references
from tests.ranks import Rank, on_ranks, run_on_ranks

State = dict[str, Tensor]


def save_windows(rank: Rank) -> State:
    layers = make_layers(a=3, b=4)
    feed_layers(layers, rank)
    return window_state_dict(layers)


def load_and_commit(rank: Rank, states: Sequence[State]) -> list[Tensor]:
    """Every size-th saved state, from this rank's on, added up; none at all is a window that saw nothing."""
    layers = make_layers(a=3, b=4)
    mine = states[rank.index :: rank.size]
    if mine:
        load_window_state_dict(layers, {name: sum(state[name] for state in mine) for name in mine[0]})
    commit(layers)
    return list(layers.buffers())


def feed_and_commit(rank: Rank) -> list[Tensor]:
    layers = make_layers(a=3, b=4)
    feed_layers(layers, rank)
    commit(layers)
    return list(layers.buffers())


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(3, 2), (3, 1), (2, 3), (1, 3)])
def test_windows_saved_by_some_ranks_are_committed_by_fewer_or_more(saved_by: int, loaded_by: int) -> None:
    states = run_on_ranks(save_windows, saved_by)
    expected = run_on_ranks(feed_and_commit, saved_by)[0]
    for buffers in run_on_ranks(load_and_commit, loaded_by, states):
        # The order of summation changed, so not bit for bit; float64 has 16 digits.
        torch.testing.assert_close(buffers, expected, rtol=1e-14, atol=1e-14)


@on_ranks(2)
def test_a_run_resumed_in_mid_window_commits_what_one_that_never_stopped_does(rank: Rank) -> None:
    """torchgpipe's layer breaks when it resumes in the middle of a window."""
    layers = make_layers(a=3, b=4)
    references = make_references(layers)
    first = feed_layers(layers, rank, seed=0)
    checkpoint = (layers.state_dict(), window_state_dict(layers))

    resumed = make_layers(a=3, b=4)
    resumed.load_state_dict(checkpoint[0])
    load_window_state_dict(resumed, checkpoint[1])
    for model in (layers, resumed):
        second = feed_layers(model, rank, seed=1)
        commit(model)
    assert all(torch.equal(a, b) for a, b in zip(resumed.buffers(), layers.buffers(), strict=True))
    assert_committed(resumed, references, {name: first[name] + second[name] for name in first})


@on_ranks(2)
def test_a_saved_state_is_a_copy(rank: Rank) -> None:
    layers: nn.ModuleDict = make_layers(a=3)
    feed_layers(layers, rank)
    state = window_state_dict(layers)
    before = state["a"].clone()
    commit(layers)
    assert torch.equal(state["a"], before)
