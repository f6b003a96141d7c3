"""summary: what it says of each layer, that it changes nothing, and how it looks without rich."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from syncaccum import (
    NoLayersError,
    SyncAccumBatchNorm,
    commit,
    convert_sync_accum,
    not_counted,
    revert_sync_accum,
    summary,
)
from syncaccum.layer import fused, native
from tests.oracle import assert_unchanged, concatenate, take_snapshot


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if rich were not installed, in a terminal of 80 columns."""
    for name in ("rich", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("COLUMNS", "80")


def make_model(**arguments: Any) -> Any:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.ReLU()))
    return convert_sync_accum(model.double(), **arguments)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 3 + 2


def modes(model: nn.Module) -> list[str]:
    return [layer.mode for layer in summary(model).layers]


# --- settings and windows --------------------------------------------------------------------------------------


def test_a_layers_settings_are_listed() -> None:
    model = make_model(normalization="batch").float()
    first, second = summary(model).layers
    assert (first.name, second.name) == ("0", "1.0")
    assert (first.channels, first.mode, first.policy, first.dtype) == (3, "accumulates", "batch", torch.float32)
    assert (first.device, first.group) == (torch.device("cpu"), "this process alone")
    assert (first.momentum, second.momentum) == (0.1, None)


def test_the_open_window_and_the_committed_batches_are_counted() -> None:
    model = make_model()
    for size in (4, 2):
        model(draw(size, 3, 5))
    first = summary(model).layers[0]
    assert (first.micro_batches, first.values, first.committed) == (2, 30, 0)
    commit(model)
    model[0](draw(7, 3))
    first, second = summary(model).layers
    assert (first.micro_batches, first.values, first.committed) == (1, 7, 1)
    assert (second.micro_batches, second.values, second.committed) == (0, 0, 1)


def test_a_shared_layer_is_listed_once_with_each_of_its_forwards() -> None:
    layer = SyncAccumBatchNorm(3)
    model = nn.Sequential(layer, nn.ReLU(), layer, copy.copy(layer))
    model(torch.randn(4, 3))
    (only,) = summary(model).layers
    assert (only.name, only.micro_batches, only.values) == ("0", 3, 12)


def test_names_are_those_without_wrappers() -> None:
    inner = make_model()
    inner[1] = torch.compile(inner[1], backend="eager")
    assert [layer.name for layer in summary(nn.DataParallel(inner)).layers] == ["0", "1.0"]
    assert [layer.name for layer in summary(inner[0]).layers] == ["SyncAccumBatchNorm1d"]


def test_a_process_group_is_named(group: None) -> None:
    assert summary(make_model()).layers[0].group == "gloo, 1 rank"


def test_a_group_without_a_chosen_backend_is_named_by_those_of_its_devices() -> None:
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    assert re.fullmatch(r"cpu:gloo(,\w+:\w+)*, 1 rank", summary(make_model()).layers[0].group)
    dist.destroy_process_group()


# --- what a forward does now -----------------------------------------------------------------------------------


def test_frozen_layers_are_in_eval_mode() -> None:
    model = make_model()
    model[0].eval()
    assert modes(model) == ["eval", "accumulates"]


def test_forwards_that_do_not_count_are_told() -> None:
    model = make_model()
    with not_counted(model[1]):
        assert modes(model) == ["accumulates", "not counted"]
    model[0].momentum = 0
    assert modes(model) == ["not counted", "accumulates"]
    # A layer that had momentum 0 from the start counts.
    assert modes(convert_sync_accum(nn.BatchNorm1d(3, momentum=0))) == ["accumulates"]


def test_layers_without_statistics_are_listed_as_untracked() -> None:
    model = make_model()
    model.append(convert_sync_accum(nn.BatchNorm1d(3, affine=False, track_running_stats=False)))
    model(draw(4, 3))
    model[0].track_running_stats = False
    first, _, last = summary(model).layers
    # Switched off since: the window is still there.
    assert (first.mode, first.micro_batches, first.values) == ("untracked", 1, 4)
    assert (last.mode, last.dtype, last.micro_batches, last.values, last.committed) == ("untracked", *[None] * 4)


