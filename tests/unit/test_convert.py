"""Conversion and reversion: what survives, what is refused, what is left alone."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncaccum import AccumulateBatchNorm, SyncAccumBatchNorm, commit, convert_sync_accum, revert_sync_accum


class Net(nn.Module):
    """Nested containers, a shared layer, a layer referenced twice by name, frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2))
        self.blocks = nn.ModuleList([nn.ModuleDict({"norm": nn.BatchNorm2d(4, affine=False)}) for _ in range(2)])
        self.shared = self.stem[1]
        self.head = nn.BatchNorm1d(4, track_running_stats=False)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.head.weight.requires_grad_(False)
        self.blocks[1].eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.stem(x))
        for block in self.blocks:
            x = block["norm"](x)
        return self.head(self.instance(x).mean((2, 3)))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that tells one model from another: classes, attributes, and tensors by identity."""
    seen = {}
    for name, module in model.named_modules(remove_duplicate=False):
        seen[name] = (
            type(module),
            {k: v for k, v in vars(module).items() if not k.startswith("_")},
            dict(module._parameters),
            dict(module._buffers),
        )
    return seen


def test_parameters_and_buffers_stay_the_same_objects() -> None:
    model = Net()
    before = [*model.parameters(), *model.buffers()]
    assert convert_sync_accum(model) is model
    assert all(a is b for a, b in zip(before, [*model.parameters(), *model.buffers()], strict=True))


def test_every_batch_norm_is_converted_and_nothing_else() -> None:
    model = convert_sync_accum(Net(), normalization="running")
    layers = {n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, SyncAccumBatchNorm)}
    assert layers == {"stem.1", "shared", "blocks.0.norm", "blocks.1.norm", "head"}
    assert type(model.instance) is nn.InstanceNorm2d
    assert model.shared is model.stem[1]
    assert not model.blocks[1].training
    assert not model.head.weight.requires_grad
    assert (model.shared.eps, model.shared.momentum, model.shared.normalization) == (1e-3, 0.2, "running")
    assert isinstance(model.shared, nn.BatchNorm2d)


def test_the_root_itself_is_converted_and_reverted() -> None:
    layer = nn.BatchNorm2d(3)
    assert isinstance(convert_sync_accum(layer), SyncAccumBatchNorm)
    assert type(revert_sync_accum(layer)) is nn.BatchNorm2d


def test_a_reverted_model_equals_one_that_never_was_converted() -> None:
    model = Net()
    before = snapshot(model)
    names = {name: set(vars(m)) for name, m in model.named_modules()}
    revert_sync_accum(convert_sync_accum(model))
    assert snapshot(model).keys() == before.keys()
    for name, (cls, attributes, parameters, buffers) in snapshot(model).items():
        assert (cls, attributes) == before[name][:2]
        assert all(parameters[k] is v for k, v in before[name][2].items())
        assert all(buffers[k] is v for k, v in before[name][3].items())
    assert {name: set(vars(m)) for name, m in model.named_modules()} == names


def test_state_dicts_load_strictly_both_ways() -> None:
    plain, converted = Net(), convert_sync_accum(Net())
    converted.load_state_dict(plain.state_dict(), strict=True)
    converted(torch.randn(4, 3, 8, 8))
    commit(converted)
    plain.load_state_dict(converted.state_dict(), strict=True)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(plain.eval()(x), converted.eval()(x))


def test_hooks_survive() -> None:
    calls: list[str] = []
    layer = nn.BatchNorm1d(3)
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("post"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    convert_sync_accum(layer)
    layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert calls == ["pre", "post", "backward"]


def test_the_check_of_dimensions_survives() -> None:
    for cls, good, bad in (
        (nn.BatchNorm1d, (4, 3, 2), (4, 3, 2, 2)),
        (nn.BatchNorm2d, (4, 3, 2, 2), (4, 3)),
        (nn.BatchNorm3d, (4, 3, 2, 2, 2), (4, 3, 2, 2)),
    ):
        layer = convert_sync_accum(cls(3))
        layer(torch.randn(good))
        with pytest.raises(ValueError, match="expected"):
            layer(torch.randn(bad))


def test_dtype_and_device_survive() -> None:
    layer = convert_sync_accum(nn.BatchNorm1d(3, dtype=torch.float64))
    assert layer.weight.dtype == layer.running_mean.dtype == torch.float64
    assert convert_sync_accum(nn.BatchNorm1d(3, device="meta"))._window.is_meta


def test_an_optimizer_built_before_still_trains_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert_sync_accum(model)
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_converting_twice_changes_nothing() -> None:
    model = convert_sync_accum(Net(), normalization="running")
    model(torch.randn(2, 3, 8, 8))
    before = snapshot(model), model.shared.window.pack()
    convert_sync_accum(model, normalization="batch")
    assert snapshot(model) == before[0]
    assert torch.equal(model.shared.window.pack(), before[1])


def test_converted_models_are_copied_and_pickled() -> None:
    model = convert_sync_accum(Net())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.shared) is type(model.shared)
        assert twin.shared is twin.stem[1]
        twin(torch.randn(2, 3, 8, 8))
        commit(twin)
        assert type(revert_sync_accum(twin).shared) is nn.BatchNorm2d
    assert model.shared.num_batches_tracked == 0


def test_sync_batch_norm_is_converted_and_works_without_a_gpu() -> None:
    layer = convert_sync_accum(nn.SyncBatchNorm(3))
    assert not isinstance(layer, nn.SyncBatchNorm)  # DDP would insist on a GPU
    layer(torch.randn(4, 3))
    with pytest.raises(ValueError, match="at least 2D"):
        layer(torch.randn(3))
    commit(layer)
    assert type(revert_sync_accum(layer)) is nn.SyncBatchNorm
    assert layer.process_group is None


def test_reverting_an_open_window_warns() -> None:
    model = convert_sync_accum(nn.Sequential(nn.BatchNorm1d(3)))
    model(torch.randn(4, 3))
    with pytest.warns(UserWarning, match="dropped the open windows of 0: commit"):
        revert_sync_accum(model)


def test_a_layer_with_no_class_to_go_back_to_stays_with_a_warning() -> None:
    model = nn.Sequential(SyncAccumBatchNorm(3))
    with pytest.warns(UserWarning, match="no class to go back to: 0"):
        revert_sync_accum(model)
    assert type(model[0]) is SyncAccumBatchNorm


def test_a_lazy_layer_is_an_error_that_says_how_to_materialise_it() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match=r"lazy layers.*: 1\. Run one forward on a sample batch first"):
        convert_sync_accum(model)
    assert type(model[0]) is nn.BatchNorm1d
    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    lazy(torch.randn(2, 3, 4, 4))
    assert isinstance(convert_sync_accum(lazy)[0], SyncAccumBatchNorm)


@pytest.mark.parametrize("arguments", [{"normalization": "group"}, {"process_group": -100}])
def test_bad_arguments_convert_nothing(arguments: dict[str, Any]) -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"normalization must be|not a member"):
        convert_sync_accum(model, **arguments)
    assert type(model.shared) is nn.BatchNorm2d


# --- subclasses -----------------------------------------------------------------------------------------------


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's does: a copy of nn.BatchNorm2d's forward that counts batches itself, then drop, then activation."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop = nn.Dropout2d(0.5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"expected 4D input (got {x.ndim}D input)")
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        bn_training = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            bn_training,
            factor,
            self.eps,
        )
        return self.act(self.drop(x))


class Upcasting(nn.BatchNorm2d):
    """A forward of its own around its parent's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Renamed(nn.BatchNorm2d):
    """No forward of its own."""


