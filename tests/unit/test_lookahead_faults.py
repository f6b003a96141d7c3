"""lookahead where something goes wrong beside it: loops that are left, interrupts, graphs that live on, other state."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncaccum import LockstepError, SyncAccumBatchNorm, commit, convert_sync_accum, join, lookahead, not_counted
from syncaccum.layer.surroundings import lockstep_here
from tests.unit.interrupts import Interrupt
from tests.unit.test_convert import BatchNormAct2d
from tests.unit.test_lockstep import assert_same_gradients, images, pair
from tests.unit.test_lockstep_faults import parts_of

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def small(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), *more)


def loss_of(y: Tensor) -> Tensor:
    return y.square().sum() + y[:, 0].exp().sum()


def walk(model: nn.Module, parts: Sequence[Any], run: Callable[[Any], Tensor] | None = None) -> None:
    for loss in lookahead(model, lambda x: loss_of((run or model)(x)), parts):
        loss.backward()


def layers_of(model: nn.Module) -> list[SyncAccumBatchNorm]:
    return [layer for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]


def test_another_model_is_refused_with_the_name_of_the_call() -> None:
    model, other = pair(small)
    with pytest.raises(LockstepError, match="passed to lookahead; a forward without BatchNorm needs no lookahead"):
        walk(model, parts_of(2, 3), other)


# --- loops that are left --------------------------------------------------------------------------------------


class BoomError(Exception):
    pass


def leave_by_break(model: nn.Module, x: Sequence[Tensor]) -> None:
    for loss in lookahead(model, lambda x: loss_of(model(x)), x):
        loss.backward()
        break


def leave_by_error(model: nn.Module, x: Sequence[Tensor]) -> None:
    def loop() -> None:
        for loss in lookahead(model, lambda x: loss_of(model(x)), x):
            loss.backward()
            raise BoomError

    with pytest.raises(BoomError):
        loop()


def leave_by_del(model: nn.Module, x: Sequence[Tensor]) -> None:
    losses = lookahead(model, lambda x: loss_of(model(x)), x)
    next(losses).backward()
    next(losses)
    del losses


def leave_by_failing(call: int) -> Callable[[nn.Module, Sequence[Tensor]], None]:
    def leave(model: nn.Module, x: Sequence[Tensor]) -> None:
        calls = iter(range(100))

        def run(x: Tensor) -> Tensor:
            y: Tensor = model(x)
            if next(calls) == call:
                raise BoomError
            return y

        with pytest.raises(BoomError):
            walk(model, x, run)

    return leave


LEAVE = {
    "break": leave_by_break,
    "an error in the body": leave_by_error,
    "del": leave_by_del,
    "an error in the first pass": leave_by_failing(1),
    "an error in the second pass": leave_by_failing(4),
}


@pytest.mark.parametrize("opened", [True, False], ids=["a window was open", "none was"])
@pytest.mark.parametrize("way", list(LEAVE))
def test_a_loop_that_is_left_leaves_no_trace(group: None, way: str, opened: bool) -> None:
    model, reference = pair(lambda: small(nn.Dropout(0.1)))
    ddp = DistributedDataParallel(model)
    if opened:
        model(parts_of(5)[0])
    states = [layer._accumulation for layer in layers_of(model)]
    before = [(s.window.clone(), s.is_open, s.micro_batches, s.locksteps) for s in states]
    buffers = [b.clone() for b in model.buffers()]
    python = random.getstate()
    LEAVE[way](ddp, parts_of(3, 1, 4))
    for s, (window, *rest) in zip(states, before, strict=True):
        assert torch.equal(s.window, window)
        assert rest == [s.is_open, s.micro_batches, s.locksteps]
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), buffers, strict=True))
    assert (ddp.require_forward_param_sync, ddp.require_backward_grad_sync) == (True, True)
    assert DistributedDataParallel._active_ddp_module is None
    assert eval_frame._stance.stance == "default"
    assert random.getstate() == python
    # What follows is right: a whole window by lookahead, and one forward that is none.
    for layer in layers_of(model):
        layer.discard()
    walk(ddp, parts_of(2, 3, seed=1))
    model(parts_of(4, seed=2)[0])
    reference(torch.cat(parts_of(2, 3, seed=1) + parts_of(4, seed=2)))
    commit(model)
    torch.testing.assert_close(model[1].running_var, reference[1].running_var)
    assert model[1].num_batches_tracked == 1


def test_torchs_generator_moves_by_the_draw_of_seeds_only() -> None:
    models = [convert_sync_accum(model) for model in pair(lambda: small(nn.Dropout(0.5)))]
    for model in models:
        torch.manual_seed(3)
        walk(model, parts_of(3, 1, 4))
        state = torch.get_rng_state()
        torch.manual_seed(3)
        torch.randint(2**63 - 1, (3,))
        assert torch.equal(state, torch.get_rng_state())
    assert_same_gradients(*models)


def test_calls_that_cannot_be_right_are_refused(group: None) -> None:
    model, _ = pair(small)
    ddp = DistributedDataParallel(model)
    with pytest.raises(LockstepError, match="calls a DistributedDataParallel: pass that"):
        walk(model, parts_of(2, 2), ddp)
    with join(ddp), pytest.raises(LockstepError, match="lookahead inside join"):
        walk(ddp, parts_of(2, 2))


class Step(nn.Module):
    """Its forward is the training step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, parts: Sequence[Tensor]) -> None:
        walk(self.net, parts)


