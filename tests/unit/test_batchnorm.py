"""SyncAccumBatchNorm in one process: what it accumulates, what it computes, what survives."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncaccum import AccumulateBatchNorm, SyncAccumBatchNorm, commit, convert_sync_accum, discard
from tests.oracle import BATCH_NORMS, assert_same_statistics, reference, trained_layer

pytestmark = pytest.mark.usefixtures("both_passes")

POLICIES = ["renorm", "batch", "running", "window"]


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def test_the_seeds_snippet_runs_as_written() -> None:
    layer = AccumulateBatchNorm(nn.BatchNorm2d, 64)
    x1, x2, x3 = (torch.randn(n, 64, 4, 4) for n in (2, 3, 4))
    layer(x1)
    layer(x2)
    layer(x3)
    layer.update_stats()
    expected = nn.BatchNorm2d(64).double()
    expected(torch.cat([x1, x2, x3], 0).double())
    assert_same_statistics(layer, expected, rtol=1e-6, atol=1e-7)  # kept in float32
    assert isinstance(layer, AccumulateBatchNorm)
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(2, 64))


@pytest.mark.parametrize(("ratio", "tolerance"), [(0.0, 1e-12), (5.0, 1e-12), (1e3, 1e-9)])  # the targets
@pytest.mark.parametrize("sizes", [(64,), (1,) * 64, (40, 0, 3, 21)], ids=str)
def test_relative_error_in_float64_stays_within_its_target(
    sizes: tuple[int, ...], ratio: float, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    window = [torch.randn(n, 8, 3, dtype=torch.float64, generator=generator) + ratio for n in sizes]
    layer = SyncAccumBatchNorm(8, momentum=1.0, dtype=torch.float64)
    for x in window:
        layer(x)
    layer.update_stats()
    assert_same_statistics(layer, reference([window], 8, 1.0), rtol=tolerance)


@pytest.mark.parametrize("order", [lambda x: x, channels_last], ids=["NCHW", "channels_last"])
def test_float32_variance_at_mean_over_std_of_1e4_in_the_first_window(order: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    window = [order(torch.randn(8, 4, 28, 28, generator=generator) + 1e4) for _ in range(3)]
    layer = SyncAccumBatchNorm(4, momentum=1.0)
    for x in window:
        layer(x)
    layer.update_stats()
    expected = reference([window], 4, momentum=1.0)
    # The target; nn.BatchNorm2d itself is off by 2e-5 in channels_last, torchgpipe by everything.
    torch.testing.assert_close(layer.running_var.double(), expected.running_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_policy_is_batch_norms_training_forward(dims: int, affine: bool) -> None:
    layer = SyncAccumBatchNorm(3, affine=affine, normalization="batch", dtype=torch.float64)
    expected = BATCH_NORMS[dims](3, affine=affine).double()
    x = torch.randn(6, 3, *range(2, dims), dtype=torch.float64, requires_grad=True)
    y, wanted = layer(x), expected(x)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(wanted, x, dy))


def test_an_untrained_renorm_layer_counts_its_micro_batch_against_a_prior_of_0_and_1() -> None:
    layer = SyncAccumBatchNorm(3, normalization="renorm", r_max=torch.inf, d_max=torch.inf, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64) * 5 + 3
    # Without clips it is the running statistics' output.
    torch.testing.assert_close(layer(x), x / (1 + layer.eps) ** 0.5)
    clipped = SyncAccumBatchNorm(3, normalization="renorm", r_max=1.0, d_max=0.0, dtype=torch.float64)
    mean, mean_sq = x.sum(0) / 5, (x.square().sum(0) + 1) / 5
    torch.testing.assert_close(clipped(x), (x - mean) / (mean_sq - mean.square() + layer.eps).sqrt())


def test_renorm_normalises_with_committed_statistics_where_no_clip_is_reached() -> None:
    layer = trained_layer(3)
    x = torch.randn(1000, 3, dtype=torch.float64) * layer.running_var.sqrt() * 1.1 + layer.running_mean
    torch.testing.assert_close(layer(x), layer.eval()(x))


@pytest.mark.parametrize("n", [1, 2])
def test_renorm_shrinks_a_small_micro_batch_towards_the_committed_statistics(n: int) -> None:
    layer = trained_layer(3, prior_count=1.0, r_max=1.5, d_max=0.5)
    x = torch.randn(n, 3, dtype=torch.float64) + layer.running_mean
    w, m, v = n / (n + 1), x.mean(0), x.var(0, correction=0)
    mu, var, eps = layer.running_mean, layer.running_var, layer.eps
    mu_s = w * m + (1 - w) * mu
    v_s = w * v + (1 - w) * var + w * (1 - w) * (m - mu) ** 2
    r = ((v_s + eps) / (var + eps)).sqrt().clamp(1 / 1.5, 1.5)
    d = ((mu_s - mu) / (var + eps).sqrt()).clamp(-0.5, 0.5)
    expected = ((x - mu_s) / (v_s + eps).sqrt() * r + d) * layer.weight + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_a_large_prior_is_the_running_policy_with_a_gradient() -> None:
    layer = trained_layer(2, prior_count=1e12)
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.eval()(x))


def test_running_policy_holds_the_committed_statistics_constant() -> None:
    layer = trained_layer(3, "running")
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, layer.eval()(x))
    torch.testing.assert_close(dx, (layer.weight / (layer.running_var + layer.eps).sqrt()).detach().expand(4, 3))


@pytest.mark.parametrize("policy", POLICIES)
def test_eval_forward_is_batch_norms_and_accumulates_nothing(policy: str) -> None:
    layer = trained_layer(3, policy).eval()
    expected = nn.BatchNorm1d(3).double().eval()
    expected.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), expected(x))
    layer.update_stats()
    assert layer.window.count == 0
    assert_same_statistics(layer, expected, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_tracking_the_layer_is_a_plain_batch_norm(policy: str) -> None:
    layer = SyncAccumBatchNorm(3, track_running_stats=False, normalization=policy)
    expected = nn.BatchNorm1d(3, track_running_stats=False)
    x = torch.randn(4, 3)
    assert torch.equal(layer(x), expected(x))
    assert torch.equal(layer.eval()(x), expected.eval()(x))
    layer.update_stats()
    assert layer.window.count == 0
    assert layer.state_dict().keys() == expected.state_dict().keys()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_whole_model_in_another_dtype(policy: str, dtype: torch.dtype) -> None:
    layer = SyncAccumBatchNorm(3, normalization=policy).to(dtype)
    x = torch.randn(16, 3, 4, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.float().square().sum().backward()
    layer.update_stats()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == layer.running_mean.dtype == dtype
    expected = reference([[x]], 3)
    tolerance = 2 * torch.finfo(dtype).eps  # one rounding into the buffer's dtype
    assert_same_statistics(layer, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("policy", POLICIES)
def test_autocast(policy: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), SyncAccumBatchNorm(4, normalization=policy), nn.ReLU(inplace=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(4, 3, 8, 8))
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert model[1].weight.grad.dtype == torch.float32
    assert model[1].window.count == 4 * 6 * 6


def test_an_in_place_activation_may_follow() -> None:
    layer = SyncAccumBatchNorm(3)
    x = torch.randn(4, 3, requires_grad=True)
    (fresh,) = torch.autograd.grad(torch.relu(layer(x)).sum(), x)
    layer.discard()
    (in_place,) = torch.autograd.grad(torch.relu_(layer(x)).sum(), x)
    assert torch.equal(fresh, in_place)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_counts_once(reentrant: bool) -> None:
    layer = SyncAccumBatchNorm(3, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    layer.discard()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert layer.window.count == 4
    torch.testing.assert_close(x.grad, expected)


def test_forward_under_no_grad_accumulates_as_batch_norm_does() -> None:
    layer = SyncAccumBatchNorm(3)
    with torch.no_grad():
        layer(torch.randn(4, 3))
    assert layer.window.count == 4


def test_a_commit_between_forward_and_backward_leaves_the_gradient_alone() -> None:
    layer = trained_layer(3)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    y = layer(x)
    layer.update_stats()
    (actual,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.testing.assert_close(actual, expected)


def test_the_window_keeps_no_autograd_graph() -> None:
    layer = SyncAccumBatchNorm(3)
    layer(torch.randn(4, 3, requires_grad=True))
    assert not layer._window.requires_grad


def test_the_window_is_not_in_the_state_dict_and_buffers_are_batch_norms() -> None:
    layer = SyncAccumBatchNorm(3)
    assert layer.state_dict().keys() == nn.BatchNorm1d(3).state_dict().keys()
    assert {n for n, _ in layer.named_buffers()} == {n for n, _ in nn.BatchNorm1d(3).named_buffers()}
    assert layer._window.numel() * layer._window.element_size() == 8 * (1 + 2 * 3)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to("cpu"),
        lambda m: m.type(torch.float16),
    ],
)
def test_casting_a_model_keeps_the_open_window(cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = SyncAccumBatchNorm(3)
    layer(torch.randn(4, 3))
    before = layer.window.pack()
    cast(layer)
    assert layer._window.dtype == torch.float64
    assert torch.equal(layer.window.pack(), before)


def test_meta_device_and_to_empty() -> None:
    layer = SyncAccumBatchNorm(3, device="meta")
    assert layer._window.is_meta
    layer.to_empty(device="cpu")
    assert torch.equal(layer.window.pack(), torch.zeros(7, dtype=torch.float64))
    trained = trained_layer(300)
    # Two: memory that was freed may hold the sums of one.
    for _ in range(2):
        trained(torch.randn(4, 300).double())
    trained.to_empty(device="cpu")
    assert torch.equal(trained.window.pack(), torch.zeros(601, dtype=torch.float64))


@pytest.mark.parametrize("make", [lambda: SyncAccumBatchNorm(3), lambda: AccumulateBatchNorm(nn.BatchNorm1d, 3)])
def test_copies_and_pickles_carry_the_window_and_are_independent(make: Callable[[], SyncAccumBatchNorm]) -> None:
    layer = make()
    layer(torch.randn(4, 3))
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
    for twin in copies:
        assert type(twin) is type(layer)
        assert torch.equal(twin.window.pack(), layer.window.pack())
        twin.update_stats()
    assert layer.window.count == 4
    assert layer.num_batches_tracked == 0


def test_resetting_running_stats_discards_the_window() -> None:
    layer = SyncAccumBatchNorm(3)
    layer(torch.randn(4, 3))
    layer.reset_running_stats()
    assert layer.window.count == 0


def test_a_window_snapshot_does_not_follow_the_layer() -> None:
    layer = SyncAccumBatchNorm(3)
    layer(torch.randn(4, 3))
    snapshot = layer.window
    layer(torch.randn(4, 3))
    assert snapshot.count == 4


# Policy "window" breaks the graph: see test_window_policy.
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "window"])
def test_compiled_layer_equals_eager_in_one_graph_without_recompiling(policy: str) -> None:
    torch._dynamo.reset()
    eager = trained_layer(3, policy)
    layer = copy.deepcopy(eager)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
            y, expected = compiled(x), eager(x)
            torch.testing.assert_close(y, expected)
            dy = torch.randn_like(y)
            torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))
        commit(compiled)
        commit(eager)
        compiled(torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True))
    assert layer.window.count == 20
    torch.testing.assert_close(layer.running_var, eager.running_var)


def test_one_warning_for_a_model_that_is_never_committed() -> None:
    model = convert_sync_accum(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)))
    x = torch.randn(2, 2)
    for _ in range(999):
        model(x)
    with pytest.warns(UserWarning, match=r"layer 0 .*1000 micro-batches.*commit\(model\)") as record:
        model(x)
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def test_a_model_that_commits_is_never_warned() -> None:
    model = SyncAccumBatchNorm(2)
    x = torch.randn(2, 2)
    for _ in range(3):
        for _ in range(600):
            model(x)
        commit(model)
    for _ in range(600):
        model(x)
    discard(model)
    for _ in range(600):
        model(x)


BAD_ARGUMENTS = [
    ({"normalization": "instance"}, "normalization must be one of 'renorm', .*, got 'instance'"),
    ({"r_max": 0.9}, "r_max must be at least 1, got 0.9"),
    ({"d_max": -0.1}, "d_max must be at least 0, got -0.1"),
    ({"prior_count": -1.0}, "prior_count must be finite and at least 0, got -1.0"),
    ({"prior_count": float("inf")}, "prior_count must be finite"),
    ({"r_max": float("nan")}, "r_max must be at least 1, got nan"),
    ({"momentum": 1.1}, r"momentum must be in \[0, 1\], or None for the cumulative average, got 1.1"),
    ({"momentum": -0.1}, "momentum must be in"),
    ({"process_group": "world"}, r"an mpi4py communicator or None, got 'world': .* pip install syncaccum\[mpi\]"),
    ({"process_group": -100}, "this rank is not a member"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_at_construction(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyncAccumBatchNorm(4, **arguments)  # type: ignore[arg-type]


BAD_INPUTS = [
    (torch.ones(4), "expected 2D to 5D input \\(got 1D input\\)"),
    (torch.ones(1, 4, 1, 1, 1, 1), "got 6D input"),
    (torch.ones(2, 5), r"expected 4 channels in dimension 1, got input size \(2, 5\)"),
    (torch.ones(2, 4, dtype=torch.int64), "expected a floating-point input, got torch.int64"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("x", "message"), BAD_INPUTS)
def test_bad_inputs_are_refused_and_not_counted(x: Tensor, message: str, training: bool) -> None:
    layer = SyncAccumBatchNorm(4).train(training)
    with pytest.raises(ValueError, match=message):
        layer(x)
    assert layer.window.count == 0


def test_one_value_per_channel() -> None:
    x = torch.randn(1, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        SyncAccumBatchNorm(3, normalization="batch")(x)
    for policy in ("renorm", "running"):
        layer = SyncAccumBatchNorm(3, normalization=policy)
        assert layer(x).isfinite().all()
        layer(x + 1)
        layer.update_stats()  # two values by now


@pytest.mark.parametrize("policy", POLICIES)
def test_empty_micro_batches_train(policy: str) -> None:
    layer = SyncAccumBatchNorm(3, normalization=policy)
    x = torch.empty(0, 3, 4, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(3))
    assert layer.window.count == 0


def test_recalibration_over_a_data_set_is_one_cumulative_commit() -> None:
    """What swa_utils.update_bn does for nn.BatchNorm, but exactly: statistics of all the data."""
    layer = trained_layer(3)
    data = [torch.randn(n, 3, dtype=torch.float64) for n in (5, 2, 9)]
    layer.reset_running_stats()
    layer.momentum = None
    for x in data:
        layer(x)
    commit(layer)
    torch.testing.assert_close(layer.running_var, torch.cat(data).var(0))
