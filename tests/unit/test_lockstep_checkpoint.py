"""torch.utils.checkpoint inside lockstep: exact against nn.BatchNorm on torch.cat, and nothing stays."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from syncaccum import LockstepError, commit, convert_sync_accum, lockstep, lookahead
from syncaccum.exact.checkpoints import Checkpoints
from syncaccum.layer import surroundings
from syncaccum.torch_private import all_saved_tensor_hooks, runs_in_backward
from tests.unit.interrupts import Interrupt, Line, interrupt_at, traced_lines
from tests.unit.test_lockstep import assert_same_gradients, images, pair
from tests.unit.test_lockstep_faults import parts_of
from tests.unit.test_lookahead_faults import Shared
from tests.unit.test_offload import run_offloaded

pytestmark = pytest.mark.usefixtures("no_thread_is_left", "nothing_is_left")


@pytest.fixture(autouse=True, scope="module")
def _leave_others_alone() -> None:
    """What other tests left is not walked by each of these."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """No second forward is waited for once the graphs are gone."""
    yield
    # After an error torch holds what was still to be walked, until the next backward.
    torch.ones(1, requires_grad=True).sin().backward()
    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, Checkpoints)]
    assert not [one for references in surroundings._recomputed.values() for one in references if one() is not None]


class Masks(nn.Module):
    """Dropout that notes the masks of first forwards; or takes those that it is given, one for each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Tensor] = []
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = self.given.pop(0) if self.given else (torch.rand_like(x) < 0.7).to(x) / 0.7
        if not runs_in_backward():
            self.noted.append(mask)
        return x * mask