@pytest.mark.parametrize("given", ["the net", "all"])
def test_inside_the_forward_of_ddp_it_is_refused(group: None, given: str) -> None:
    step, _ = pair(Step)
    ddp = DistributedDataParallel(step)
    with pytest.raises(LockstepError, match=r"inside the forward of DistributedDataParallel.*reduce nothing"):
        ddp(parts_of(2, 2))


# --- interrupts -----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its calls, in an attribute."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.dropout(x, 0.1)


def test_an_interrupt_at_any_moment_of_the_loop_leaves_all_or_nothing(group: None, interruptible: None) -> None:
    model, _ = pair(lambda: small(Counting()))
    ddp = DistributedDataParallel(model)
    # As in no_sync(): DDP does not go on after a backward that was interrupted.
    ddp.require_backward_grad_sync = False
    parts = parts_of(3, 3, 4)
    walk(ddp, parts)
    start = time.perf_counter()
    walk(ddp, parts)
    duration = time.perf_counter() - start
    delays, interrupted, main = random.Random(0), 0, threading.get_ident()
    with ThreadPoolExecutor(1) as elsewhere:

        def interrupt_after(seconds: float) -> None:
            time.sleep(seconds)
            signal.pthread_kill(main, signal.SIGUSR1)

        for _ in range(200):
            for layer in layers_of(model):
                layer.discard()
            calls, python = model[-1].calls, random.getstate()
            sent = elsewhere.submit(interrupt_after, delays.uniform(0, 1.2 * duration))
            try:
                walk(ddp, parts)
                sent.result()
                time.sleep(0)
            except Interrupt:
                interrupted += 1
            counts = {int(layer.window.count) for layer in layers_of(model)}
            assert counts in ({0}, {10})
            # The first pass is undone: at most those of the second.
            assert 0 <= model[-1].calls - calls <= 3
            assert random.getstate() == python
            assert torch.is_grad_enabled()
            assert lockstep_here() is None
            assert eval_frame._stance.stance == "default"
            assert not ddp.require_backward_grad_sync
            assert not [t for t in threading.enumerate() if "lockstep" in t.name]
    assert interrupted == 200


# --- graphs that live on --------------------------------------------------------------------------------------


