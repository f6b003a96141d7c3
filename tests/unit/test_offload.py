"""The host store: what it parks, what it leaves, and that gradients do not change.

It parks what is on a device, and there is none here: a store is told that CPU tensors are on one.
"""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from syncaccum import lockstep
from syncaccum.exact.offload import HostStore, Parked
from syncaccum.window.layers import named_layers
from tests.unit.test_lockstep import assert_same_gradients, images, pair

DEVICE = SimpleNamespace(type="device")


class OnDevice(Tensor):
    """A CPU tensor that says it is on a device, and comes back as a plain copy when sent there."""

    returns = 0

    @property
    def device(self) -> Any:  # type: ignore[override] # an attribute of tensors
        return DEVICE

    def to(self, device: object, non_blocking: bool = False) -> Tensor:  # type: ignore[override] # all that is called
        assert device is DEVICE
        OnDevice.returns += 1
        return self.as_subclass(Tensor).clone()


class DeviceStore(HostStore):
    """A store to which every tensor is on a device; keeps account of what autograd saved into it."""

    made: ClassVar[list[DeviceStore]] = []

    def __init__(self) -> None:
        super().__init__()
        self.made.append(self)
        self.kept: list[Tensor] = []
        self.parked: list[weakref.ref[Parked]] = []
        self.parked_bytes = 0
        OnDevice.returns = 0

    def _pack(self, tensor: Tensor) -> Tensor | Parked:
        packed = super()._pack(tensor)
        if isinstance(packed, Tensor):
            self.kept.append(tensor)
            return tensor
        self.parked.append(weakref.ref(packed))
        self.parked_bytes += tensor.nbytes
        return packed

    def takes(self, tensor: Tensor) -> bool:
        return True

    def _copy(self, tensor: Tensor) -> Parked:
        return super()._copy(tensor.detach().as_subclass(OnDevice))

    def alive(self) -> list[Parked]:
        return [parked for reference in self.parked if (parked := reference()) is not None]

    def waiting(self) -> int:
        """How many copies were brought back and not taken."""
        return sum(p.returning is not None for p in self.alive())


def run_offloaded(model: nn.Module, parts: list[Tensor], forward: Any = None) -> tuple[list[Any], DeviceStore]:
    # By module: the package has a function of that name, too.
    with patch.object(sys.modules["syncaccum.exact.lockstep"], "HostStore", DeviceStore):
        outputs = lockstep(model, forward or model, parts, offload="cpu")
    return outputs, DeviceStore.made.pop()


def loss_of(outputs: list[Tensor]) -> Tensor:
    return torch.stack([o.square().sum() for o in outputs]).sum()


def test_cpu_tensors_pass_through_untouched() -> None:
    store = HostStore()
    tensor = torch.randn(3)
    packed = store._pack(tensor)
    assert packed is tensor
    assert store._unpack(packed) is tensor
    x = torch.randn(4, requires_grad=True)
    with store.hooks():
        y = x.exp().sin()
    y.sum().backward()
    torch.testing.assert_close(x.grad, x.detach().exp() * x.detach().exp().cos())


def test_parameters_are_not_parked() -> None:
    model, _ = pair()
    _, store = run_offloaded(model, images(2, 3))
    parameters = {p.data_ptr() for p in model.parameters()}
    assert store.kept
    assert {t.data_ptr() for t in store.kept} <= parameters


def test_parking_changes_no_gradient() -> None:
    model, reference = pair()
    parts = images(2, 0, 3)
    outputs, store = run_offloaded(model, parts)
    assert len(store.parked) > 20
    loss_of(outputs).backward()
    assert OnDevice.returns >= len(store.parked)
    reference(torch.cat(parts)).square().sum().backward()
    assert_same_gradients(model, reference)