class Block(nn.Module):
    """Draws before, between and after its meetings; with a branch, and a BatchNorm without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.norm, self.plain = nn.BatchNorm2d(4), nn.BatchNorm2d(2, affine=False)
        self.masks = nn.ModuleList(Masks() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(self.masks[0](x))), inplace=True)
        return torch.sin(x + self.masks[2](self.plain(self.second(self.masks[1](y)))))


Around = Callable[[nn.Module, Tensor], Tensor]
"""How a block is called."""


def around(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(block, x, use_reentrant=False)
    return y


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.call: Around = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.call(block, x)
        return x.mean((2, 3))


def blocks(call: Around = around, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    model, reference = pair(Blocks, dtype)
    model.call = call  # type: ignore[assignment]
    return model, reference


def loss_of(outputs: Tensor) -> Tensor:
    return outputs.square().sum() + outputs.exp().sum()


def hand_masks(model: nn.Module, other: nn.Module, *, as_one: bool) -> None:
    """Let another model take the masks that one has drawn, each, or all of them in one forward."""
    for mine, its in zip(model.modules(), other.modules(), strict=True):
        if isinstance(mine, Masks) and isinstance(its, Masks):
            its.given = [torch.cat(mine.noted)] if as_one else mine.noted
            mine.noted = []


def compare(model: nn.Module, reference: nn.Module, parts: list[Tensor], outputs: list[Tensor]) -> None:
    """Outputs, and gradients of inputs and parameters, against the large batch under the same masks."""
    hand_masks(model, reference, as_one=True)
    whole = torch.cat([p.detach() for p in parts]).requires_grad_()
    expected = reference(whole)
    torch.testing.assert_close(torch.cat(outputs), expected)
    torch.stack([loss_of(y) for y in outputs]).sum().backward()
    loss_of(expected).backward()
    assert_same_gradients(model, reference)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]
    torch.testing.assert_close(torch.cat(grads), whole.grad, rtol=1e-9, atol=1e-12)  # as of parameters


def leaves(*sizes: int) -> list[Tensor]:
    return [x.requires_grad_() for x in images(*sizes)]


def assert_walks_as_the_whole_batch(model: nn.Module, reference: nn.Module, parts: list[Tensor]) -> None:
    """Gradients of parameters and of inputs, the model under one checkpoint."""
    outputs = lockstep(model, lambda x: around(model, x), parts)
    whole = torch.cat([p.detach() for p in parts]).requires_grad_()
    loss_of(torch.cat(outputs)).backward()
    loss_of(reference(whole)).backward()
    assert_same_gradients(model, reference)
    torch.testing.assert_close(torch.cat([p.grad for p in parts]), whole.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("both_passes")
@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 4, 2), (0, 5, 0), (1, 1, 1, 1)], ids=str)
def test_gradients_are_those_of_the_whole_batch_with_dropout_inside(sizes: tuple[int, ...]) -> None:
    model, reference = blocks()
    for _ in range(2):
        parts = leaves(*sizes)
        compare(model, reference, parts, lockstep(model, model, parts))
        model.zero_grad()
        reference.zero_grad()
        commit(model)
    # Each forward was counted once.
    for mine, its in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.usefixtures("both_passes")
def test_a_mean_of_many_standard_deviations() -> None:
    model, _ = pair(lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Sigmoid()), torch.float32)
    grads = []
    for call in (around, lambda model, x: model(x)):
        torch.manual_seed(0)
        parts = [(x + 1e4).requires_grad_() for x in images(3, 2, dtype=torch.float32)]
        torch.cat(lockstep(model, functools.partial(call, model), parts)).square().sum().backward()
        grads.append(torch.cat([p.grad for p in parts]))
    assert grads[0].abs().max() > 0.01
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_low_precision_it_changes_no_bit(dtype: torch.dtype, autocast: bool) -> None:
    model, other = blocks(dtype=dtype)
    convert_sync_accum(other)
    parts = [x.to(memory_format=torch.channels_last) for x in images(3, 1, 2, dtype=dtype)]
    for one in (model, other):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = lockstep(one, one, parts)
        if one is model:
            hand_masks(model, other, as_one=False)
        torch.cat(outputs).float().square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_nested_checkpoints_around_layers_visited_twice(depth: int, early_stop: bool) -> None:
    model, reference = pair(Shared)
    model.kind = "not reentrant"  # type: ignore[assignment]
    parts = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 1, 0, 4)]

    def forward(x: Tensor) -> Tensor:
        for _ in range(depth):
            x = checkpoint(model, x, use_reentrant=False)
        return x

    with set_checkpoint_early_stop(early_stop):
        outputs = lockstep(model, forward, parts)
    whole = torch.cat([p.detach() for p in parts]).requires_grad_()
    expected = whole
    for _ in range(depth):
        expected = reference(expected)
    loss_of(torch.cat(outputs)).backward()
    loss_of(expected).backward()
    assert_same_gradients(model, reference)
    torch.testing.assert_close(torch.cat([p.grad for p in parts]), whole.grad, rtol=1e-9, atol=1e-12)


def test_an_outer_checkpoint_that_is_asked_before_the_inner_one() -> None:
    def call(block: nn.Module, x: Tensor) -> Tensor:
        # Its own tanh needs the inner one's output.
        y: Tensor = checkpoint(lambda x: torch.tanh(around(block, x)), x, use_reentrant=False)
        return y

    model, reference = blocks(call)
    reference.call = lambda block, x: torch.tanh(block(x))
    for _ in range(2):
        parts = leaves(2, 3)
        compare(model, reference, parts, lockstep(model, model, parts))


def test_a_layer_that_wants_no_gradient_before_one_that_does() -> None:
    model, reference = pair(
        lambda: nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.Sigmoid(), nn.Conv2d(2, 2, 1), nn.Tanh())
    )
    parts = images(2, 3)
    outputs = lockstep(model, lambda x: around(model, x), parts)
    gc.collect()
    loss_of(torch.cat(outputs)).backward()
    loss_of(reference(torch.cat(parts))).backward()
    assert_same_gradients(model, reference)


def test_other_hooks_inside_of_a_checkpoint() -> None:
    class Saved(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                y: Tensor = super().forward(x)
            return y.tanh()

    model, reference = pair(lambda: Saved(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)))
    assert_walks_as_the_whole_batch(model, reference, leaves(2, 3))


class Twins(nn.Module):
    """Two layers for one input, which differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(2, eps=1e-5), nn.BatchNorm2d(2, eps=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).sin() * self.second(x)


def test_two_layers_that_take_one_input() -> None:
    model, reference = pair(Twins)
    assert_walks_as_the_whole_batch(model, reference, leaves(2, 3))