def test_no_activation_outlives_its_backward_in_the_second_pass() -> None:
    """Although the user's loop variable holds the last result, and so its graph."""
    model, _ = pair(lambda: small(*small()))
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    in_first: list[int] = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda layer, args, y: seen.extend([weakref.ref(args[0]), weakref.ref(y)]))

    def count() -> int:
        return sum(one() is not None for one in seen)

    def run(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            alive.append(count())
            seen.clear()
        y: Tensor = model(x)
        if not torch.is_grad_enabled():
            in_first.append(count())
        return y

    for loss in lookahead(model, lambda x: loss_of(run(x)), parts_of(3, 1, 4, 2)):
        loss.backward()
    assert alive == [0] * 4
    # At a forward's end its own output, and what others wait with.
    assert max(in_first) <= 4 + 1


def test_a_result_that_is_held_does_not_reach_into_a_later_checkpoint() -> None:
    """Its graph holds the second pass, which is over: the layer itself repeats what it did."""
    model, other = pair(small)
    convert_sync_accum(other)
    for one in (other, model):
        for loss in lookahead(one, lambda x, m=one: loss_of(m(x)), parts_of(3, 2)):  # type: ignore[misc]
            loss.backward()
        one.zero_grad()
    assert loss.grad_fn is not None
    (x,) = parts_of(6, seed=1)
    loss_of(checkpoint(model, x, use_reentrant=False)).backward()
    loss_of(other(x)).backward()
    assert_same_gradients(model, other)


def test_a_forward_of_its_own_under_checkpoint_meanwhile_is_found() -> None:
    model, _ = pair(small)
    results = lookahead(model, lambda x: loss_of(model(x)), parts_of(3, 2))
    for loss in itertools.islice(results, 2):
        extra = checkpoint(model, parts_of(4, seed=1)[0] + 7, use_reentrant=False)
        (loss + loss_of(extra)).backward()
    with pytest.raises(LockstepError, match=r"values at layer .* were not those of the first pass"):
        next(results)


def test_results_walked_one_loss_after_the_other_have_the_gradient_of_the_sum() -> None:
    model, other = pair()
    convert_sync_accum(other)
    for step in range(2):
        parts = images(3, 2, 4)
        for first, second in lookahead(model, lambda x: (model(x).square().sum(), loss_of(model(x))), parts):
            (first + second).backward()
        for results in lookahead(other, lambda x: (other(x).square().sum(), loss_of(other(x))), parts):
            for loss in results:
                loss.backward(retain_graph=True)
        assert_same_gradients(other, model)
        commit(model), commit(other)
        assert step < 2


def test_one_output_walked_twice_pays_no_more_than_it_owes() -> None:
    model, other = pair(small)
    convert_sync_accum(other)
    for _ in range(2):
        for y in lookahead(model, model, parts_of(3, 2, 4)):
            (y.square().sum() + y.exp().sum()).backward()
        for y in lookahead(other, other, parts_of(3, 2, 4)):
            y.square().sum().backward(retain_graph=True)
            y.exp().sum().backward()
    # The last layer's sums are alike. Others get them in two parts, which changes nothing either.
    assert_same_gradients(other, model)


@pytest.mark.parametrize("count", [1, 3])
def test_a_window_without_gradients_foretells_nothing(count: int) -> None:
    """Its sums are zero. Taken for the next window's, they would shrink that one's first gradients."""
    model, other = pair(small)
    convert_sync_accum(other)
    with torch.no_grad():
        list(lookahead(model, model, parts_of(*[3] * count)))
    for one in (model, other):
        walk(one, parts_of(3, 2, seed=1))
    assert_same_gradients(other, model)


# --- where it runs --------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Two blocks that share a layer, and come to it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.untracked = nn.BatchNorm1d(4, track_running_stats=False)
        self.kind = "none"

    def block_1(self, x: Tensor) -> Tensor:
        return self.untracked(self.norm(torch.tanh(self.first(x)))).sin()

    def block_2(self, x: Tensor) -> Tensor:
        return self.norm(self._run(self.block_1, x) + self.second(x)).cos()

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self.block_2, x) + x

    def _run(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.kind == "none":
            return block(x)
        return checkpoint(block, x, use_reentrant=self.kind == "reentrant")


@pytest.mark.parametrize("uncounted", [True, False])
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_nested_checkpoints_around_a_layer_visited_twice(kind: str, uncounted: bool) -> None:
    model, other = pair(Shared)
    convert_sync_accum(other)
    model.kind = kind  # type: ignore[assignment]
    for step in range(2):
        for one in (model, other):
            parts = [x.requires_grad_() for x in parts_of(3, 1, 4, seed=step)]
            if uncounted:
                with not_counted(one):
                    walk(one, parts)
            else:
                walk(one, parts)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
        assert model.norm.window.count == (0 if uncounted else 16)
        commit(model), commit(other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_compiled_block_under_checkpoint_equals_one_that_is_not(reentrant: bool) -> None:
    model, other = pair(small)
    convert_sync_accum(other)
    compiled: Any = torch.compile(model, backend="eager")
    for _ in range(2):
        parts = [x.requires_grad_() for x in parts_of(3, 2, 4)]
        walk(model, parts, lambda x: checkpoint(compiled, x, use_reentrant=reentrant))
        walk(other, parts)
        assert_same_gradients(model, other)
        assert model[1].window.count == other[1].window.count


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models(dtype: torch.dtype) -> None:
    model, reference = pair(small, dtype)
    parts = [x.to(dtype) for x in parts_of(4, 3)]
    outputs = []
    for y in lookahead(model, model, parts):
        outputs.append(y.detach())
        loss_of(y.float()).backward()
    expected = reference(torch.cat(parts))
    # Values up to 4, rounded once in each of the four layers.
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=tolerance, atol=tolerance)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_large_loss_scale_cancels_out() -> None:
    model, other = pair(small)
    convert_sync_accum(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for _ in range(3):
        for loss in lookahead(model, lambda x: loss_of(model(x)), parts_of(3, 1, 4)):
            scaler.scale(loss).backward()
        walk(other, parts_of(3, 1, 4))
    scaler.unscale_(optimizer)
    assert_same_gradients(model, other)


def test_an_overflow_spoils_one_window_only() -> None:
    model, other = pair(small)
    convert_sync_accum(other)
    for index, loss in enumerate(lookahead(model, lambda x: loss_of(model(x)), parts_of(3, 1, 4))):
        (loss * (float("inf") if index == 1 else 1)).backward()
    model.zero_grad()
    walk(model, parts_of(3, 1, 4))
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_under_inference_mode_there_is_no_graph_and_a_later_window_trains() -> None:
    model, other = pair(small)
    convert_sync_accum(other)
    with torch.inference_mode():
        results = list(lookahead(model, model, parts_of(3, 2)))
    assert not any(y.requires_grad for y in results)
    walk(model, parts_of(3, 2))
    walk(other, parts_of(3, 2))
    assert_same_gradients(model, other)
    assert model[1].window.count == 10


@pytest.mark.parametrize("frozen", [[1], [4], [1, 4]], ids=str)
def test_frozen_layers_do_what_they_always_do(frozen: list[int]) -> None:
    model, reference = pair(small)
    for index in frozen:
        model[index].eval()
        reference[index].eval()
    parts = parts_of(3, 1, 4)
    total = 0.0
    for loss in lookahead(model, lambda x: loss_of(model(x)), parts):
        total += loss.item()
        loss.backward()
    torch.testing.assert_close(total, loss_of(reference(torch.cat(parts))).item())
    assert [model[i].window.count == 0 for i in (1, 4)] == [i in frozen for i in (1, 4)]


def test_layers_with_a_forward_of_their_own() -> None:
    model, reference = pair(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 2, 1)))
    model[1].drop.p = reference[1].drop.p = 0.0
    parts = images(3, 1, 2)
    total = 0.0
    for loss in lookahead(model, lambda x: model(x).square().sum(), parts):
        total += loss.item()
        loss.backward()
    torch.testing.assert_close(total, reference(torch.cat(parts)).square().sum().item())
    commit(model)
    torch.testing.assert_close(model[1].running_var, reference[1].running_var)
    assert model[1].num_batches_tracked == 1


def test_a_window_with_ordinary_forwards_before_has_both() -> None:
    model, reference = pair(lambda: nn.BatchNorm1d(4))
    before, parts = parts_of(5), parts_of(3, 1, 4, seed=1)
    model(before[0])
    walk(model, parts)
    commit(model)
    reference(torch.cat(before + parts))
    torch.testing.assert_close(model.running_var, reference.running_var)


class Average(nn.Module):
    """Keeps a moving average in a plain tensor, which is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x


def test_a_tensor_that_a_module_changes_in_place_changes_once_for_each_micro_batch() -> None:
    average, ordinary = Average(), Average()
    model = convert_sync_accum(nn.Sequential(average, nn.BatchNorm1d(4).double()))
    walk(model, parts_of(3, 1, 4))
    for x in parts_of(3, 1, 4):
        ordinary(x)
    assert torch.equal(average.mean, ordinary.mean)
