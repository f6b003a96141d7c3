"""lookahead in one process: an exact forward, feedback by the formula, nothing left behind."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

from syncaccum import (
    LockstepError,
    NoLayersError,
    SyncAccumBatchNorm,
    commit,
    commit_on_step,
    convert_sync_accum,
    lockstep,
    lookahead,
)
from syncaccum.exact.offload import HostStore, Parked, WaitingRoom
from tests.unit.test_lockstep import assert_same_gradients, images, pair

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def loss_of(outputs: Tensor) -> Tensor:
    return outputs.square().sum() + outputs[:, 0].sum()


def walk(model: nn.Module, parts: Sequence[Tensor], run: Callable[[Tensor], Tensor] | None = None) -> list[float]:
    """One window; the losses."""
    losses = []
    for loss in lookahead(model, lambda x: loss_of((model if run is None else run)(x)), parts):
        losses.append(loss.item())
        loss.backward()
    return losses


@pytest.mark.parametrize("sizes", [(3, 2, 4), (0, 4, 2), (5,), (1, 1, 1, 1)], ids=str)
def test_losses_and_statistics_are_the_large_batchs(sizes: tuple[int, ...]) -> None:
    model, reference = pair(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    for _ in range(2):
        parts = images(*sizes)
        expected = loss_of(reference(torch.cat(parts)))
        torch.testing.assert_close(sum(walk(model, parts)), expected.item())
        commit(model)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_layers_visited_twice_and_untracked_ones_normalise_with_the_large_batch() -> None:
    model, reference = pair()
    parts = images(3, 2, 4)
    torch.testing.assert_close(sum(walk(model, parts)), loss_of(reference(torch.cat(parts))).item())
    assert model.twice.window.count == 2 * 9 * 36


def test_one_micro_batch_has_the_large_batchs_gradient() -> None:
    model, reference = pair()
    (x,) = images(6)
    walk(model, [x])
    loss_of(reference(x)).backward()
    assert_same_gradients(model, reference)
    model.zero_grad()
    (loss,) = lookahead(model, lambda x: loss_of(model(x)), [x])  # walked after the iterator's end
    loss.backward()
    assert_same_gradients(model, reference)


def by_formula(xs: Sequence[Tensor], dys: Sequence[Tensor], eps: float) -> list[Tensor]:
    """Balanced feedback as its formula says, for (N, C) micro-batches of a layer without weight."""
    whole = torch.cat(list(xs))
    scale = (whole.var(0, unbiased=False) + eps).rsqrt()
    total, done = float(len(whole)), 0.0
    seen, applied = torch.zeros(2, whole.shape[1]).double(), torch.zeros(2, whole.shape[1]).double()
    dxs = []
    for x, dy in zip(xs, dys, strict=True):
        x_hat, n = (x - whole.mean(0)) * scale, float(len(x))
        seen = seen + torch.stack([dy.sum(0), (dy * x_hat).sum(0)])
        each = (seen - applied) / max(total - done, 0.1 * total)
        applied, done = applied + n * each, done + n
        dxs.append(scale * (dy - each[0] - x_hat * each[1]))
    return dxs


@pytest.mark.parametrize("sizes", [(1,) * 12, (4, 4, 4), (2, 7, 1)], ids=str)
def test_the_gradient_is_the_formulas(sizes: tuple[int, ...]) -> None:
    layer = SyncAccumBatchNorm(3, affine=False).double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        xs = [torch.randn(n, 3, dtype=torch.float64, generator=generator).requires_grad_() for n in sizes]
        dys = [torch.randn(n, 3, dtype=torch.float64, generator=generator) + 0.5 for n in sizes]
        for y, dy in zip(lookahead(layer, layer, xs), dys, strict=True):
            y.backward(dy)
        dxs = by_formula([x.detach() for x in xs], dys, layer.eps)
        for x, dx in zip(xs, dxs, strict=True):
            torch.testing.assert_close(x.grad, dx)
        commit(layer)


def test_two_walks_of_one_result_are_as_one_walk_of_their_sum() -> None:
    model, other = (convert_sync_accum(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).double() for _ in range(2))
    other.load_state_dict(model.state_dict())
    parts = [torch.randn(2, 3, dtype=torch.float64) for _ in range(3)]
    for y in lookahead(model, model, parts):
        (y.square().sum() + y.exp().sum()).backward()
    # All at once in the last micro-batch: only there sums do not matter to what is paid later.
    for y in lookahead(other, other, parts):
        torch.autograd.backward([y.square().sum(), y.exp().sum()])
    torch.testing.assert_close(model[0].weight.grad, other[0].weight.grad)
    (y,) = lookahead(other, other, parts[:1])
    other.zero_grad()
    y.square().sum().backward(retain_graph=True)
    y.exp().sum().backward()
    model.zero_grad()
    (y,) = lookahead(model, model, parts[:1])
    (y.square().sum() + y.exp().sum()).backward()
    torch.testing.assert_close(model[0].weight.grad, other[0].weight.grad)


# --- what it refuses ----------------------------------------------------------------------------------------------


def test_the_next_is_not_given_before_a_result_was_walked() -> None:
    model, _ = pair()
    with pytest.raises(LockstepError, match=r"micro-batch 0 was not walked backward.*loss\.backward"):
        list(lookahead(model, model, images(3, 3)))
    assert model.twice.window.count == 0


def test_wrong_calls_are_refused() -> None:
    model, _ = pair()
    with pytest.raises(LockstepError, match="no micro-batches"):
        lookahead(model, model, [])
    with pytest.raises(ValueError, match="offload"):
        lookahead(model, model, images(2), offload="disk")
    with pytest.raises(NoLayersError):
        next(lookahead(nn.Linear(2, 2), nn.Linear(2, 2), images(2)))
    with pytest.raises(LockstepError, match="lookahead inside lockstep"):
        lockstep(model, lambda x: next(lookahead(model, model, [x])), images(2, 2))
    with pytest.raises(LockstepError, match="generator"):
        next(lookahead(model, lambda x: (model(part) for part in x), images(2, 2)))


def test_a_forward_that_goes_another_way_the_second_time_is_refused() -> None:
    model = convert_sync_accum(nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)]))
    calls = []

    def forward(x: Tensor) -> Tensor:
        calls.append(x)
        first = len(calls) > 2
        return model[first](model[not first](x))

    with pytest.raises(LockstepError, match="micro-batch 0 comes to layer 0, where it came to layer 1 in the first"):
        next(lookahead(model, forward, [torch.randn(3, 2)] * 2))
    assert model[0].window.count == 0


def test_a_forward_that_stops_early_the_second_time_is_refused() -> None:
    model = convert_sync_accum(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)))
    calls: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        calls.append(x)
        return model(x) if len(calls) < 3 else model[0](x)

    with pytest.raises(LockstepError, match="has finished without layer 1"):
        next(lookahead(model, forward, [torch.randn(3, 2)] * 2))


def test_values_that_change_between_the_passes_are_named() -> None:
    model = convert_sync_accum(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    hidden = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 3) for _ in range(2)]
    with pytest.raises(LockstepError, match=r"values at layer 1 were not those of the first pass.*do not step"):
        walk(model, parts, lambda x: model(torch.randn(4, 3, generator=hidden)))


# --- nothing is left behind ------------------------------------------------------------------------------------


@pytest.mark.parametrize("walked", [0, 1])
def test_an_iterator_that_is_left_puts_the_windows_back(walked: int) -> None:
    model, _ = pair()
    model(images(3)[0])
    before = [layer._accumulation.window.clone() for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]
    results = lookahead(model, lambda x: loss_of(model(x)), images(2, 3))
    for _ in range(walked):
        next(results).backward()
    next(results)
    cast(Generator[Tensor], results).close()
    after = [layer._accumulation.window for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert commit(model).values["left.1"] == 3 * 36


def test_leaving_after_the_last_walk_keeps_the_statistics() -> None:
    model, _ = pair()
    for index, loss in enumerate(lookahead(model, lambda x: loss_of(model(x)), images(2, 3))):
        loss.backward()
        if index == 1:
            break
    assert commit(model).values["left.1"] == 5 * 36


@pytest.mark.parametrize("call", [1, 4])  # in the first pass, in the second
def test_what_forward_raises_comes_out_and_nothing_is_kept(call: int) -> None:
    model, _ = pair()
    calls: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == call:
            raise ZeroDivisionError
        return model(x)

    with pytest.raises(ZeroDivisionError):
        walk(model, images(2, 3), forward)
    assert model.twice.window.count == 0


def test_commit_on_step_in_the_last_turn_commits_the_window_once() -> None:
    model, _ = pair()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    commit_on_step(model, optimizer)
    for index, loss in enumerate(lookahead(model, lambda x: loss_of(model(x)), images(2, 3))):
        loss.backward()
        if index == 1:
            optimizer.step()
    assert model.head[1].num_batches_tracked == 1
    assert model.twice.window.count == 0


# --- random numbers and other modules ---------------------------------------------------------------------------


class Drawing(nn.Module):
    """Draws from every generator that lookahead knows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.own = torch.Generator().manual_seed(1)
        self.plain = random.Random(1)
        self.drawn: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(
            (
                torch.rand(()).item(),
                random.random(),
                torch.rand((), generator=self.own).item(),
                self.plain.random(),
            )
        )
        return self.norm(F.dropout(x, training=True) + self.plain.random())


