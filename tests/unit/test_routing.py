"""Subclasses with a forward of their own: which of their calls are taken, and which do what torch does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from syncaccum import (
    LockstepError,
    SyncAccumBatchNorm,
    commit,
    convert_sync_accum,
    lockstep,
    revert_sync_accum,
)


class Fixed(nn.BatchNorm2d):
    """Frozen on purpose, also in train()."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class FixedThroughTorch(nn.BatchNorm2d):
    """The same through torch.batch_norm, whose arguments come in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, False, 0.0, self.eps, False
        )


class FixedByMomentum(nn.BatchNorm2d):
    """Normalises with the batch and tracks nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class Domains(nn.BatchNorm2d):
    """Second statistics for a second kind of data, as MixBatchNorm."""

    aux_mean: Tensor
    aux_var: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_buffer("aux_mean", torch.zeros(num_features))
        self.register_buffer("aux_var", torch.ones(num_features))
        self.domain = 0

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (self.running_mean, self.running_var) if self.domain == 0 else (self.aux_mean, self.aux_var)
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)


class Inner(nn.BatchNorm2d):
    """Holds a second BatchNorm, which is frozen."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.aux = nn.BatchNorm2d(num_features)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.aux(x)


class ThroughTorch(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.1, self.eps, True
        )


class ThroughHelpers(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._activate(self._normalise(x))

    def _normalise(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            input=x, running_mean=self.running_mean, running_var=self.running_var, weight=self.weight, bias=self.bias,
            training=self.training, momentum=0.1, eps=self.eps,
        )  # fmt: skip

    def _activate(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class Copied(nn.BatchNorm2d):
    """A copy of nn.BatchNorm's own forward, as timm's, that assigns a new counter."""

    def forward(self, x: Tensor) -> Tensor:
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked = self.num_batches_tracked + 1
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        return F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            factor,
            self.eps,
        )


class CountsAfterwards(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        if self.training:
            self.num_batches_tracked += 1
        return y


class Synchronised(nn.SyncBatchNorm):
    """As timm's SyncBatchNormAct: its forward is its parent's, and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self._activate(super().forward(x))

    def _activate(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class ByItself(nn.BatchNorm2d):
    """As detectron2's NaiveSyncBatchNorm: in training it computes, in eval it leaves that to torch."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        self.running_mean += self.momentum * (mean.detach() - self.running_mean)
        scale = self.weight * (var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 3 + 2


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_same_buffers(ours: nn.Module, theirs: nn.Module) -> None:
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)


@pytest.mark.parametrize("cls", [Fixed, FixedThroughTorch, FixedByMomentum])
def test_a_layer_that_is_frozen_in_its_own_forward_stays_so(cls: Callable[[int], nn.Module]) -> None:
    plain, layer = cls(3).train(), convert_sync_accum(cls(3).train())
    x = draw(8, 3, 4, 4)
    assert torch.equal(layer(x), plain(x))
    assert layer.window.count == 0
    commit(layer)
    assert_same_buffers(layer, plain)


def test_second_statistics_do_what_torch_does() -> None:
    plain, layer = Domains(3), convert_sync_accum(Domains(3), normalization="batch")
    for domain, x in enumerate((draw(8, 3, 4, 4), draw(4, 3, 4, 4) - 9)):
        plain.domain = layer.domain = domain
        torch.testing.assert_close(layer(x), plain(x))
    assert layer.window.count == 8 * 16
    commit(layer)
    plain.num_batches_tracked += 1  # this subclass does not count
    assert_same_buffers(layer, plain)


@pytest.mark.parametrize("convert_inner", [True, False])
def test_a_frozen_layer_inside_does_what_torch_does(convert_inner: bool) -> None:
    plain, layer = Inner(3).train(), Inner(3).train()
    plain.aux.eval()
    layer.aux.eval()
    convert_sync_accum(layer, normalization="batch")
    if not convert_inner:
        revert_sync_accum(layer.aux)
    x = draw(8, 3, 4, 4)
    torch.testing.assert_close(layer(x), plain(x))
    assert layer.window.count == 8 * 16
    commit(layer)
    assert_same_buffers(layer, plain)


@pytest.mark.parametrize("cls", [ThroughTorch, ThroughHelpers, Copied, CountsAfterwards, Synchronised])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_training_call_with_its_own_statistics_is_taken(cls: Any, momentum: float | None) -> None:
    layer, reference = cls(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    converted = convert_sync_accum(copy.deepcopy(layer), normalization="batch")
    for step in range(2):
        window = [draw(2 + step, 3, 4, 4), draw(3, 3, 5, 5)]
        expected = layer.train()(window[0])
        torch.testing.assert_close(converted(window[0]), expected)
        converted(window[1])
        assert converted.num_batches_tracked == step
        commit(converted)
        reference(torch.cat([x.movedim(1, -1).reshape(-1, 3) for x in window]).reshape(-1, 3, 1, 1))
        layer.load_state_dict(converted.state_dict())
    assert_same_buffers(converted, reference)
    torch.testing.assert_close(converted.eval()(window[0]), layer.eval()(window[0]))
    assert type(revert_sync_accum(converted)) is cls


class OwnMomentum(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.01)


class DefaultMomentum(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("cls", [OwnMomentum, DefaultMomentum])
def test_a_momentum_of_the_calls_own_is_the_commits(cls: Any, exact: bool) -> None:
    """The layer's own is 0.3, of which the call does not know."""
    plain, layer = cls(3, momentum=0.3), convert_sync_accum(cls(3, momentum=0.3))
    for step in range(3):
        whole = draw(7, 3, 4, 4) + step
        plain(whole)
        plain.num_batches_tracked += 1  # these subclasses do not count
        parts = list(whole.split([2, 5]))
        lockstep(layer, layer, parts) if exact else [layer(x) for x in parts]
        commit(layer)
        assert_same_buffers(layer, plain)
    # A commit of nothing leaves all as it is.
    commit(layer)
    assert_same_buffers(layer, plain)


@pytest.mark.parametrize("cls", [ThroughTorch, ThroughHelpers, Copied, CountsAfterwards, Synchronised])
def test_the_exact_mode_meets_in_a_subclass(cls: Any) -> None:
    plain, layer = cls(3).double(), convert_sync_accum(cls(3).double())
    if issubclass(cls, nn.SyncBatchNorm):  # which takes GPUs only, once there are ranks; here there are none
        plain.train()
    whole = draw(7, 3, 4, 4).double()
    ours = lockstep(layer, layer, list(whole.split([2, 5])))
    torch.testing.assert_close(torch.cat(ours), plain(whole))
    assert layer.num_batches_tracked == 0
    commit(layer)
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_compiled_subclasses_count_too() -> None:
    layer = convert_sync_accum(Copied(3), normalization="batch")
    compiled = torch.compile(layer, backend="eager")
    x = draw(8, 3, 4, 4)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), Copied(3)(x))
    assert layer.window.count == 2 * 8 * 16
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("cls", [Copied, CountsAfterwards])
def test_statistics_that_functional_call_gives_a_subclass_count_once(cls: type[nn.BatchNorm2d]) -> None:
    layer, plain = convert_sync_accum(cls(3)), cls(3)
    ours, theirs = ({name: b.clone() for name, b in plain.named_buffers()} for _ in range(2))
    with pytest.warns(UserWarning, match="functional_call gave it"):
        functional_call(layer, ours, (draw(2, 3, 4, 4),))
    functional_call(plain, theirs, (draw(2, 3, 4, 4),))
    torch.testing.assert_close(ours, theirs)
    assert ours["num_batches_tracked"] == 1
    assert layer.num_batches_tracked == 0
    assert layer.window.count == 0