class Conditional(nn.BatchNorm2d):
    """Scales and shifts by what each micro-batch brings along."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 # nn.BatchNorm's name
        weight, bias = self.weight * input.detach().mean(), self.bias + input.detach().std()
        return F.batch_norm(
            input, self.running_mean, self.running_var, weight, bias, self.training, self.momentum or 0.0, self.eps
        )


def test_weights_of_each_micro_batch() -> None:
    model = convert_sync_accum(nn.Sequential(nn.Conv2d(2, 3, 1), Conditional(3), nn.Tanh()).double())
    parts = leaves(3, 1, 4)
    outputs = lockstep(model, lambda x: around(model, x), parts)
    torch.stack([loss_of(y) for y in outputs]).sum().backward()
    mine = [p.grad for p in (*model.parameters(), *parts)]

    model.zero_grad()
    others = [p.detach().requires_grad_() for p in parts]
    convolved = model[0](torch.cat(others))
    plain = F.batch_norm(convolved, None, None, training=True)
    means, stds = zip(*((y.detach().mean(), y.detach().std()) for y in convolved.split((3, 1, 4))), strict=True)
    for y, mean, std in zip(plain.split((3, 1, 4)), means, stds, strict=True):
        scaled = y * (model[1].weight * mean).view(1, -1, 1, 1) + (model[1].bias + std).view(1, -1, 1, 1)
        loss_of(torch.tanh(scaled)).backward(retain_graph=True)
    for one, its in zip(mine, (*model.parameters(), *others), strict=True):
        torch.testing.assert_close(one, its.grad, rtol=1e-9, atol=1e-12)


def test_some_micro_batches_under_a_checkpoint_and_some_not() -> None:
    model, reference = blocks()
    turn = itertools.cycle([True, False, True])
    model.call = lambda block, x: around(block, x) if next(turn) else block(x)
    parts = leaves(2, 3, 1)
    compare(model, reference, parts, lockstep(model, model, parts))


def test_results_of_which_one_has_no_loss() -> None:
    model, reference = blocks()
    parts = leaves(2, 3, 1)
    outputs = lockstep(model, model, parts)
    hand_masks(model, reference, as_one=True)
    loss_of(torch.cat([outputs[0], outputs[2]])).backward()
    expected = reference(torch.cat([p.detach() for p in parts]))
    loss_of(torch.cat([expected[:2], expected[5:]])).backward()
    assert_same_gradients(model, reference)
    assert parts[1].grad is not None
    assert parts[1].grad.abs().max() > 0  # through the statistics


@pytest.mark.parametrize("frozen", ["weights", "inputs", "all but one layer"])
def test_parts_that_want_no_gradient(frozen: str) -> None:
    model, reference = blocks()
    parts = images(2, 3, 1)
    if frozen != "inputs":
        parts[1].requires_grad_()
    if frozen != "inputs":
        kept = {"blocks.1.norm.weight"} if frozen == "all but one layer" else set()
        for one in (model, reference):
            for name, p in one.named_parameters():
                p.requires_grad_(name in kept)
    outputs = lockstep(model, model, parts)
    hand_masks(model, reference, as_one=True)
    whole = torch.cat([p.detach() for p in parts]).requires_grad_()
    loss_of(torch.cat(outputs)).backward()
    loss_of(reference(whole)).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    if frozen != "inputs":
        assert whole.grad is not None
        torch.testing.assert_close(parts[1].grad, whole.grad[2:5], rtol=1e-9, atol=1e-12)


def test_a_graph_that_is_walked_twice() -> None:
    model, reference = blocks()
    parts = leaves(2, 3)
    loss = loss_of(torch.cat(lockstep(model, model, parts)))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, first in zip(model.parameters(), once, strict=True):
        assert torch.equal(p.grad, 2 * first)
    del reference


def test_two_locksteps_walked_together() -> None:
    """Of the second the first micro-batch is the same as of the first one: only its partners differ."""
    model, reference = pair(lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Tanh()))
    windows = [images(3, 2), images(1, 4)]
    windows[1].append(windows[0][0])
    losses = [loss_of(torch.cat(lockstep(model, lambda x: around(model, x), parts))) for parts in windows]
    torch.stack(losses).sum().backward()
    torch.stack([loss_of(reference(torch.cat(parts))) for parts in windows]).sum().backward()
    assert_same_gradients(model, reference)


def test_checkpoints_outside_of_lockstep_meanwhile_are_the_layers_own() -> None:
    reference = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, affine=False), nn.Tanh()).double()
    model = convert_sync_accum(copy.deepcopy(reference), normalization="batch")
    x, parts = images(4)[0], images(2, 3)
    outputs = lockstep(model, lambda part: around(model, part), parts)
    loss_of(around(model, x)).backward()
    loss_of(reference(x)).backward()
    assert_same_gradients(model, reference)
    for y in lookahead(model, lambda part: around(model, part), [x]):
        loss_of(y).backward()
    loss_of(torch.cat(outputs)).backward()
    loss_of(reference(x)).backward()
    loss_of(reference(torch.cat(parts))).backward()
    assert_same_gradients(model, reference)


@pytest.mark.usefixtures("both_passes")
@pytest.mark.parametrize(
    "keeps",
    [
        lambda operator: operator is torch.ops.aten.convolution.default,
        # With a kept one, torch would not write to its input again.
        lambda operator: operator is not torch.ops.aten.relu_.default,
    ],
    ids=["one", "nearly all"],
)
def test_selective_checkpoints_keep_what_they_are_told_to(keeps: Callable[[Any], bool]) -> None:
    kept: list[Any] = []

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if keeps(operator):
            kept.append(operator)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def selective(block: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(
            block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )
        return y

    model, reference = blocks(selective)
    parts = leaves(2, 3)
    compare(model, reference, parts, lockstep(model, model, parts))
    assert kept


def test_with_offload() -> None:
    model, reference = blocks()
    parts = leaves(2, 3)
    outputs, store = run_offloaded(model, parts)
    # What goes into blocks, and not what is inside.
    assert store.parked_bytes > 0
    compare(model, reference, parts, outputs)
    del outputs
    assert store.alive() == []


def test_a_compiled_block_inside() -> None:
    model, reference = blocks()
    for block in model.blocks:
        block.compile(backend="eager")
    for _ in range(2):
        parts = leaves(2, 3)
        compare(model, reference, parts, lockstep(model, model, parts))


# --- refusals and errors --------------------------------------------------------------------------------------


def test_gradients_of_gradients_are_refused() -> None:
    model, _ = blocks()
    parts = leaves(2, 3)
    loss = loss_of(torch.cat(lockstep(model, model, parts)))
    with pytest.raises(RuntimeError, match="lockstep does not support create_graph=True"):
        torch.autograd.grad(loss, parts, create_graph=True)


class Fickle(nn.Module):
    """Adds what is not the same the second time."""

    def forward(self, x: Tensor) -> Tensor:
        return x + float(runs_in_backward())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("after", [nn.Identity, nn.Tanh])
def test_a_second_forward_that_differs_is_an_error_that_names_the_layer(
    after: Callable[[], nn.Module], affine: bool
) -> None:
    model, _ = pair(
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(Fickle(), nn.BatchNorm2d(2, affine=affine), after()))
    )
    outputs = lockstep(model, lambda x: around(model[1], model[0](x)), images(2, 3))
    with pytest.raises(LockstepError, match=r"layer 1\.1 saw other values in a checkpoint's second forward"):
        loss_of(torch.cat(outputs)).backward()


def test_a_second_forward_that_draws_anew_is_an_error_that_names_the_layer() -> None:
    model, _ = blocks(lambda block, x: checkpoint(block, x, use_reentrant=False, preserve_rng_state=False))
    outputs = lockstep(model, model, images(2, 3))
    with pytest.raises(LockstepError, match=r"layer blocks\.2\.\w+ saw other values in a checkpoint's second forward"):
        loss_of(torch.cat(outputs)).backward()


class Half(nn.Module):
    """Comes to its layer the first time only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return x if runs_in_backward() else self.norm(x)


