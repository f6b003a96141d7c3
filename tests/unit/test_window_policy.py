"""Policy "window": the window so far with the last one as a prior, and balanced feedback; against its formulas."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncaccum import (
    SyncAccumBatchNorm,
    commit,
    convert_sync_accum,
    discard,
    gather_window_state_dict,
    load_window_state_dict,
    not_counted,
    window_state_dict,
)


class Oracle:
    """The policy's formulas, plainly, for (N, C) in float64 and a layer without weight."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        self.eps = eps
        self.prior = 1.0, torch.zeros(channels).double(), torch.ones(channels).double()
        self.expected = torch.zeros(2, channels).double()
        self.total = 0.0
        self.begin()

    def begin(self) -> None:
        self.xs: list[Tensor] = []
        self.done = 0.0
        self.seen, self.applied = torch.zeros_like(self.expected), torch.zeros_like(self.expected)

    def step(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and gradient of x."""
        self.xs.append(x)
        samples, mean, mean_sq = self.prior
        so_far = torch.cat(self.xs)
        count = samples + len(so_far)
        center = (samples * mean + so_far.sum(0)) / count
        scale = ((samples * mean_sq + so_far.square().sum(0)) / count - center.square() + self.eps).rsqrt()
        y, n = (x - center) * scale, float(len(x))
        self.seen = self.seen + torch.stack([dy.sum(0), (dy * y).sum(0)])
        total = self.total or self.done + n
        to_come = max(total - self.done - n, 0) * self.expected
        each = (self.seen + to_come - self.applied) / max(total - self.done, 0.1 * total, n)
        self.applied, self.done = self.applied + n * each, self.done + n
        return y, scale * (dy - each[0] - y * each[1])

    def commit(self) -> None:
        whole = torch.cat(self.xs)
        self.prior = 16.0, whole.mean(0), whole.square().mean(0)
        self.expected, self.total = self.seen / self.done, self.done
        self.begin()


def draw(sizes: Sequence[int], generator: torch.Generator, channels: int = 3) -> list[Tensor]:
    return [torch.randn(n, channels, dtype=torch.float64, generator=generator) * 2 + 0.5 for n in sizes]


def layer_under_test() -> SyncAccumBatchNorm:
    return SyncAccumBatchNorm(3, affine=False, normalization="window").double()


def compare(layer: Any, oracle: Oracle, xs: Sequence[Tensor], dys: Sequence[Tensor]) -> None:
    for x, dy in zip(xs, dys, strict=True):
        x.requires_grad_()
        y = layer(x)
        y.backward(dy)
        expected, dx = oracle.step(x.detach(), dy)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad, dx)


WINDOWS = [(1, 1, 1, 1, 1), (2, 3), (4, 1, 4, 4), (3,), (1,) * 30]
"""Lengths that grow and shrink, and a micro-batch of one."""


def test_outputs_and_gradients_are_the_formulas_over_windows_of_any_length() -> None:
    layer, oracle, generator = layer_under_test(), Oracle(3), torch.Generator().manual_seed(0)
    for sizes in WINDOWS:
        compare(layer, oracle, draw(sizes, generator), draw(sizes, generator))
        commit(layer)
        oracle.commit()


def test_a_sample_is_all_positions_of_an_image() -> None:
    layer = SyncAccumBatchNorm(3, normalization="window").double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    y = layer(x)
    columns = x.movedim(1, -1).reshape(-1, 3)
    count = 20 + 40
    mean = columns.sum(0) / count
    variance = (20 + columns.square().sum(0)) / count - mean.square()
    torch.testing.assert_close(y.movedim(1, -1).reshape(-1, 3), (columns - mean) * (variance + 1e-5).rsqrt())


def test_a_trained_layer_without_a_last_window_starts_from_its_statistics() -> None:
    plain = nn.BatchNorm1d(3).double()
    for x in draw((50,) * 20, torch.Generator().manual_seed(0)):
        plain(x)
    layer = convert_sync_accum(copy.deepcopy(plain), normalization="window")
    x = torch.full((1, 3), 5.0, dtype=torch.float64)
    mean = (16 * plain.running_mean + 5) / 17
    variance = (16 * (plain.running_var + plain.running_mean.square()) + 25) / 17 - mean.square()
    torch.testing.assert_close(layer(x)[0], (5 - mean) * (variance + 1e-5).rsqrt())


@pytest.mark.parametrize("gathered", [False, True])
def test_a_resumed_layer_goes_on_as_the_saved_one(gathered: bool) -> None:
    layer, generator = layer_under_test(), torch.Generator().manual_seed(1)
    oracle = Oracle(3)
    compare(layer, oracle, draw((2, 2, 2), generator), draw((2, 2, 2), generator))
    commit(layer)
    oracle.commit()
    if not gathered:  # with an open window, whose books a gathered state does not have
        compare(layer, oracle, draw((2, 1), generator), draw((2, 1), generator))
    file = io.BytesIO()
    state = (gather_window_state_dict if gathered else window_state_dict)(layer)
    torch.save({"model": layer.state_dict(), "window": state}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = layer_under_test()
    resumed.load_state_dict(saved["model"])
    load_window_state_dict(resumed, saved["window"])
    xs = draw((2, 2), generator)
    if gathered:
        torch.testing.assert_close(resumed(xs[0]), layer(xs[0]))
    else:
        compare(resumed, oracle, xs, draw((2, 2), generator))
    # A state from before there was such a policy.
    name, books = saved["window"]
    load_window_state_dict(resumed, {name: saved["window"][name]})
    with pytest.raises(ValueError, match=r"does not fit .*ledger"):
        load_window_state_dict(resumed, {**saved["window"], books: torch.zeros(3)})


def test_a_discarded_window_leaves_the_books_of_the_last() -> None:
    layer, oracle, generator = layer_under_test(), Oracle(3), torch.Generator().manual_seed(2)
    for dropped in (discard, SyncAccumBatchNorm.discard):
        compare(layer, oracle, draw((2, 3), generator), draw((2, 3), generator))
        commit(layer)
        oracle.commit()
        layer(draw((4,), generator)[0].requires_grad_()).sum().backward()
        dropped(layer)
        compare(layer, oracle, draw((1, 2), generator), draw((1, 2), generator))
        commit(layer)
        oracle.commit()


def test_eval_and_uncounted_forwards_leave_the_books_alone() -> None:
    layer, oracle, generator = layer_under_test(), Oracle(3), torch.Generator().manual_seed(3)
    compare(layer, oracle, draw((2, 3), generator), draw((2, 3), generator))
    commit(layer)
    oracle.commit()
    for _ in range(2):
        xs, dys = draw((2, 3), generator), draw((2, 3), generator)
        compare(layer, oracle, xs[:1], dys[:1])
        with not_counted(layer):
            layer(draw((4,), generator)[0].requires_grad_()).square().sum().backward()
        layer.eval()
        layer(xs[0].detach())
        layer.train()
        compare(layer, oracle, xs[1:], dys[1:])
        commit(layer)
        oracle.commit()


def test_a_backward_after_the_commit_takes_its_own_share_and_spoils_no_books() -> None:
    layer, oracle, generator = layer_under_test(), Oracle(3), torch.Generator().manual_seed(4)
    compare(layer, oracle, draw((2, 2), generator), draw((2, 2), generator))
    late = draw((3,), generator)[0].requires_grad_()
    y = layer(late)
    oracle.step(late.detach(), torch.zeros(3, 3).double())
    oracle.done -= 3  # it was not walked in time
    commit(layer)
    oracle.commit()
    dy = draw((3,), generator)[0]
    y.backward(dy)
    scale = (y[0] - y[1]) / (late[0] - late[1])
    share = torch.stack([dy.sum(0), (dy * y).sum(0)]) / (1 + 4 + 3)
    torch.testing.assert_close(late.grad, scale * (dy - share[0] - y * share[1]))
    compare(layer, oracle, draw((2, 2), generator), draw((2, 2), generator))


def test_an_overflow_does_not_reach_the_next_window() -> None:
    layer = layer_under_test()
    layer(draw((4,), torch.Generator())[0].requires_grad_()).backward(torch.full((4, 3), torch.inf).double())
    commit(layer)
    x = draw((4,), torch.Generator())[0].requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing_also_where_all_go_forward_first(reentrant: bool) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3)).double()
    plain = convert_sync_accum(block, normalization="window")
    saving = copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        losses: list[list[Tensor]] = [[], []]
        for x in draw((2, 3, 4), generator):
            x.requires_grad_()
            losses[0].append(plain(x).square().sum())
            losses[1].append(checkpoint(saving, x, use_reentrant=reentrant).square().sum())
        for a, b in zip(*losses, strict=True):
            a.backward()
            b.backward()
        for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad)
        commit(plain)
        commit(saving)


def test_a_checkpoint_with_other_values_is_an_error() -> None:
    layer = convert_sync_accum(nn.BatchNorm1d(3), normalization="window")
    x = torch.randn(4, 3, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        return layer(x + torch.randn(4, 3))

    y = checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match="with other values than any forward of this window"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_a_compiled_model_breaks_its_graph_and_gives_the_same() -> None:
    torch._dynamo.reset()
    model = convert_sync_accum(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double(), normalization="window")
    other = copy.deepcopy(model)
    compiled: Any = torch.compile(other, backend="aot_eager")
    generator = torch.Generator().manual_seed(6)
    for sizes in WINDOWS[:3]:
        for x in draw(sizes, generator):
            model(x).square().sum().backward()
            compiled(x).square().sum().backward()
        commit(model)
        commit(other)
    torch.testing.assert_close(other[0].weight.grad, model[0].weight.grad)


def test_books_move_copy_and_pickle_with_the_layer() -> None:
    layer, oracle, generator = layer_under_test(), Oracle(3), torch.Generator().manual_seed(7)
    compare(layer, oracle, draw((2, 2), generator), draw((2, 2), generator))
    commit(layer)
    oracle.commit()
    file = io.BytesIO()
    torch.save(copy.deepcopy(layer).half().double(), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    compare(again, oracle, draw((2, 2), generator), draw((2, 2), generator))


def test_another_policy_and_back_starts_new_books() -> None:
    layer = layer_under_test()
    layer.normalization = "batch"
    assert layer._accumulation.ledger is None
    layer.normalization = "window"
    compare(layer, Oracle(3), draw((2, 2), torch.Generator()), draw((2, 2), torch.Generator()))