def test_a_layer_that_normalises_by_itself_is_named_once() -> None:
    model = convert_sync_accum(nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(ByItself(3))))
    plain = ByItself(3)
    x = draw(8, 3, 4, 4)
    with pytest.warns(UserWarning, match=r"layer 1\.0 \(ByItself\) normalises by itself") as record:
        nn.Sequential(model, model)(x)
    assert len(record) == 1
    report = commit(model)
    assert report.layers == ("0",)
    assert set(report.values) == {"0"}
    assert isinstance(model[1][0], SyncAccumBatchNorm)
    alone = revert_sync_accum(model)[1][0]
    assert type(alone) is ByItself
    alone.reset_running_stats()
    assert torch.equal(alone(x), plain(x))
    assert_same_buffers(alone, plain)


def test_the_exact_mode_refuses_a_layer_that_normalises_by_itself() -> None:
    model = convert_sync_accum(nn.Sequential(ByItself(3), nn.BatchNorm2d(3)))
    with pytest.raises(LockstepError, match=r"layer 0 \(ByItself\) normalises by itself"):
        lockstep(model, model, [draw(4, 3, 4, 4)] * 2)


def test_a_layer_in_a_parametrized_class_goes_back_in_any_order() -> None:
    class Positive(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return F.softplus(w)

    from torch.nn.utils import parametrize

    x = draw(8, 3)
    for order in ("convert first", "parametrize first"):
        model = nn.Sequential(nn.BatchNorm1d(3))
        if order == "convert first":
            convert_sync_accum(model)
        parametrize.register_parametrization(model[0], "weight", Positive())
        expected = copy.deepcopy(model)
        convert_sync_accum(model)
        model(x)
        commit(model)
        revert_sync_accum(model)
        assert not isinstance(model[0], SyncAccumBatchNorm)
        assert parametrize.is_parametrized(model[0])
        torch.testing.assert_close(model[0].weight, expected[0].weight)
        model(x).sum().backward()
        parametrize.remove_parametrizations(model[0], "weight")
        assert type(model[0]) is nn.BatchNorm1d


def test_a_class_that_another_tool_made_on_top_is_an_error_naming_the_order() -> None:
    model = convert_sync_accum(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
    layer = model[1]
    for name in ("First", "Second"):
        layer.__class__ = type(name, (type(layer),), {})
    with pytest.raises(TypeError, match=r"layer 1 cannot be reverted: its class Second was made from First"):
        revert_sync_accum(model)
    assert isinstance(model[0], SyncAccumBatchNorm)  # nothing was


def test_names_of_a_users_own_stay_the_users() -> None:
    class Own(nn.BatchNorm1d):
        window = "a class attribute"

        def __init__(self, num_features: int) -> None:
            super().__init__(num_features)
            self.d_max = 42.0
            self.register_buffer("r_max", torch.tensor(7.0))
            self.normalization = nn.Identity()

        def discard(self) -> str:
            return f"{self.d_max} {self.r_max} {self.window}"

        def forward(self, x: Tensor) -> Tensor:
            self.d_max += 1
            return super().forward(self.normalization(x))

    layer = Own(3)
    convert_sync_accum(layer)
    layer(draw(8, 3))
    layer = copy.deepcopy(layer)
    commit(layer)
    assert layer.discard() == "43.0 7.0 a class attribute"
    assert isinstance(layer.normalization, nn.Identity)
    assert set(layer.state_dict()) == {*nn.BatchNorm1d(3).state_dict(), "r_max"}
    revert_sync_accum(layer)
    assert (type(layer), layer.d_max, layer.r_max) == (Own, 43.0, 7.0)
    assert "_accumulation" not in vars(layer)
