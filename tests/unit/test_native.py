"""The compiled passes against torch's own, and against float64: every order, dtype, size and policy."""

from __future__ import annotations

import copy
import itertools
import math
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from syncaccum import SyncAccumBatchNorm, commit
from syncaccum.layer import library, native
from syncaccum.layer.measure import Measured, measure
from syncaccum.layer.passes import normalize, normalize_together
from syncaccum.layer.policies import Batch, Normalizer, Policy, Renorm, Running
from tests.oracle import assert_close_to_largest
from tests.unit.test_passes import channels_first, channels_last

EPS = 1e-5
KERNELS = Path(native.__file__).parent / "kernels"
needs_them = pytest.mark.skipif(not native.which().startswith("compiled"), reason=f"CPU passes here: {native.which()}")

# One channel, one sample, one position, odd sizes, more than 2^16 lines, rows of several tasks.
SHAPES = [
    (7, 1), (1, 5), (70_001, 3), (33, 129), (9, 2048), (6, 1, 5, 5), (1, 4, 9, 11), (5, 3, 1, 1), (3, 70, 1, 1),
    (2, 3, 211, 97), (8, 64, 7, 7), (2, 130, 3, 5), (3, 2, 40_003), (2, 3, 2, 3, 4),
]  # fmt: skip
ORDERS = [channels_first, channels_last]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def policies(channels: int, count: int) -> dict[str, Policy]:
    mean = torch.randn(channels, dtype=torch.float64)
    variance = torch.rand(channels, dtype=torch.float64) + 0.5
    made: dict[str, Policy] = {
        "running": Running(EPS, mean, variance),
        "renorm": Renorm(EPS, mean, variance, 1.0, 1.5, 0.5),
    }
    return made | ({"batch": Batch(EPS)} if count > 1 else {})


def train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, policy: Policy, dy: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Output and gradients; and packed moments."""
    inputs = [t for t in (x, weight, bias) if t is not None]
    y, moments = normalize(x, weight, bias, policy)
    return [y, *torch.autograd.grad(y, inputs, dy)], moments


def combinations(shape: tuple[int, ...]) -> list[tuple[str, bool, bool]]:
    """Policies, and whether there is a weight and a bias: all with all."""
    channels = shape[1]
    names, affine = (
        list(policies(channels, math.prod(shape) // channels)),
        [(True, True), (False, False), (True, False)],
    )
    # Large ones are there for how rows are shared out, which depends on none of these.
    pairs = zip(names, affine, strict=True) if math.prod(shape) > 30_000 else itertools.product(names, affine)
    return [(name, *has) for name, has in pairs]


@needs_them
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_as_right_as_the_dtype_allows(
    shape: tuple[int, ...], order: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    channels = shape[1]
    made = policies(channels, math.prod(shape) // channels)
    for name, has_weight, has_bias in combinations(shape):
        x = order((torch.randn(shape) * 2 + 0.7).to(dtype)).requires_grad_()
        dy = order(torch.randn(shape).to(dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = torch.randn(channels, dtype=wide, requires_grad=True) if has_weight else None
        bias = torch.randn(channels, dtype=wide, requires_grad=True) if has_bias else None
        assert native.takes(x, weight, bias)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "_library", None)
            doubles = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
            expected, wanted = train(doubles[0], doubles[1], doubles[2], made[name], dy.double())
        for count in (1, 2):
            with threads(count):
                actual, moments = train(x, weight, bias, made[name], dy)
            torch.testing.assert_close(moments, wanted, rtol=1e-12, atol=1e-9)  # float64 sums of up to 240,000 values
            for got, exact in zip(actual, expected, strict=True):
                # One rounding to the dtype, and of factors to float32; float64 sums round in both.
                rtol = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(got.dtype).eps
                assert_close_to_largest(got.double(), exact, rtol, f"{name}, {count} threads: {{}}".format)
                assert got.shape != x.shape or got.stride() == x.stride()


def train_two_windows(
    layer: SyncAccumBatchNorm, micro_batches: list[tuple[Tensor, Tensor]], order: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Outputs and gradients of them all, two a window; each pays what those before it owe."""
    results = []
    for index, (data, dy) in enumerate(micro_batches):
        x = order(data).requires_grad_()
        y = layer(x)
        results += [y, *torch.autograd.grad(y, (x, *layer.parameters()), order(dy))]
        if index % 2:
            commit(layer)
    return results