class Own(nn.BatchNorm1d):
    """Normalises by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0) + self.eps).sqrt()


@pytest.mark.filterwarnings("ignore:.*normalises by itself:UserWarning")
def test_a_layer_that_normalises_itself_is_told_after_a_forward() -> None:
    model = convert_sync_accum(nn.Sequential(Own(3), nn.BatchNorm1d(3)))
    model(torch.randn(4, 3))
    assert modes(model) == ["normalises itself", "accumulates"]
    assert summary(model).layers[0].kernels == "its own"


# --- drift -----------------------------------------------------------------------------------------------------


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def drifts_of(layer: nn.Module) -> tuple[Any, Any]:
    (only,) = summary(layer).layers
    return only.mean_drift, only.deviation_drift


def test_drift_is_the_documented_formula_of_the_windows_values() -> None:
    model = make_model()
    model(draw(8, 3, 5))
    commit(model)
    mean, variance, eps = model[0].running_mean.clone(), model[0].running_var.clone(), model[0].eps
    window = [draw(4, 3, 6) * 2 - 1, draw(1, 3)]
    for x in window:
        model[0](x)
    columns = concatenate(window)
    of_mean = rms((columns.mean(0) - mean) / (variance + eps).sqrt())
    of_deviation = rms(((columns.var(0) + eps) / (variance + eps)).sqrt().log())
    assert drifts_of(model[0]) == pytest.approx((of_mean, of_deviation))


def test_equal_statistics_have_no_drift_and_a_shift_is_in_deviations() -> None:
    layer = SyncAccumBatchNorm(3, momentum=1.0, eps=0.0, dtype=torch.float64)
    x = draw(50, 3)
    layer(x)
    commit(layer)
    layer(x)
    # Sums of squares lose some digits where they are subtracted.
    assert drifts_of(layer) == pytest.approx((0, 0), abs=1e-12)
    layer.discard()
    layer(1.1 * (x - x.mean(0)) + x.mean(0) + 2 * x.std(0))
    assert drifts_of(layer) == pytest.approx((2, math.log(1.1)))


def test_there_is_no_drift_where_there_is_nothing_to_compare() -> None:
    layer = SyncAccumBatchNorm(3)
    layer(torch.randn(4, 3))
    assert drifts_of(layer) == (None, None)  # the running statistics are still 0 and 1
    commit(layer)
    assert drifts_of(layer) == (None, None)  # the window is empty
    layer(torch.randn(1, 3))
    assert drifts_of(layer)[0] is not None
    assert drifts_of(layer)[1] is None  # one value has no variance
    layer(torch.full((1, 3), math.nan))
    assert all(math.isnan(drift) for drift in drifts_of(layer))


# --- what it does not do ---------------------------------------------------------------------------------------


def states_of(layers: Sequence[SyncAccumBatchNorm]) -> list[dict[str, Any]]:
    """All but what is in tensors."""
    known = [vars(layer._accumulation) for layer in layers]
    return [{k: v for k, v in one.items() if k not in ("window", "ledger")} | {"said": {*one["said"]}} for one in known]


@pytest.mark.parametrize("policy", ["renorm", "window"])
def test_it_changes_nothing(policy: str) -> None:
    model = make_model(normalization=policy)
    model(draw(4, 3))
    layers = [model[0], model[1][0]]
    windows = [layer._accumulation.window for layer in layers]
    before, states, generator = take_snapshot(model), states_of(layers), torch.get_rng_state()
    repr(summary(model))
    assert_unchanged(model, before)
    assert states_of(layers) == states
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(layer._accumulation.window is window for layer, window in zip(layers, windows, strict=True))


def test_a_pruned_layer_keeps_its_old_window() -> None:
    layer: Any = convert_sync_accum(nn.BatchNorm1d(3))
    layer(torch.randn(4, 3))
    commit(layer)
    layer(torch.randn(5, 3))
    for name in ("weight", "bias"):
        setattr(layer, name, nn.Parameter(getattr(layer, name)[:2].detach()))
    layer.running_mean, layer.running_var, layer.num_features = layer.running_mean[:2], layer.running_var[:2], 2
    pruned = summary(layer).layers[0]
    assert (pruned.channels, pruned.values, pruned.mean_drift) == (2, 5, None)
    assert layer._accumulation.window.numel() == 7


def test_layers_without_memory_have_no_figures() -> None:
    layer = SyncAccumBatchNorm(3, device="meta")
    layer(torch.randn(4, 3, device="meta"))
    on_meta = summary(layer).layers[0]
    assert (on_meta.device.type, on_meta.channels, on_meta.micro_batches) == ("meta", 3, 1)
    assert (on_meta.values, on_meta.committed, on_meta.mean_drift, on_meta.deviation_drift) == (None,) * 4


def test_kernels_go_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = native.which().startswith("compiled")
    assert summary(SyncAccumBatchNorm(3)).layers[0].kernels == ("compiled" if compiled else "torch")
    assert summary(SyncAccumBatchNorm(3)).cpu_passes == native.which()
    for triton, kernels in ((None, "SyncBatchNorm"), (object(), "SyncBatchNorm and Triton")):
        monkeypatch.setattr(fused, "load_kernels", lambda found=triton: found)
        with FakeTensorMode():
            there = summary(SyncAccumBatchNorm(3, device="cuda")).layers[0]
        assert (there.device.type, there.kernels, there.values) == ("cuda", kernels, None)


def test_a_model_without_layers_is_refused_with_the_remedy() -> None:
    model = make_model()
    revert_sync_accum(model)
    with pytest.raises(NoLayersError, match=r"call convert_sync_accum\(model\) first"):
        summary(model)


def test_other_batch_norms_are_named() -> None:
    model = make_model()
    model.append(nn.BatchNorm2d(3))
    model.append(nn.Sequential(nn.LazyBatchNorm1d(), nn.InstanceNorm1d(3)))
    assert summary(model).not_converted == ("2", "3.0")


# --- its looks -------------------------------------------------------------------------------------------------


def make_table() -> Any:
    """A summary whose figures are given."""
    model = make_model()
    model[0](torch.ones(2, 3).double())
    first, second = summary(model).layers
    layers = (
        dataclasses.replace(first, channels=2048, values=1234567, mean_drift=0.0321, deviation_drift=1.5),
        dataclasses.replace(second, momentum=0.1),
    )
    return dataclasses.replace(summary(model), layers=layers, cpu_passes="compiled, AVX2")


def set_kernels(table: Any, *kernels: str) -> Any:
    layers = [dataclasses.replace(layer, kernels=of) for layer, of in zip(table.layers, kernels, strict=True)]
    return dataclasses.replace(table, layers=tuple(layers))


@pytest.mark.usefixtures("plain")
def test_the_plain_table_has_shared_settings_above_it() -> None:
    table = set_kernels(make_table(), "compiled", "compiled")
    assert str(table) == repr(table)
    assert str(table).splitlines() == [
        "2 SyncAccumBatchNorm layers",
        "mode: accumulates; policy: window; momentum: 0.1; dtype: float64; device: cpu;",
        "group: this process alone; kernels: compiled",
        "",
        "                  micro-             committed   mean  deviation",
        "layer  channels  batches     values    batches  drift      drift",
        "-----  --------  -------  ---------  ---------  -----  ---------",
        "0         2,048        1  1,234,567          0  0.032      1.500",
        "1.0           3        0          0          0",
        "",
        "passes for CPUs: compiled, AVX2",
    ]


@pytest.mark.usefixtures("plain")
def test_settings_that_differ_are_columns() -> None:
    lines = str(set_kernels(make_table(), "compiled", "its own")).splitlines()
    assert "kernels" not in lines[1] + lines[2]
    assert [line.split()[:2] for line in lines[5:9]] == [
        ["layer", "kernels"], ["-----", "--------"], ["0", "compiled"], ["1.0", "its"],
    ]  # fmt: skip


@pytest.mark.usefixtures("plain")
def test_long_names_are_folded_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "backbone.layer4.0.downsample.with_a_name_that_is_as_long_as_some_are.norm" + "x" * 40
    table = make_table()
    layers = (dataclasses.replace(table.layers[0], name=name), *table.layers[1:])
    table = dataclasses.replace(table, layers=layers, not_converted=(name, name))
    for columns in (200, 100, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = str(table).splitlines()
        assert max(map(len, lines)) <= columns
        rows = [line for line in lines[6:] if line and line[0] != "-"]
        # The figures are in the first of a name's lines.
        folded = [line.split()[0] for line in rows[: rows.index(next(r for r in rows if r.startswith("1.0")))]]
        assert "".join(folded).removeprefix("layer") == name
    # No room for the figures: then they are whole, and lines are longer.
    monkeypatch.setenv("COLUMNS", "30")
    assert "1,234,567" in str(table)