class Bespoke(nn.BatchNorm2d):
    """Normalises by itself: nothing to take part in."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.std() + self.eps)


def test_a_subclass_with_drop_and_activation_keeps_both() -> None:
    plain, layer = BatchNormAct2d(3), convert_sync_accum(BatchNormAct2d(3), normalization="batch")
    x = torch.randn(4, 3, 5, 5)
    torch.manual_seed(0)
    expected = plain(x)
    torch.manual_seed(0)
    torch.testing.assert_close(layer(x), expected)
    assert layer.num_batches_tracked == 0
    assert layer.window.count == 100
    commit(layer)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked == 1
    assert layer.track_running_stats
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    assert type(revert_sync_accum(copy.deepcopy(layer))) is BatchNormAct2d


def test_a_forward_around_its_parents_is_kept() -> None:
    layer = convert_sync_accum(Upcasting(3))
    y = layer(torch.randn(4, 3, 5, 5, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert layer.window.count == 100
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(4, 3))
    assert layer.track_running_stats


def test_subclasses_pickle_and_keep_their_class() -> None:
    for cls in (BatchNormAct2d, Upcasting, Renamed):
        layer = pickle.loads(pickle.dumps(convert_sync_accum(cls(3))))
        assert isinstance(layer, cls)
        layer(torch.randn(2, 3, 4, 4))
        commit(layer)
        assert type(revert_sync_accum(layer)) is cls


def test_layers_that_normalise_by_themselves_are_named_once_by_their_first_training_forward() -> None:
    model = nn.Sequential(Bespoke(3), nn.Sequential(Bespoke(3)), nn.BatchNorm2d(3))
    convert_sync_accum(model)
    x = torch.randn(2, 3, 4, 4)
    model.eval()(x)
    with pytest.warns(UserWarning, match="normalises by itself") as record:
        nn.Sequential(model.train(), model)(x)
    said = [str(warning.message) for warning in record]
    assert [text.split(" normalises")[0] for text in said] == ["layer 0 (Bespoke)", "layer 1.0 (Bespoke)"]
    assert commit(model).values == {"2": 64}
    assert type(revert_sync_accum(model)[0]) is Bespoke


def test_torchs_lazy_quantized_and_other_kinds_stay_out_of_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = convert_sync_accum(nn.Sequential(nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3)))
    assert [type(m) for m in model] == [nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d]


# --- AccumulateBatchNorm --------------------------------------------------------------------------------------


def test_accumulate_batch_norm_takes_the_class_and_its_arguments() -> None:
    layer = AccumulateBatchNorm(nn.BatchNorm3d, 4, eps=1e-3, momentum=None, affine=False)
    assert (layer.eps, layer.momentum, layer.weight, layer.normalization) == (1e-3, None, None, "running")
    assert isinstance(layer, nn.BatchNorm3d)
    assert type(revert_sync_accum(layer)) is nn.BatchNorm3d


@pytest.mark.parametrize("bad", [nn.InstanceNorm2d, nn.Linear, "BatchNorm2d"])
def test_accumulate_batch_norm_refuses_what_is_no_batch_norm(bad: Any) -> None:
    with pytest.raises(ValueError, match="bn_class must be a BatchNorm class"):
        AccumulateBatchNorm(bad, 4)


@pytest.mark.parametrize("momentum", [1.5, -0.1, float("nan")])
def test_a_layer_that_cannot_be_converted_is_named_and_none_is(momentum: float) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3, momentum=momentum)), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"layer 1\.0 cannot be converted: momentum must be in \[0, 1\]"):
        convert_sync_accum(model)
    assert not any(isinstance(module, SyncAccumBatchNorm) for module in model.modules())
    revert_sync_accum(model)
    assert type(model[0]) is nn.BatchNorm1d