def test_a_tensor_that_several_nodes_save_is_in_host_memory_once() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    store = DeviceStore()
    DeviceStore.made.pop()
    with store.hooks():
        y = x.exp()
        loss = (y.sin() + y.cos()).sum()
    assert len(store.alive()) == 3
    assert len({parked.host.data_ptr() for parked in store.alive()}) == 1
    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        torch.testing.assert_close(gradient, (y.cos() - y.sin()).detach() * x.exp())
        assert store.waiting() == 0


def test_what_is_written_to_in_between_is_copied_again() -> None:
    store = DeviceStore()
    DeviceStore.made.pop()
    x = torch.randn(5)
    before = x.clone()
    packed: list[Any] = [store._pack(x)]
    x.add_(1)
    packed += [store._pack(x), store._pack(x[:3])]
    for one, expected in zip(packed, (before, x, x[:3]), strict=True):
        assert torch.equal(store._unpack(one), expected)


def test_a_graph_can_be_walked_again() -> None:
    model, _ = pair()
    loss = loss_of(run_offloaded(model, images(2, 3))[0])
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)


def held_after_forward(micro_batches: int) -> tuple[int, int, int]:
    """Bytes after so many micro-batches: saved by autograd outside the store, parked, and alive besides.

    The last are what operators made and something still refers to, but for inputs and outputs.
    """
    model, _ = pair()
    parts = images(*[2] * micro_batches)
    with LiveBytes() as live:
        outputs, store = run_offloaded(model, parts)
    gc.collect()  # threads and exceptions leave cycles
    saved = {t.data_ptr(): t.nbytes for t in store.kept}
    mine = [*parts, *outputs, *(parked.host for parked in store.alive())]
    return sum(saved.values()), store.parked_bytes, live.count(besides=mine)


class LiveBytes(TorchDispatchMode):
    """Follows the memory of all results of operators, also of those that only a node's context refers to."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)
        return result

    def count(self, besides: list[Tensor]) -> int:
        known = {tensor.untyped_storage()._cdata for tensor in besides}
        others = [reference() for key, reference in self._storages.items() if key not in known]
        return sum(storage.nbytes() for storage in others if storage is not None)


def test_what_is_held_outside_the_store_does_not_grow_with_the_micro_batches() -> None:
    outside, parked, alive = zip(*(held_after_forward(k) for k in (1, 2, 8)), strict=True)
    assert outside[0] == outside[1] == outside[2]
    assert alive[0] == alive[1] == alive[2]
    assert parked == (parked[0], 2 * parked[0], 8 * parked[0])


def test_host_memory_is_freed_by_the_backward() -> None:
    model, _ = pair()
    outputs, store = run_offloaded(model, images(2, 3))
    assert len(store.alive()) == len(store.parked)
    loss_of(outputs).backward()
    assert not store.alive()


def test_host_memory_is_freed_as_the_backward_goes() -> None:
    model, _ = pair()
    parts = [part.requires_grad_() for part in images(2, 3)]
    outputs, store = run_offloaded(model, parts)
    left: list[int] = []
    parts[0].register_hook(lambda _: left.append(len(store.alive())))
    loss_of(outputs).backward()
    assert left[0] < len(store.parked) // 4  # the first layers' own


def test_host_memory_of_what_was_walked_is_freed_while_another_result_lives() -> None:
    model, _ = pair()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        return output, output.exp()  # an auxiliary output, kept and never walked

    outputs, store = run_offloaded(model, images(2, 3), forward)
    loss_of([output for output, _ in outputs]).backward()
    assert len(store.alive()) == len(outputs)


def test_each_tensor_comes_back_once_and_none_is_left_on_the_device() -> None:
    model, _ = pair()
    outputs, store = run_offloaded(model, images(2, 2, 2, 2))
    loss = loss_of(outputs)
    # At each layer all four have waited, and in the backward their gradients do.
    waited = OnDevice.returns
    assert waited >= 4 * len(named_layers(model))
    for walk in (1, 2):
        loss.backward(retain_graph=True)
        assert OnDevice.returns == waited + walk * (len(store.parked) + waited)
        assert store.waiting() == 0
