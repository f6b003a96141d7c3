"""lockstep in one process: exact against nn.BatchNorm on torch.cat, thread state, errors that leave nothing behind."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from syncaccum import (
    LockstepError,
    NoLayersError,
    SyncAccumBatchNorm,
    TooFewValuesError,
    commit,
    convert_sync_accum,
    lockstep,
)
from tests.oracle import concatenate
from tests.unit.test_convert import BatchNormAct2d

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


class Branching(nn.Module):
    """Branches that join, a layer used twice, several layers per block, a reduction to (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.right = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, affine=False))
        self.twice = nn.BatchNorm2d(4, momentum=None)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.left(x) + self.right(x))
        y = self.untracked(torch.relu(self.twice(y)))
        return self.head(y.mean((2, 3)))


def pair(make: Callable[[], nn.Module] = Branching, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A converted model and an unconverted one with the same parameters."""
    reference = make().to(dtype)
    model = make().to(dtype)
    model.load_state_dict(reference.state_dict())
    return convert_sync_accum(model), reference


def images(*sizes: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(n, 2, 6, 6, dtype=dtype) + 0.5 for n in sizes]


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    # Gradients that are zero by algebra (a bias before a BatchNorm) are rounding in both, of the size of the others.
    atol = 1e-12 * max(1.0, *(float(q.grad.abs().max()) for q in reference.parameters()))
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=atol, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("ratio", [1e4, 1e7, 1e9])
@pytest.mark.parametrize("shift", [0.0, 50.0])  # of each micro-batch against the one before, in standard deviations
@pytest.mark.parametrize("sizes", [(6,), (2, 1, 3), (0, 4, 2)], ids=str)
def test_a_mean_of_many_standard_deviations(sizes: tuple[int, ...], shift: float, ratio: float) -> None:
    """float64 sums of squares lose the variance from 1e8 on: outputs were 920 where nn.BatchNorm gives 2.9."""
    model, reference = pair(lambda: nn.BatchNorm2d(2))
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(n, 2, 6, 6, dtype=torch.float64, generator=generator) + ratio + shift * i
        for i, n in enumerate(sizes)
    ]
    xs = [part.clone().requires_grad_() for part in parts]
    whole = torch.cat(parts).requires_grad_()
    y, expected = torch.cat(lockstep(model, model, xs)), reference(whole)
    # The mean's last place in float64, in standard deviations.
    tolerance = 4 * ratio * torch.finfo(torch.float64).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    dy = torch.randn(whole.shape, dtype=torch.float64, generator=generator)
    dx = torch.cat(torch.autograd.grad(y, xs, dy))
    torch.testing.assert_close(dx, *torch.autograd.grad(expected, whole, dy), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 4, 2), (0, 5, 0), (1, 1, 1, 1)], ids=str)
def test_outputs_gradients_and_statistics_are_those_of_the_whole_batch(sizes: tuple[int, ...]) -> None:
    model, reference = pair()
    micro_batches = images(*sizes)
    outputs = lockstep(model, model, micro_batches)
    expected = reference(torch.cat(micro_batches))
    torch.testing.assert_close(torch.cat(outputs), expected)
    torch.stack([o.square().sum() for o in outputs]).sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(model, reference)
    # A layer used twice has seen both uses when it commits, once; nn.BatchNorm updates at each.
    commit(model)
    for name in ("left.1", "right.1", "head.1"):
        torch.testing.assert_close(model.get_submodule(name).running_var, reference.get_submodule(name).running_var)


def test_input_gradients_are_those_of_the_whole_batch() -> None:
    model, reference = pair()
    whole = torch.cat(images(2, 3)).requires_grad_()
    parts = [p.detach().requires_grad_() for p in whole.split((2, 3))]
    sum(o.square().sum() for o in lockstep(model, model, parts)).backward()
    reference(whole).square().sum().backward()
    torch.testing.assert_close(torch.cat([p.grad for p in parts]), whole.grad)


def test_results_come_back_in_order_whatever_they_are() -> None:
    model, _ = pair()
    order: list[int] = []

    def forward(item: tuple[int, Tensor]) -> dict[str, object]:
        order.append(item[0])
        return {"index": item[0], "nested": [model(item[1])]}

    results = lockstep(model, forward, [(i, x) for i, x in enumerate(images(1, 2, 3))])
    assert [r["index"] for r in results] == order == [0, 1, 2]


def test_micro_batches_of_different_spatial_shape() -> None:
    layer, reference = convert_sync_accum(nn.BatchNorm2d(2).double()), nn.BatchNorm1d(2).double()
    parts = [torch.randn(n, 2, h, 3).double() for n, h in ((2, 5), (3, 1))]
    outputs = lockstep(layer, layer, parts)
    expected = reference(concatenate(parts))
    torch.testing.assert_close(concatenate(outputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_and_low_precision(dtype: torch.dtype) -> None:
    layer = convert_sync_accum(nn.BatchNorm2d(2))
    parts = [x.to(dtype).contiguous(memory_format=torch.channels_last) for x in images(4, 3)]
    outputs = lockstep(layer, layer, parts)
    expected = nn.BatchNorm2d(2)(torch.cat(parts).float())
    assert all(o.dtype == dtype and o.is_contiguous(memory_format=torch.channels_last) for o in outputs)
    tolerance = 4 * torch.finfo(dtype).eps  # one rounding of values of up to 4
    torch.testing.assert_close(torch.cat(outputs).float(), expected, rtol=tolerance, atol=tolerance)


def test_a_mean_of_1e4_deviations() -> None:
    layer, reference = convert_sync_accum(nn.BatchNorm2d(2)), nn.BatchNorm2d(2).double()
    parts = [(x + 1e4).float() for x in images(4, 3)]
    # Inputs are float32 numbers 1e-3 apart at 1e4: exact on those.
    torch.testing.assert_close(
        torch.cat(lockstep(layer, layer, parts)).double(), reference(torch.cat(parts).double()), rtol=1e-4, atol=1e-5
    )


def test_under_no_grad_only_statistics_are_kept() -> None:
    model, _ = pair()
    with torch.no_grad():
        outputs = lockstep(model, model, images(2, 3))
    assert not any(o.requires_grad for o in outputs)
    assert model.get_submodule("left.1").window.count == 5 * 36


def test_eval_is_plain_eval() -> None:
    model, reference = pair()
    left: Any = model.eval().left
    parts = images(2, 1)
    outputs = lockstep(left, left, parts)
    torch.testing.assert_close(torch.cat(outputs), reference.eval().left(torch.cat(parts)))


def test_a_subclass_with_drop_and_activation() -> None:
    layer, reference = convert_sync_accum(BatchNormAct2d(2)), BatchNormAct2d(2)
    layer.drop.p = reference.drop.p = 0.0
    parts = images(2, 3, dtype=torch.float32)
    torch.testing.assert_close(torch.cat(lockstep(layer, layer, parts)), reference(torch.cat(parts)))
    assert layer.track_running_stats
    commit(layer)
    torch.testing.assert_close(layer.running_var, reference.running_var)
    assert layer.num_batches_tracked == 1


def test_one_hundred_steps_stay_with_the_large_batch() -> None:
    model, reference = pair()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, reference)]
    for _ in range(100):
        parts = images(1, 3, 2)
        loss = sum(o.square().sum() for o in lockstep(model, model, parts)) / 6
        expected = reference(torch.cat(parts)).square().sum() / 6
        for objective, optimizer in zip((loss, expected), optimizers, strict=True):
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
        commit(model)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)  # the target


def test_grad_scaler_and_several_parameter_groups() -> None:
    models = pair(dtype=torch.float64)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in models]
    optimizers = [
        torch.optim.SGD([{"params": m.head.parameters(), "lr": 0.1}, {"params": m.left.parameters()}], lr=0.01)
        for m in models
    ]
    for _ in range(3):
        parts = images(2, 3)
        loss = sum(o.square().mean() * len(o) / 5 for o in lockstep(models[0], models[0], parts))
        expected = models[1](torch.cat(parts)).square().mean()
        for objective, model, scaler, optimizer in zip((loss, expected), models, scalers, optimizers, strict=True):
            model.zero_grad()
            scaler.scale(objective).backward()
            scaler.step(optimizer)
            scaler.update()
        commit(models[0])
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_autocast_computes_in_its_dtype_and_normalises_together() -> None:
    model, reference = pair(dtype=torch.float32)
    left: Any = model.left
    parts = images(2, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = torch.cat(lockstep(left, left, parts))
        expected = reference.left(torch.cat(parts))
    assert outputs.dtype == expected.dtype == torch.bfloat16
    # bfloat16 has 8 bits: one rounding of values of up to 4, and one of the convolution's.
    torch.testing.assert_close(outputs, expected, rtol=2**-7, atol=2**-5)


def test_compiled_models_run_as_written() -> None:
    model, reference = pair()
    compiled: Any = torch.compile(model, backend="eager")
    parts = images(2, 3)
    torch.testing.assert_close(torch.cat(lockstep(compiled, compiled, parts)), reference(torch.cat(parts)))


def test_offload_changes_nothing() -> None:
    model, reference = pair()
    parts = images(2, 3)
    sum(o.square().sum() for o in lockstep(model, model, parts, offload="cpu")).backward()
    reference(torch.cat(parts)).square().sum().backward()
    assert_same_gradients(model, reference)


# --- thread state ---------------------------------------------------------------------------------------------

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


class Spy(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        Spy.calls += func is torch.atan
        return func(*args, **(kwargs or {}))


def states_in(context: Callable[[], object]) -> list[object]:
    """What each of three micro-batches sees, before and after a meeting."""
    layer = SyncAccumBatchNorm(2)
    seen: list[object] = []

    def forward(x: Tensor) -> None:
        seen.append(context())
        layer(x)
        seen.append(context())

    lockstep(layer, forward, [torch.randn(4, 2) for _ in range(3)])
    assert len(seen) == 6
    return seen


def test_grad_mode_reaches_every_micro_batch() -> None:
    with torch.no_grad():
        assert states_in(torch.is_grad_enabled) == [False] * 6
    assert states_in(torch.is_grad_enabled) == [True] * 6


def test_autocast_reaches_every_micro_batch() -> None:
    def autocast() -> object:
        return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert states_in(autocast) == [torch.bfloat16] * 6
    assert states_in(autocast) == [False] * 6


def test_context_variables_reach_every_micro_batch() -> None:
    token = variable.set("set")
    try:
        assert states_in(variable.get) == ["set"] * 6
    finally:
        variable.reset(token)


def test_default_device_and_dtype_reach_every_micro_batch() -> None:
    with torch.device("meta"):
        layer = SyncAccumBatchNorm(2, device="cpu")
        seen = []

        def forward(x: Tensor) -> None:
            layer(x)
            seen.append(torch.empty(1).device.type)

        lockstep(layer, forward, [torch.randn(4, 2, device="cpu") for _ in range(3)])
    assert seen == ["meta"] * 3
    torch.set_default_dtype(torch.float64)
    try:
        assert states_in(torch.get_default_dtype) == [torch.float64] * 6
    finally:
        torch.set_default_dtype(torch.float32)


def test_function_modes_reach_every_micro_batch() -> None:
    Spy.calls = 0
    with Spy():
        states_in(lambda: torch.atan(torch.zeros(1)))
    assert Spy.calls == 6


def test_saved_tensor_hooks_reach_every_micro_batch() -> None:
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(threading.get_ident())
        return tensor

    layer = SyncAccumBatchNorm(2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lockstep(layer, lambda x: layer(x).exp(), [torch.randn(4, 2) for _ in range(3)])
    assert len(set(packed)) == 3


def test_what_one_micro_batch_changes_stays_its_own() -> None:
    layer = SyncAccumBatchNorm(2)
    seen = []

    def forward(index: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=index == 1):
            layer(torch.randn(4, 2))
            seen.append(torch.is_autocast_enabled("cpu"))

    lockstep(layer, forward, range(3))
    assert seen == [False, True, False]


# --- errors ---------------------------------------------------------------------------------------------------


class BoomError(Exception):
    pass


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("meetings", [0, 1, 3])
def test_an_exception_comes_out_as_it_was_and_leaves_nothing(failing: int, meetings: int) -> None:
    layer = SyncAccumBatchNorm(2)
    error = BoomError("boom")

    def forward(index: int) -> None:
        for visit in range(4):
            if index == failing and visit == meetings:
                raise error
            layer(torch.randn(3, 2))

    with pytest.raises(BoomError) as caught:
        lockstep(layer, forward, range(3))
    assert caught.value is error
    assert layer.window.count == 0
    lockstep(layer, layer, [torch.randn(3, 2)])
    assert layer.window.count == 3


def test_no_micro_batches() -> None:
    with pytest.raises(LockstepError, match=r"passes one that is empty \(N = 0\)"):
        lockstep(SyncAccumBatchNorm(2), lambda x: x, [])


def test_nesting() -> None:
    layer = SyncAccumBatchNorm(2)
    with pytest.raises(LockstepError, match="lockstep inside lockstep"):
        lockstep(layer, lambda x: lockstep(layer, layer, [x]), [torch.randn(3, 2)] * 2)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
def test_a_reentrant_checkpoint_inside(grad: Callable[[], Any]) -> None:
    layer = SyncAccumBatchNorm(2)
    parts = [torch.randn(3, 2, requires_grad=True) for _ in range(2)]

    def forward(x: Tensor) -> Tensor:
        with grad():
            return layer(x)

    with pytest.raises(
        LockstepError, match=r"layer SyncAccumBatchNorm.*use_reentrant=True.*call checkpoint\(..., use_reentrant=F"
    ):
        lockstep(layer, lambda x: checkpoint(forward, x, use_reentrant=True), parts)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_it(reentrant: bool) -> None:
    layer = SyncAccumBatchNorm(2)
    with pytest.raises(LockstepError, match=r"lockstep runs under torch.utils.checkpoint.*inside of forward"):
        checkpoint(
            lambda x: lockstep(layer, layer, [x, x])[0], torch.randn(3, 2).requires_grad_(), use_reentrant=reentrant
        )


def test_different_layers_are_both_named() -> None:
    model = nn.ModuleDict({"a": SyncAccumBatchNorm(2), "b": SyncAccumBatchNorm(2)})
    with pytest.raises(LockstepError, match="micro-batch 1 meets layer b, but the others wait for it at layer a"):
        lockstep(model, lambda i: model["ab"[i]](torch.randn(3, 2)), range(2))
    with pytest.raises(LockstepError, match="micro-batch 1 has finished, but the others wait for it at layer a"):
        lockstep(model, lambda i: None if i else model["a"](torch.randn(3, 2)), range(2))
    with pytest.raises(LockstepError, match="micro-batch 1 meets layer a, but another has finished without"):
        lockstep(model, lambda i: model["a"](torch.randn(3, 2)) if i else None, range(2))


def test_a_layer_outside_the_model() -> None:
    stranger = SyncAccumBatchNorm(2)
    with pytest.raises(LockstepError, match="not part of the model passed to lockstep"):
        lockstep(SyncAccumBatchNorm(2), stranger, [torch.randn(3, 2)])


def test_an_unconverted_model() -> None:
    with pytest.raises(NoLayersError, match=r"convert_sync_accum\(model\) first"):
        lockstep(nn.BatchNorm1d(2), lambda x: x, [torch.randn(3, 2)])


def test_one_value_per_channel_in_the_whole_window() -> None:
    layer = SyncAccumBatchNorm(2)
    with pytest.raises(TooFewValuesError, match="one value per channel in the whole global batch"):
        lockstep(layer, layer, [torch.randn(1, 2), torch.randn(0, 2)])
    assert lockstep(layer, layer, [torch.empty(0, 2)])[0].shape == (0, 2)


def test_an_unknown_offload() -> None:
    with pytest.raises(ValueError, match="offload must be None or 'cpu', got 'disk'"):
        lockstep(SyncAccumBatchNorm(2), lambda x: x, [1], offload="disk")


def test_gradients_of_gradients_are_refused() -> None:
    layer = SyncAccumBatchNorm(2)
    x = torch.randn(4, 2, requires_grad=True)
    (y,) = lockstep(layer, layer, [x])
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(F.mse_loss(y, x), x, create_graph=True)