@needs_them
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "shape", [(1, 5), (33, 129), (70_001, 3), (5, 3, 1, 1), (2, 3, 211, 97), (8, 64, 7, 7)], ids=str
)
def test_policy_window_is_as_right_as_the_dtype_allows(
    shape: tuple[int, ...], order: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    made = [((torch.randn(shape) * 2 + 0.7).to(dtype), torch.randn(shape).to(dtype)) for _ in range(4)]
    # A weight of another dtype than the data stays float32.
    layer = SyncAccumBatchNorm(shape[1], normalization="window", dtype=torch.promote_types(dtype, torch.float32))
    exact, again = copy.deepcopy(layer).double(), copy.deepcopy(layer)
    actual = train_two_windows(layer, made, order)
    with threads(2):
        by_two = train_two_windows(again, made, order)
    assert all(torch.equal(one, two) for one, two in zip(actual, by_two, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", None)
        expected = train_two_windows(exact, [(x.double(), dy.double()) for x, dy in made], order)
    for got, wanted in zip(actual, expected, strict=True):
        # As above; in float64 a window's variance is a difference of sums.
        rtol = 1e-11 if dtype == torch.float64 else 4 * torch.finfo(got.dtype).eps
        assert_close_to_largest(got.double(), wanted, rtol)


@needs_them
@pytest.mark.parametrize("policy", ["window", "renorm", "batch", "running"])
def test_a_forward_and_a_backward_are_one_call_each(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = SyncAccumBatchNorm(6, normalization=policy), []

    def watched(name: str) -> Callable[[bytes], None]:
        function = getattr(native._library, name)

        def call(packed: bytes) -> None:
            seen.append(name)
            function(packed)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(native._library, name, watched(name))
    for _ in range(2):
        layer(torch.randn(4, 6, 5, 5).requires_grad_()).sum().backward()
        commit(layer)
    assert seen == ["forward", "backward"] * 2


@needs_them
@pytest.mark.parametrize("policy", ["window", "renorm", "batch", "running"])
def test_a_backward_that_is_watched_gives_the_same_gradients(policy: str) -> None:
    gradients = []
    for mode in (nullcontext(), Watch()):
        torch.manual_seed(0)
        layer = SyncAccumBatchNorm(6, normalization=policy, dtype=torch.float64)
        for _ in range(2):
            x = torch.randn(4, 6, 5, 5, dtype=torch.float64, requires_grad=True)
            y = layer(x)
            with mode:
                y.square().sum().backward()
            commit(layer)
        gradients.append([x.grad, layer.weight.grad, layer.bias.grad])
        assert not isinstance(mode, Watch) or mode.seen
    torch.testing.assert_close(*gradients)


@needs_them
@pytest.mark.parametrize("order", ORDERS)
def test_results_do_not_depend_on_the_number_of_threads(order: Callable[[Tensor], Tensor]) -> None:
    x, dy = order(torch.randn(8, 32, 28, 28)).requires_grad_(), order(torch.randn(8, 32, 28, 28))
    weight, results = torch.randn(32, requires_grad=True), []
    for count in (1, 2, 3):
        with threads(count):
            outputs, moments = train(x, weight, None, policies(32, 2)["batch"], dy)
        results.append([*outputs, moments])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@needs_them
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, -1], ids=["first", "last"])
def test_nan_and_inf_stay_in_their_channel_and_are_seen(
    where: int, bad: float, order: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = torch.randn(3, 4, 5, 5).to(dtype)
    x[where, 2, where, where] = bad
    x = order(x).requires_grad_()
    (y, dx), moments = train(x, None, None, Batch(EPS), torch.ones_like(x))
    _, total, square = moments.split([1, 4, 4])
    for seen in (total, square, y.isfinite().all(0).all(1).all(1), dx.isfinite().all(0).all(1).all(1)):
        finite = seen if seen.dtype == torch.bool else seen.isfinite()
        assert finite.tolist() == [True, True, False, True]
    (running, _), _ = train(x, None, None, policies(4, 1)["running"], torch.ones_like(x))
    assert torch.equal(running.isfinite(), x.isfinite())


@needs_them
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_two_bytes_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """All 65,536 of them; and to the nearest of them, ties to even, for numbers in between and beyond."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    between = every.float() * torch.tensor([[1.0, 1 + 2**-9, 1 + 2**-12, 0.5, 3.0]])
    ones = torch.ones(5, dtype=torch.float64)
    x = every.expand(-1, 5).contiguous()
    y = native.apply(x, (ones * 0, ones, None, None, None), torch.tensor([1.0, 1 + 2**-9, 1 + 2**-12, 0.5, 3.0]), None)
    torch.testing.assert_close(y, between.to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_them
def test_several_micro_batches_share_their_sums_through_a_hook() -> None:
    """Sums, then the hook, then the gradient: lockstep's order."""
    sizes, seen = (3, 1, 4), []

    def double(sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        seen.append([s.clone() for s in sums])
        return sums[0] * 2, sums[1] * 2

    xs = [torch.randn(n, 6, 5, 5, dtype=torch.float64, requires_grad=True) for n in sizes]
    dys = [torch.randn_like(x) for x in xs]
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    whole = torch.cat(xs).detach().movedim(1, -1).reshape(-1, 6)
    scale = torch.rsqrt(whole.var(0, correction=0) + EPS)
    norm = Normalizer(whole.mean(0), scale, None, None, 0.5 / whole.shape[0])
    parts: list[Measured] = [measure(x) for x in xs]
    ys = normalize_together(xs, parts, weight, None, norm, double)
    *actual, dweight = torch.autograd.grad(ys, [*xs, weight], dys)
    joined = torch.cat(xs).detach().requires_grad_()
    y = nn.functional.batch_norm(joined, None, None, weight, None, True, 0.0, EPS)
    expected, wanted = torch.autograd.grad(y, [joined, weight], torch.cat(dys))
    # Twice the sums at half the feedback.
    torch.testing.assert_close(torch.cat(actual), expected)
    torch.testing.assert_close(dweight, wanted)
    torch.testing.assert_close(seen[0][0], torch.cat(dys).sum((0, 2, 3)))


class Named(Tensor):
    """A subclass, which may want to see each operator."""


class Watch(TorchDispatchMode):
    """Sees the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_them
def test_only_plain_tensors_with_values_go_to_compiled_passes() -> None:
    x = torch.randn(2, 3, 4)
    assert native.takes(x, nn.Parameter(torch.ones(3)), None)
    negative = torch.randn(2, 3, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    for other in (x.as_subclass(Named), x.to("meta"), x.int(), x.to(torch.complex64), x[:0], negative):
        assert not native.takes(other)
        assert x.numel() == 0 or other.numel() == 0 or not native.takes(x, other)
    with Watch():
        assert not native.takes(x)


@needs_them
def test_a_dispatch_mode_sees_the_operators_of_a_forward() -> None:
    with Watch() as watch:
        SyncAccumBatchNorm(3)(torch.randn(2, 3, 4))
    assert any("batch_norm" in name for name in watch.seen)


@needs_them
def test_vectors_of_another_length_are_an_error_and_not_read() -> None:
    x, ones = torch.randn(2, 3, 4), torch.ones(3, dtype=torch.float64)
    for weight, norm in ((torch.ones(2), ones), (torch.ones(3), ones[:2])):
        with pytest.raises(RuntimeError, match=r"must be of shape \(3,\)"):
            native.apply(x, (norm, ones, None, None, None), weight, None)


def test_an_environment_variable_switches_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCACCUM_NATIVE", "0")
    assert library.load() == (None, "torch (SYNCACCUM_NATIVE=0 switched them off)")
    monkeypatch.setenv("SYNCACCUM_NATIVE", "1")
    assert "SYNCACCUM_NATIVE" not in library.load()[1]


@needs_them
@pytest.mark.parametrize(
    ("name", "before", "after", "which"),
    [
        ("passes.cpp", "", "", "compiled"),
        ("passes.cpp", "double eps, prior_count", "double prior_count, eps", "was built from another version"),
        ("fold.cpp", "n / (n - 1)", "1.0", "was built from another version"),
        ("build.py", '"-O3"', '"-O2"', "was built from another version"),
    ],
    ids=["as it was", "another struct", "another fold", "other flags"],
)
def test_a_library_of_another_source_is_refused(
    name: str, before: str, after: str, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its structs may have other fields: it would give wrong numbers without a word."""
    copied = shutil.copytree(KERNELS, tmp_path / "kernels")
    text = (copied / name).read_text()
    assert before in text
    (copied / name).write_text(text.replace(before, after))
    build = runpy.run_path(str(copied / "build.py"))
    for asked in ("is_current", "library_for"):
        monkeypatch.setattr(library, asked, build[asked])
    loaded, told = library.load()
    assert which in told
    assert (loaded is None) == (which != "compiled")


def test_a_build_without_a_compiler_says_so_and_fails_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": str(tmp_path / "no-such-compiler")}
    told = subprocess.run([sys.executable, str(KERNELS / "build.py")], env=environment, capture_output=True, text=True)
    assert told.returncode == 0
    assert "no C++ compiler" in told.stderr