def test_a_second_forward_without_the_layer_is_an_error_that_names_it() -> None:
    model, _ = pair(Half)
    outputs = lockstep(model, lambda x: around(model, x), leaves(2, 3))
    with pytest.raises(LockstepError, match="layer norm saw other values"):
        loss_of(torch.cat(outputs)).backward()


def test_a_backward_inside_of_a_second_forward_is_refused() -> None:
    model, _ = pair(lambda: nn.BatchNorm2d(2))

    def penalised(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = model(x)
        if runs_in_backward():
            torch.autograd.grad(y.sum(), x, retain_graph=True)
        return y.sin()

    with set_checkpoint_early_stop(False):
        outputs = lockstep(model, lambda x: checkpoint(penalised, x, use_reentrant=False), leaves(2, 3))
    with pytest.raises(LockstepError, match="a backward inside of a checkpoint comes to layer SyncAccumBatchNorm2d"):
        loss_of(torch.cat(outputs)).backward()


class Alike(nn.Module):
    """Comes to its layer twice, with other values where no sample is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        is_sampled = torch.arange(24).view(6, 4) % 3 == 0  # 8 of 24
        y: Tensor = self.norm(x).sin() * self.norm(torch.where(is_sampled, x, -2 * x))
        return y


def test_visits_of_one_checkpoint_that_look_alike_are_an_error_that_names_the_layer() -> None:
    model, _ = pair(Alike)
    outputs = lockstep(model, lambda x: around(model, x), parts_of(6, 6))
    with pytest.raises(LockstepError, match=r"layer norm is visited several times in one checkpoint.* look alike"):
        loss_of(torch.cat(outputs)).backward()


def test_parametrized_weights_inside_are_refused() -> None:
    model, _ = pair(
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 1)), nn.BatchNorm2d(2))
    )
    with pytest.raises(LockstepError, match=r"weight 0\.parametrizations\.weight .* under torch\.utils\.checkpoint"):
        lockstep(model, lambda x: around(model, x), images(2, 3))
    # Computed outside it is as any other weight.
    outputs = lockstep(model, lambda x: around(model[1], model[0](x)), images(2, 3))
    torch.cat(outputs).square().sum().backward()


class Swapped(nn.Module):
    """Comes to the other of two layers the second time."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norms[runs_in_backward()](x)
        return y.tanh()


def test_a_second_forward_that_comes_to_another_layer_is_an_error_that_names_it() -> None:
    model, _ = pair(Swapped)
    norms: Any = model.norms
    outputs = lockstep(model, lambda x: around(norms[1], around(model, x)), leaves(2, 3))
    with pytest.raises(LockstepError, match=r"layer norms\.1 saw other values in a checkpoint's second forward"):
        loss_of(torch.cat(outputs)).backward()


# --- what is left ---------------------------------------------------------------------------------------------


def test_random_numbers_afterwards_do_not_depend_on_how_many_micro_batches_there_were() -> None:
    def draw(*sizes: int) -> float:
        torch.manual_seed(0)
        lockstep(model, lambda x: around(model, x), parts_of(*sizes))
        return float(torch.rand(()))

    model, _ = pair(lambda: nn.BatchNorm1d(4))
    assert draw(6) == draw(3, 3) == draw(3, 2, 1)


def test_masks_are_others_in_the_next_window() -> None:
    model, _ = blocks()
    parts = images(0, 2)  # an empty one draws nothing
    for _ in range(2):
        lockstep(model, model, parts)
    first, second = (m for m in model.blocks[2].masks[0].noted if len(m))
    assert not torch.equal(first, second)


class BoomError(Exception):
    pass


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_inside_leaves_nothing(failing: int) -> None:
    model, _ = blocks()
    calls = itertools.count()

    def call(block: nn.Module, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            y: Tensor = block(x)
            # Of the second block, at which all are inside.
            if next(calls) == 3 + failing:
                raise BoomError
            return y

        return checkpoint(run, x, use_reentrant=False)

    model.call = call
    with pytest.raises(BoomError):
        lockstep(model, model, images(2, 3, 1))
    assert all_saved_tensor_hooks() == []
    assert eval_frame._stance.stance == "default"
    assert model.stem[1].window.count == 0
    model.call = around
    lockstep(model, model, images(2, 3, 1))
    assert model.stem[1].window.count > 0


def test_an_interrupt_before_any_line_leaves_all_or_nothing() -> None:
    model, _ = pair(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    parts = parts_of(3, 3)

    def traced(arrive: Callable[[Line], None]) -> None:
        results: list[Tensor] = []
        with traced_lines(arrive):
            results += lockstep(model, lambda x: around(model, x), parts)

    lines: list[Line] = []
    traced(lines.append)
    model[1].discard()
    kept: list[int] = []
    for line in (line for line in lines if line.runs < 3):
        with suppress(Interrupt):
            traced(interrupt_at(line))
        assert all_saved_tensor_hooks() == []
        if eval_frame._stance.stance != "default":
            gc.collect()  # the error held the graph
        assert eval_frame._stance.stance == "default"
        kept.append(int(model[1].window.count))
        model[1].discard()
    # Before some line nothing is kept, after it all.
    assert set(kept) == {0, 6}


def test_memory_of_a_block_is_given_back_with_its_backward() -> None:
    """Not with the last one: results are often held until the next step."""
    model, _ = blocks()
    inputs: list[weakref.ref[Tensor]] = []

    def call(block: nn.Module, x: Tensor) -> Tensor:
        inputs.append(weakref.ref(x))
        return around(block, x)

    model.call = call
    outputs = lockstep(model, model, leaves(2, 3))
    loss_of(torch.cat(outputs)).backward()
    gc.collect()
    assert len(inputs) == 6
    assert [i() for i in inputs if i() is not None] == []
    assert not [o for o in gc.get_objects() if isinstance(o, Checkpoints)]
    assert len(outputs) == 2