def test_random_numbers_are_alike_in_both_passes_and_new_in_each_micro_batch_and_window() -> None:
    model = convert_sync_accum(Drawing())
    parts = [torch.randn(4, 4) for _ in range(3)]
    torch.manual_seed(0)
    states = random.getstate(), model.own.get_state()
    for _ in range(2):
        walk(model, parts)
    first, second = model.drawn[:6], model.drawn[6:]
    assert first[:3] == first[3:]
    assert second[:3] == second[3:]
    for source in zip(*first[:3], *second[:3], strict=True):
        assert len(set(source)) == 6
    assert states[0] == random.getstate()
    assert torch.equal(states[1], model.own.get_state())


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("counted", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.counted.add_(1)
        return x


@pytest.mark.filterwarnings("ignore:lockstep is exact for")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_other_modules_change_as_in_ordinary_accumulation() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(spectral_norm(nn.Linear(4, 4)), Counting(), nn.BatchNorm1d(4))

    model, ordinary = convert_sync_accum(make()), make()
    parts = [torch.randn(4, 4) for _ in range(3)]
    walk(model, parts)
    for x in parts:
        ordinary(x)
    assert model[1].calls == ordinary[1].calls == 3
    assert model[1].counted == 3
    torch.testing.assert_close(model[0].weight_u, ordinary[0].weight_u)


def test_a_parametrized_weight_moves_once_for_the_window() -> None:
    model, reference = pair(
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4, affine=False))
    )
    parts = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 2, 4)]
    torch.testing.assert_close(sum(walk(model, parts)), loss_of(reference(torch.cat(parts))).item())
    mine, expected = (m[0].parametrizations.weight.buffers() for m in (model, reference))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- where it runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model, other = pair()
    convert_sync_accum(other)

    def run(x: Tensor) -> Tensor:
        return checkpoint(other, x, use_reentrant=reentrant)

    parts = [x.requires_grad_() for x in images(3, 2, 4)]
    for _ in range(2):
        assert walk(model, parts) == walk(other, parts, run)
        assert_same_gradients(other, model)
        assert other.twice.window.count == model.twice.window.count
        commit(model), commit(other)


