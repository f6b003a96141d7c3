"""timm's BatchNorm layers and models: converted, they accumulate, and keep their drop and their activation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch import Tensor, nn

from syncaccum import SyncAccumBatchNorm, commit, commit_on_step, convert_sync_accum, lockstep, revert_sync_accum
from tests.frameworks.steps import Steps
from tests.oracle import Oracle, assert_same_statistics

# Tiny, and all that timm's networks do with BatchNorm; the last is its EfficientNet, with squeeze and excitation.
MODELS = {"test_resnet": 15, "test_byobnet": 14, "test_efficientnet": 13}


def make_layer() -> Any:
    layer = BatchNormAct2d(3, act_layer=nn.SiLU, drop_layer=lambda: nn.Dropout2d(0.5), dtype=torch.float64)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def forward_seeded(layer: nn.Module, x: Tensor) -> Any:
    torch.manual_seed(1)  # the same channels are dropped
    return layer(x)


def test_a_batch_norm_act_keeps_drop_and_activation_and_accumulates() -> None:
    plain = make_layer()
    layer: Any = convert_sync_accum(copy.deepcopy(plain), normalization="batch")
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    y = forward_seeded(layer, x)
    torch.testing.assert_close(y, forward_seeded(plain, x))
    assert (y == 0).all((2, 3)).any()  # a dropped channel
    assert layer.window.count == 100
    commit(layer)
    assert_same_statistics(layer, plain)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    assert type(revert_sync_accum(layer)) is BatchNormAct2d


def test_two_micro_batches_of_a_batch_norm_act_are_one_window() -> None:
    layer = convert_sync_accum(make_layer())
    oracle = Oracle(layer)
    for _ in range(2):
        for n in (3, 1):
            oracle.forward(torch.randn(n, 3, 5, 5, dtype=torch.float64) + 2)
        commit(layer)
        oracle.check_commit()


def test_timms_sync_batch_norm_accumulates_on_the_cpu_and_keeps_drop_and_activation() -> None:
    plain = make_layer()
    sync = convert_sync_batchnorm(copy.deepcopy(plain))
    assert type(sync) is SyncBatchNormAct
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    layer: Any = convert_sync_accum(sync, normalization="batch")
    torch.testing.assert_close(forward_seeded(layer, x), forward_seeded(plain, x))
    assert layer.window.count == 100
    commit(layer)
    assert_same_statistics(layer, plain)
    assert type(revert_sync_accum(layer)) is SyncBatchNormAct


@pytest.mark.parametrize("name", MODELS)
def test_two_windows_of_uneven_micro_batches_train_as_whole_batches_do(name: str) -> None:
    reference = timm.create_model(name, num_classes=5).double()
    model = convert_sync_accum(copy.deepcopy(reference))
    assert sum(isinstance(m, SyncAccumBatchNorm) for m in model.modules()) == MODELS[name]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, reference)]
    for _ in range(2):
        whole, classes = torch.randn(6, 3, 64, 64, dtype=torch.float64), torch.randint(5, (6,))
        parts = list(zip(whole.split((3, 1, 2)), classes.split((3, 1, 2)), strict=True))
        losses = lockstep(
            model, lambda part: nn.functional.cross_entropy(model(part[0]), part[1], reduction="sum") / 6, parts
        )
        torch.stack(losses).sum().backward()
        nn.functional.cross_entropy(reference(whole), classes).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        commit(model)
    for key, expected in reference.state_dict().items():
        # Float64's 1e-16 through some forty layers and two steps, relative to each tensor's largest entry; absolute for
        # a bias that only shifts what the next BatchNorm sees, and so stays zero but for rounding.
        atol = 1e-9 * float(expected.abs().max()) + 1e-14
        torch.testing.assert_close(model.state_dict()[key], expected, rtol=0, atol=atol, msg=f"{key}: {{}}".format)


@pytest.mark.parametrize("name", ["sgd", "lookahead_adamw"])
def test_the_loop_of_train_py_commits_each_window(name: str) -> None:
    """Its scaler takes the step where ``need_update``, and its last window is short."""
    model = timm.create_model("test_resnet", num_classes=5).double()
    convert_sync_accum(model)
    optimizer = create_optimizer_v2(model, opt=name, lr=0.01)
    commit_on_step(model, optimizer)
    steps = Steps(model, getattr(optimizer, "_base_optimizer", optimizer))
    scaler = NativeScaler(device="cpu")
    for batch, last in [(index, index == 5) for index in range(6)]:
        images, classes = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.randint(5, (2,))
        loss = nn.functional.cross_entropy(model(images), classes) / 4
        scaler(loss, optimizer, parameters=model.parameters(), need_update=last or batch % 4 == 3)
        if last or batch % 4 == 3:
            optimizer.zero_grad()
    assert steps.windows == [4, 2]
