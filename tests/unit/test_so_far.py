"""Policy "window" against its formulas: the window so far, the last one as a prior, and balanced feedback."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncaccum
from syncaccum import SyncAccumBatchNorm, commit, convert_sync_accum, discard, not_counted
from syncaccum.layer.replay import Record

FLOOR = 0.1
SHAPE = (4, 3, 2, 5)  # of a micro-batch: 40 values per channel, 10 per sample
DIMS = (0, 2, 3)

both_passes = pytest.mark.usefixtures("both_passes")


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or SHAPE), generator=generator, dtype=torch.float64) * 3 + 2


def make_layer(**arguments: Any) -> SyncAccumBatchNorm:
    layer = SyncAccumBatchNorm(3, normalization="window", dtype=torch.float64, **arguments)
    if not layer.affine:
        return layer
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    return layer


class Oracle:
    """The policy in plain formulas, for one layer with one visit per micro-batch.

    Args:
        samples: for how many the running statistics count; an untrained layer's for one value, a tenth of a sample.
    """

    def __init__(self, layer: SyncAccumBatchNorm, samples: float = 0.1) -> None:
        self.weight, self.bias, self.eps = layer.weight.detach(), layer.bias.detach(), layer.eps
        mean, var = layer.running_mean.clone(), layer.running_var.clone()
        # Per value: the mean and the mean square, and how many samples they count for.
        self.prior = mean, var + mean.square(), samples
        self.is_first = True
        self.expected = self.latest = 0.0
        self.open()

    def open(self) -> None:
        self.seen: list[Tensor] = []
        self.owed = torch.zeros(2, 3, dtype=torch.float64)
        self.done = 0.0

    def forward(self, x: Tensor, *, counts: bool = True) -> Tensor:
        everything = [*self.seen, x]
        if counts:
            self.seen = everything
        mean, square, samples = self.prior
        k = samples * x[0, 0].numel()
        flat = torch.cat([e.transpose(0, 1).flatten(1) for e in everything], 1)
        self.total = flat.shape[1] + k
        self.center = (flat.sum(1) + k * mean) / self.total
        var = (flat.square().sum(1) + k * square) / self.total - self.center.square()
        self.scale = (var + self.eps).rsqrt()
        x_hat = (x - self.center[:, None, None]) * self.scale[:, None, None]
        self.last_x_hat = x_hat
        return x_hat * self.weight[:, None, None] + self.bias[:, None, None]

    def backward(self, dy: Tensor, x_hat: Tensor, scale: Tensor, *, counts: bool = True) -> tuple[Tensor, ...]:
        sums = torch.stack([dy.sum(DIMS), (dy * x_hat).sum(DIMS)])
        n, sample = dy.numel() / 3, dy[0, 0].numel()
        if counts:
            self.owed = self.owed + sums
            if self.expected:
                left = min(self.expected - self.done, max(12 * sample, 2 * n))
                left = max(left, FLOOR * self.expected, 4 * sample, n)
                feedback = self.owed / left
                self.owed = self.owed - n * feedback
            else:
                feedback = self.owed / (self.done + n + sample)
            self.done += n
        else:
            feedback = sums / self.total
        a, b = feedback[:, :, None, None]
        dx = (self.weight * scale)[:, None, None] * (dy - a - x_hat * b)
        return dx, sums[1], sums[0]

    def commit(self) -> None:
        flat = torch.cat([e.transpose(0, 1).flatten(1) for e in self.seen], 1)
        mean, square = flat.mean(1), flat.square().mean(1)
        worth, before, total = 4.0, 0.0, sum(map(len, self.seen))
        if not self.is_first:
            variance = square - mean.square() + self.eps
            far = ((mean - self.prior[0]).square() / variance).mean().item()
            apart = torch.stack([len(x) * (x.mean(DIMS) - mean).square() for x in self.seen]).sum(0) / variance
            tau = apart.mean().item() / max(len(self.seen) - 1, 1)
            worth = before = 1 / min(max(far / (tau + 1e-12) - 1 / total, 1 / 16), 1)
        share = total / (total + before)
        self.prior = (
            share * mean + (1 - share) * self.prior[0],
            share * square + (1 - share) * self.prior[1],
            worth,
        )
        self.is_first = False
        if self.done:
            self.expected, self.latest = max(self.done, self.latest), self.done
        self.open()

    def check(self, layer: SyncAccumBatchNorm, seed: int, n: int = 4, *, counts: bool = True) -> None:
        """One micro-batch, forward and backward, through both."""
        x, dy = draw(seed, n, *SHAPE[1:]).requires_grad_(), draw(seed + 1000, n, *SHAPE[1:])
        y = layer(x)
        torch.testing.assert_close(y, self.forward(x.detach(), counts=counts))
        got = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
        expected = self.backward(dy, self.last_x_hat, self.scale, counts=counts)
        torch.testing.assert_close(got, expected)

    def check_window(self, layer: SyncAccumBatchNorm, seed: int, sizes: Sequence[int]) -> None:
        for i, n in enumerate(sizes):
            self.check(layer, seed + i, n)


# --- the formulas ----------------------------------------------------------------------------------------------


@both_passes
def test_windows_of_any_length_follow_the_formulas() -> None:
    layer = make_layer()
    oracle = Oracle(layer)
    for window, sizes in enumerate([(4, 4, 4), (4,) * 6, (2, 7), (4,) * 7, (5,), (3, 3), (4, 4), (4, 4)]):
        oracle.check_window(layer, 10 * window, sizes)
        commit(layer)
        oracle.commit()


@both_passes
def test_in_total_a_window_of_the_expected_length_pays_what_it_owes() -> None:
    layer = make_layer(affine=False)
    for window in range(3):
        paid, owed = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for i in range(5):
            x, dy = draw(10 * window + i).requires_grad_(), draw(500 + 10 * window + i)
            y = layer(x)
            (dx,) = torch.autograd.grad(y, x, dy)
            scale = ((y[0, :, 0, 0] - y[0, :, 0, 1]) / (x[0, :, 0, 0] - x[0, :, 0, 1])).detach()
            # dx / s = dy - A - x_hat B: with x_hat's part of it in y.
            a, b = _take_apart(dy - dx / scale[:, None, None], y.detach())
            paid, owed = paid + 40 * torch.stack([a, b]).sum(0), owed + (dy + dy * y.detach()).sum(DIMS)
        commit(layer)
        if window:
            torch.testing.assert_close(paid, owed)


def _take_apart(feedback: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """A and B, where feedback is A + x_hat B in each channel."""
    first, second, x, z = (t[0, :, 0, i] for t in (feedback, x_hat) for i in (0, 1))
    b = (first - second) / (x - z)
    return first - b * x, b


def test_the_prior_of_data_that_does_not_drift_grows_and_that_of_data_that_does_is_one_sample() -> None:
    layer = make_layer()
    worth = []
    for window in range(40):
        drift = 0.0 if window < 30 else 3.0 * window
        for i in range(8):
            layer((draw(10 * window + i) + drift).requires_grad_()).sum().backward()
        commit(layer)
        assert layer._accumulation.ledger is not None
        worth.append(layer._accumulation.ledger.prior[0].item())
    assert worth[0] == 4
    # Means of 10 values of 32 samples are close: mostly no drift is seen.
    assert sorted(worth[1:30])[10] == 16
    assert worth[31:] == [1.0] * 9


def test_one_micro_batch_per_window_is_batch_norm_with_4_more_samples_in_its_statistics() -> None:
    layer = make_layer()
    layer(draw(0)).sum().backward()
    commit(layer)
    x, dy = draw(1).requires_grad_(), draw(2)
    both = torch.cat([draw(0), x.detach()])
    mean, var = both.mean(DIMS), both.var(DIMS, correction=0)
    x_hat = (x.detach() - mean[:, None, None]) / (var + layer.eps).sqrt()[:, None, None]
    y = layer(x)
    torch.testing.assert_close(y, x_hat * layer.weight[:, None, None] + layer.bias[:, None, None])
    (dx,) = torch.autograd.grad(y, x, dy)
    mean_dy, mean_dy_x_hat = dy.mean(DIMS, keepdim=True), (dy * x_hat).mean(DIMS, keepdim=True)
    slope = (layer.weight / (var + layer.eps).sqrt())[:, None, None]
    torch.testing.assert_close(dx, slope * (dy - mean_dy - x_hat * mean_dy_x_hat))


def test_a_trained_layer_without_a_last_window_counts_its_running_statistics_as_4_samples() -> None:
    plain = nn.BatchNorm2d(3, dtype=torch.float64)
    plain(draw(9))
    layer = convert_sync_accum(plain, normalization="window")
    assert isinstance(layer, SyncAccumBatchNorm)
    Oracle(layer, samples=4.0).check_window(layer, 0, (4, 4))


def test_statistics_that_are_loaded_or_reset_replace_the_last_window() -> None:
    layer, other = make_layer(), make_layer()
    for one in (layer, other):
        one(draw(9)).sum().backward()
        commit(one)
    layer.load_state_dict(other.state_dict())
    Oracle(layer, samples=4.0).check_window(layer, 0, (4, 4))
    layer.reset_running_stats()
    Oracle(layer).check_window(layer, 0, (4, 4))


@both_passes
def test_a_large_mean_costs_no_more_than_its_digits() -> None:
    # float32 carries a mean of 1e4 deviations to 1e-3 of a deviation.
    layer = SyncAccumBatchNorm(3, normalization="window")
    for window in range(2):
        x = (draw(window) + 3e4).float().requires_grad_()
        y = layer(x)
        dy = draw(window + 5).float()
        y.backward(dy)
        commit(layer)
    exact = SyncAccumBatchNorm(3, normalization="window").double()
    for window in range(2):
        z = (draw(window) + 3e4).float().double().requires_grad_()
        out = exact(z)
        out.backward(draw(window + 5).float().double())
        commit(exact)
    torch.testing.assert_close(y, out.float(), atol=2e-3, rtol=0)
    assert x.grad is not None
    assert z.grad is not None
    torch.testing.assert_close(x.grad, z.grad.float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_data_comes_close_to_float64(dtype: torch.dtype) -> None:
    narrow, wide = SyncAccumBatchNorm(3, normalization="window"), SyncAccumBatchNorm(3, normalization="window").double()
    for i in range(4):
        x = draw(i).to(dtype)
        dy = draw(100 + i).to(dtype)
        xs = [x.clone().requires_grad_(), x.double().requires_grad_()]
        for one, layer in zip(xs, (narrow, wide), strict=True):
            layer(one).backward(dy.to(one.dtype))
        assert xs[0].grad is not None
        assert xs[1].grad is not None
        # Three units in the last place of numbers up to 8.
        torch.testing.assert_close(xs[0].grad.double(), xs[1].grad, atol=24 * torch.finfo(dtype).eps, rtol=0)
        if i == 1:
            commit(narrow), commit(wide)


# --- what counts -----------------------------------------------------------------------------------------------


def make_second_window() -> tuple[SyncAccumBatchNorm, Oracle]:
    layer = make_layer()
    oracle = Oracle(layer)
    oracle.check_window(layer, 0, (4, 4, 4))
    commit(layer)
    oracle.commit()
    oracle.check(layer, 20)
    return layer, oracle


@both_passes
def test_forwards_that_do_not_count_leave_statistics_and_books_alone() -> None:
    layer, oracle = make_second_window()
    with not_counted(layer):
        oracle.check(layer, 30, counts=False)
    layer.momentum = 0.0
    oracle.check(layer, 31, counts=False)
    layer.momentum = 0.1
    layer.eval()
    layer(draw(32).requires_grad_()).sum().backward()
    layer.train()
    layer(draw(0, 0, *SHAPE[1:]).requires_grad_()).sum().backward()
    oracle.check_window(layer, 40, (4, 4))


def test_a_discarded_window_is_forgotten_and_its_expected_length_is_not() -> None:
    layer, oracle = make_second_window()
    y = layer(draw(30).requires_grad_())
    discard(layer)
    oracle.open()
    # Its window is over: it must not be booked in the next.
    y.sum().backward()
    oracle.check_window(layer, 40, (4, 4))


def test_a_window_discarded_before_its_first_backward_keeps_the_length_of_the_last() -> None:
    layer = make_layer()
    oracle = Oracle(layer)
    oracle.check_window(layer, 0, (4, 4, 4))
    commit(layer)
    oracle.commit()
    discard(layer)
    oracle.check_window(layer, 40, (4, 4))


def test_windows_without_a_backward_change_no_expectation() -> None:
    layer, oracle = make_second_window()
    commit(layer)
    oracle.commit()
    with torch.no_grad():
        layer(draw(30))
    oracle.forward(draw(30))
    commit(layer)
    oracle.commit()
    oracle.check_window(layer, 40, (4, 4))


@both_passes
def test_a_backward_after_the_commit_of_its_window_has_its_own_share_and_leaves_the_books_alone() -> None:
    layer, oracle = make_second_window()
    x, dy = draw(30).requires_grad_(), draw(31)
    y = layer(x)
    oracle.forward(x.detach())
    x_hat, scale, total = oracle.last_x_hat, oracle.scale, oracle.total
    commit(layer)
    oracle.commit()
    oracle.check(layer, 40)
    after, oracle.total = oracle.total, total
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], oracle.backward(dy, x_hat, scale, counts=False)[0])
    oracle.total = after
    oracle.check_window(layer, 50, (4, 4))


@both_passes
def test_two_backward_walks_of_one_graph_are_as_one_of_their_sum() -> None:
    gradients = []
    for walks in (2, 1):
        layer, _ = make_second_window()
        x, (first, second) = draw(30).requires_grad_(), (draw(31), draw(32))
        y = layer(x)
        if walks == 2:
            y.backward(first, retain_graph=True)
            y.backward(second)
        else:
            y.backward(first + second)
        z = draw(33).requires_grad_()
        layer(z).backward(first)
        gradients.append((x.grad, z.grad, layer.weight.grad, layer.bias.grad))
    torch.testing.assert_close(*gradients)


def test_what_two_backward_walks_at_once_pay_is_taken_off_once_each() -> None:
    """Two threads may ask before either has paid."""
    layer, _ = make_second_window()
    ledger = layer._accumulation.ledger
    assert ledger is not None
    owed = ledger.owed.clone()
    records = [Record(torch.ones(7, dtype=torch.float64), ledger.number, 10**9 + i, True) for i in range(2)]
    sums = [draw(50 + i, 6) for i in range(2)]
    dues = [ledger.ask(2, 10, record) for record in records]
    for due, batch, record in zip(dues, sums, records, strict=True):
        ledger.book(due, batch, 20, record)
    paid = sum(20 * due.feedback(batch) for due, batch in zip(dues, sums, strict=True))
    torch.testing.assert_close(ledger.owed, owed + sum(sums) - paid)
    assert ledger.done == 40 + 2 * 20


@both_passes
def test_a_layer_visited_twice_pools_its_sums() -> None:
    layer = make_layer()
    for window in range(2):
        x = draw(window).requires_grad_()
        layer(layer(x)).sum().backward()
        if window == 0:
            commit(layer)
    state = syncaccum.window_state_dict(layer)
    assert next(iter(state.values()))[0] == 80  # both visits of 40 values
    # dy of the outer visit sums to 40 in each channel, that of the inner one to less.
    assert layer._accumulation.ledger is not None
    assert layer._accumulation.ledger.done == layer._accumulation.ledger.expected == 80


def test_an_overflow_spoils_its_own_window_only() -> None:
    layer = make_layer()
    x = draw(0).requires_grad_()
    layer(x).backward(torch.full(SHAPE, torch.inf, dtype=torch.float64))
    commit(layer)
    x = draw(1).requires_grad_()
    layer(x).backward(draw(2))
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_goes_on_alone(copied: Any) -> None:
    layer, oracle = make_second_window()
    other = copied(layer)
    other(draw(50).requires_grad_()).sum().backward()
    oracle.check(layer, 30)
    again, oracle = make_second_window()
    oracle.check(copied(again), 30)


def test_a_pruned_layer_starts_anew() -> None:
    layer, _ = make_second_window()
    commit(layer)
    layer.num_features = 2
    for name in ("weight", "bias"):
        setattr(layer, name, nn.Parameter(getattr(layer, name)[:2]))
    for name in ("running_mean", "running_var"):
        setattr(layer, name, getattr(layer, name)[:2].clone())
    x = draw(1)[:, :2].clone().requires_grad_()
    layer(x).sum().backward()
    assert commit(layer).values == {"SyncAccumBatchNorm": 40}


def test_another_policy_and_back_forgets_the_books() -> None:
    layer, _ = make_second_window()
    commit(layer)
    layer.normalization = "batch"
    layer.normalization = "window"
    Oracle(layer, samples=4.0).check_window(layer, 0, (4, 4))


# --- saved windows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [0, 1, 2, 4])
def test_a_saved_window_goes_on_bit_for_bit(windows: int) -> None:
    layer, _ = make_second_window()
    for window in range(windows):
        layer(draw(70 + window).requires_grad_()).sum().backward()
        commit(layer)
        layer(draw(80 + window).requires_grad_()).sum().backward()
    other = make_layer()
    other.load_state_dict(layer.state_dict())
    syncaccum.load_window_state_dict(other, syncaccum.window_state_dict(layer))
    for window in range(2):
        results = []
        for one in (layer, other):
            x = draw(60 + window).requires_grad_()
            y = one(x)
            results.append((y.detach(), torch.autograd.grad(y, x, draw(61))[0]))
            commit(one)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_old_state_loads_and_starts_from_the_running_statistics() -> None:
    layer, _ = make_second_window()
    state = {key: value for key, value in syncaccum.window_state_dict(layer).items() if "/" not in key}
    oracle = Oracle(layer, samples=4.0)
    oracle.forward(draw(20))  # the open window's micro-batch
    syncaccum.load_window_state_dict(layer, state)
    oracle.check_window(layer, 40, (4, 4))


def test_books_that_do_not_fit_are_an_error_that_names_them() -> None:
    layer, _ = make_second_window()
    state = syncaccum.window_state_dict(layer)
    name = next(key for key in state if key.endswith("/owed"))
    with pytest.raises(ValueError, match="SyncAccumBatchNorm/owed"):
        syncaccum.load_window_state_dict(layer, {**state, name: torch.zeros(3)})


def test_a_gathered_state_of_one_rank_goes_on() -> None:
    layer, oracle = make_second_window()
    other = make_layer()
    other.load_state_dict(layer.state_dict())
    syncaccum.load_window_state_dict(other, syncaccum.gather_window_state_dict(layer))
    oracle.check_window(other, 40, (4, 4))


# --- second forwards -------------------------------------------------------------------------------------------


@both_passes
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("counts", [True, False])
def test_a_checkpoint_gives_the_gradient_of_its_first_forward(reentrant: bool, counts: bool) -> None:
    gradients = []
    for saves in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).double()
        net = convert_sync_accum(net, normalization="window")
        for window in range(2):
            xs = [draw(10 * window + i).requires_grad_() for i in range(3)]
            with not_counted(net) if not counts else torch.enable_grad():
                ys = [checkpoint(net, x, use_reentrant=reentrant) if saves else net(x) for x in xs]
            # In another order than the forwards'.
            for i in (1, 2, 0):
                (ys[i] * draw(70 + i)).sum().backward()
            with torch.no_grad():
                net(draw(99))
            commit(net)
        gradients.append([x.grad for x in xs] + [p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("end", [commit, discard])
def test_a_checkpoint_gives_the_gradient_of_its_first_forward_after_the_windows_end(
    end: Callable[[nn.Module], object], reentrant: bool
) -> None:
    gradients = []
    for saves in (True, False):
        layer = make_layer()
        x = draw(0).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant) if saves else layer(x)
        end(layer)
        if not reentrant:
            layer(draw(1).requires_grad_()).sum().backward()
        (y * draw(2)).sum().backward()
        assert layer.window.count == (0 if reentrant else draw(1)[:, 0].numel())
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*gradients)


def test_a_frozen_layer_under_a_checkpoint_runs_again_as_the_first_time() -> None:
    """It leaves no node in a graph that could hold what it used."""
    gradients = []
    for saves in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).double()
        net = convert_sync_accum(net, normalization="window")
        net[0].requires_grad_(False)
        for i in range(3):
            y = checkpoint(net, draw(i), use_reentrant=False) if saves else net(draw(i))
            (y * draw(10 + i)).sum().backward()
        gradients.append([p.grad for p in net[1:].parameters()])
    torch.testing.assert_close(*gradients)


def test_a_reentrant_checkpoint_whose_first_forward_is_not_of_this_window_is_an_error() -> None:
    layer = make_layer()
    y = checkpoint(layer, draw(0).requires_grad_(), use_reentrant=True)
    commit(layer)
    with torch.no_grad():
        layer(draw(1))
    with pytest.raises(RuntimeError, match="there was no such forward"):
        y.sum().backward()


def test_a_checkpoint_with_other_values_is_an_error() -> None:
    layer = make_layer()

    def forward(x: Tensor) -> Any:
        return layer(x + torch.randn(SHAPE, dtype=torch.float64))

    y = checkpoint(forward, draw(0).requires_grad_(), use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match="there was no such forward"):
        y.sum().backward()


def test_forwards_outside_of_checkpoints_leave_nothing_behind() -> None:
    layer = make_layer()
    for i in range(3):
        checkpoint(layer, draw(i).requires_grad_(), use_reentrant=False).sum().backward()
        layer(draw(i).requires_grad_()).sum().backward()
    assert layer._accumulation.ledger is not None
    records = layer._accumulation.ledger.records
    assert not [ref for ref in records._live if ref() is not None]


# --- transforms, compilers, gradients of gradients -------------------------------------------------------------


def test_transforms_differentiate_the_own_share_and_leave_the_books_alone() -> None:
    layer, oracle = make_second_window()
    x, dy = draw(30), draw(31)
    with not_counted(layer):
        gradient = torch.func.grad(lambda z: (layer(z) * dy).sum())(x)
    oracle.forward(x, counts=False)
    torch.testing.assert_close(gradient, oracle.backward(dy, oracle.last_x_hat, oracle.scale, counts=False)[0])
    oracle.check(layer, 40)


@both_passes
def test_a_gradient_of_the_gradient_takes_statistics_and_feedback_for_constants() -> None:
    layer, oracle = make_second_window()
    x, dy = draw(30).requires_grad_(), draw(31).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    oracle.forward(x.detach())
    scale = oracle.scale
    x_hat = oracle.last_x_hat
    done = oracle.backward(dy.detach(), x_hat, scale)
    torch.testing.assert_close(dx, done[0])
    v = draw(32)
    of_dy, of_x = torch.autograd.grad(dx, (dy, x), v)
    slope = (layer.weight.detach() * scale)[:, None, None]
    torch.testing.assert_close(of_dy, slope * v)
    _, b = _take_apart(dy.detach() - dx.detach() / slope, x_hat)
    torch.testing.assert_close(of_x, -slope * scale[:, None, None] * b[:, None, None] * v)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("saves", [False, True], ids=["plain", "checkpoint"])
def test_compiled_code_equals_eager_over_windows_of_different_lengths(affine: bool, saves: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=affine), nn.ReLU(), nn.BatchNorm2d(3)).double()
    eager = convert_sync_accum(net, normalization="window")
    whole = copy.deepcopy(eager)
    # aot_eager: as inductor, without a C++ compiler.
    graph = torch.compile(whole, fullgraph=True, backend="aot_eager")

    def compiled(x: Tensor) -> Any:
        return checkpoint(graph, x, use_reentrant=False) if saves else graph(x)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for window, length in enumerate((3, 2, 4)):
            gradients = []
            for model, call in ((whole, compiled), (eager, eager)):
                xs = [draw(10 * window + i).requires_grad_() for i in range(length)]
                ys = [call(x) for x in xs[:2]]
                # The second forward comes before the first backward.
                for y in ys:
                    y.square().sum().backward()
                for x in xs[2:]:
                    call(x).square().sum().backward()
                commit(model)
                gradients.append([x.grad for x in xs])
            torch.testing.assert_close(*gradients)
    for one, other in zip(whole.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(buffer, eager.get_buffer(name))