@pytest.mark.parametrize("outer", [True, False])
def test_weights_have_gradients_under_autocast(outer: bool) -> None:
    model = convert_sync_accum(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)))
    parts = [torch.randn(4, 8) for _ in range(2)]

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        walk(model, parts, None if outer else run)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (model[0].weight, model[2].weight))


def test_channels_last_and_compiled_models_give_the_same() -> None:
    model, other = pair()
    convert_sync_accum(other)
    parts = images(3, 2)
    compiled: Any = torch.compile(other, backend="eager")
    walk(model, parts)
    walk(other, [x.to(memory_format=torch.channels_last) for x in parts], compiled)
    assert_same_gradients(other, model)


def test_without_gradients_there_is_nothing_to_walk() -> None:
    model, reference = pair()
    parts = images(3, 2)
    with torch.no_grad():
        results = list(lookahead(model, model, parts))
    torch.testing.assert_close(torch.cat(results), reference(torch.cat(parts)))


def test_one_micro_batchs_graph_is_alive_at_a_time() -> None:
    model, _ = pair()
    alive: list[int] = []
    graphs: list[Any] = []

    def forward(x: Tensor) -> Tensor:
        loss = loss_of(model(x))
        if torch.is_grad_enabled():
            alive.append(sum(graph() is not None for graph in graphs))
            probe = Probe()
            loss.grad_fn.metadata["probe"] = probe
            graphs.append(weakref.ref(probe))
        return loss

    for loss in lookahead(model, forward, images(2, 2, 2)):
        loss.backward()
        del loss
    assert alive == [0, 0, 0]


class Probe:
    """Lives as long as the graph that holds it."""


class Store(HostStore):
    """Takes CPU tensors for tensors on a device."""

    parked = 0

    def takes(self, tensor: Tensor) -> bool:
        return True

    def _copy(self, tensor: Tensor) -> Parked:
        Store.parked += 1
        return Parked(tensor.detach().clone(), tensor.device)


class Room(WaitingRoom):
    def __init__(self, shared: Iterable[Tensor]) -> None:
        super().__init__(shared, Store())


def test_inputs_that_wait_on_the_host_come_back_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncaccum.exact.lookahead.WaitingRoom", Room)
    model, other = pair()
    convert_sync_accum(other)
    (x,) = images(3)
    parts = [x, x, *images(2)]  # one tensor twice: it must not be taken from the other
    walk(model, parts)
    for loss in lookahead(other, lambda x: loss_of(other(x)), parts, offload="cpu"):
        loss.backward()
    assert Store.parked > 0
    assert_same_gradients(other, model)
