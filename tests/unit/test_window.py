"""Open windows saved and loaded by one process, and states that fit no window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncaccum import (
    NonFiniteStatisticsError,
    SyncAccumBatchNorm,
    commit,
    convert_sync_accum,
    discard,
    gather_window_state_dict,
    load_window_state_dict,
    window_state_dict,
)
from syncaccum.errors import NoLayersError


def small_model() -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    return convert_sync_accum(model.double(), normalization="running")


def open_windows(model: nn.Module) -> list[Tensor]:
    return [layer.window.pack() for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]


def test_windows_are_saved_and_loaded_and_additive() -> None:
    first, second, whole = small_model(), small_model(), small_model()
    for model in (first, whole):
        model(torch.ones(3, 3).double())
    x = torch.randn(4, 3).double()
    for model in (second, whole):
        model(x)
    state_a, state_b = window_state_dict(first), window_state_dict(second)
    resumed = small_model()
    load_window_state_dict(resumed, {name: state_a[name] + state_b[name] for name in state_a})
    commit(resumed)
    commit(whole)
    assert all(torch.equal(a, b) for a, b in zip(resumed.buffers(), whole.buffers(), strict=True))


def test_a_process_that_is_alone_gathers_its_own_and_takes_every_share() -> None:
    model, resumed = small_model(), small_model()
    model(torch.randn(4, 3).double())
    state = gather_window_state_dict(model)
    assert {name: tuple(share.shape) for name, share in state.items()} == {"0": (1, 7), "1.0": (1, 7)}
    load_window_state_dict(resumed, {name: torch.cat([share, share, share]) for name, share in state.items()})
    for ours, once in zip(open_windows(resumed), open_windows(model), strict=True):
        torch.testing.assert_close(ours, 3 * once)


def change(layer: str, value: Callable[[Tensor], Any]) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    """What turns a good state into one with another value for a layer."""
    return lambda state: {**state, layer: value(state[layer])}


def with_count(count: float) -> Callable[[Tensor], Tensor]:
    return lambda window: torch.cat([torch.tensor([count], dtype=torch.float64), window[1:]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: {"0": state["0"]}, r"missing \['1.0'\], unknown \[\]. Build and convert the model as"),
        (lambda state: {**state, "9": state["0"]}, r"missing \[\], unknown \['9'\]"),
        (change("1.0", lambda w: w[:3]), r"layer 1.0: expected .* shape \(7,\), or \(shares, 7\), got .*\(3,\)"),
        (change("1.0", lambda w: w.reshape(1, 1, 7)), r"layer 1.0: expected .* got torch.float64 of shape \(1, 1, 7\)"),
        (change("1.0", lambda w: w.reshape(7, 1)), r"layer 1.0: expected .* got torch.float64 of shape \(7, 1\)"),
        (change("1.0", lambda w: w.sum()), r"layer 1.0: expected .* got torch.float64 of shape \(\)"),
        (change("1.0", lambda w: w.float()), r"layer 1.0: expected .* got torch.float32 .* keep float64"),
        (change("1.0", with_count(-1.0)), r"layer 1.0 is damaged: its count is -1.0, expected a whole number"),
        (change("1.0", with_count(1.5)), "its count is 1.5"),
        (change("1.0", with_count(torch.nan)), "its count is nan"),
        (change("1.0", with_count(torch.inf)), "its count is inf"),
        (
            change("1.0", lambda w: torch.stack([w, -w])),
            r"its count is \[4.0, -4.0\].*Take another checkpoint, or .* discard\(model\)",
        ),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_names_why_and_loads_nothing(
    spoil: Callable[[dict[str, Tensor]], dict[str, Any]], message: str
) -> None:
    model = small_model()
    model(torch.randn(4, 3).double())
    before = open_windows(model)
    good = {name: 2 * window for name, window in window_state_dict(model).items()}
    good["1.0"] /= 2
    with pytest.raises(ValueError, match=message):
        load_window_state_dict(model, spoil(good))
    assert all(torch.equal(a, b) for a, b in zip(open_windows(model), before, strict=True))


def test_sums_that_are_not_finite_are_kept_for_the_commit_to_name() -> None:
    model, resumed = small_model(), small_model()
    model[1](torch.full((4, 3), torch.nan, dtype=torch.float64))
    load_window_state_dict(resumed, window_state_dict(model))
    with pytest.raises(NonFiniteStatisticsError, match=r"rank 0: 1\.0\)"):
        commit(resumed)
    discard(resumed)
    assert commit(resumed).layers == ()


def test_one_of_several_ranks_must_join_its_group_before_shares_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    state = gather_window_state_dict(model)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"one of 2 ranks .*init_process_group\(\): call that first"):
        load_window_state_dict(model, state)
    with pytest.raises(RuntimeError, match=r"init_process_group\(\): call that first"):
        gather_window_state_dict(model)
    load_window_state_dict(model, window_state_dict(model))  # a rank's own window needs no group
    monkeypatch.setenv("WORLD_SIZE", "1")
    load_window_state_dict(model, state)


@pytest.mark.parametrize("verb", [window_state_dict, gather_window_state_dict])
def test_a_model_without_layers_is_told_to_convert_first(verb: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(NoLayersError, match=r"convert_sync_accum\(model\) first"):
        verb(nn.Sequential(nn.BatchNorm1d(3)))
