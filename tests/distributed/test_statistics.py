"""Running statistics after a commit are nn.BatchNorm's on the global batch, for any split of it."""

from __future__ import annotations

import math
import unittest.mock
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from syncaccum import SyncAccumBatchNorm, commit, convert_sync_accum
from syncaccum.layer import native
from tests.oracle import as_columns, assert_same_on_all_ranks, gather_global_batch, make_reference
from tests.ranks import Rank, on_ranks, open_ranks

Shape = tuple[int, ...]  # of a micro-batch, without the channels: N, then the spatial sizes
Window = tuple[tuple[Shape, ...], ...]  # the micro-batches of each rank

# The largest error allowed at this ratio of mean to standard deviation: float64 sums lose ratio^2 * 1e-16.
TOLERANCE = {0.0: 1e-12, 5.0: 1e-12, 1e3: 1e-9}


@dataclass(frozen=True)
class Case:
    """A layer and what it sees."""

    dimensions: int
    channels: int
    momentum: float | None
    normalization: str
    mean_over_std: float
    std: float
    windows: tuple[Window, ...]
    seed: int


@st.composite
def cases(draw: st.DrawFn, ranks: int) -> Case:
    dimensions = draw(st.integers(0, 3), label="spatial dimensions")
    shape = st.tuples(st.integers(0, 4), *[st.integers(1, 3)] * dimensions)
    one_rank = st.lists(shape, max_size=3).map(tuple)
    # One value per channel is an error, tested elsewhere; none at all leaves the layer alone.
    window = st.tuples(*[one_rank] * ranks).filter(lambda window: count_values(window) != 1)
    return Case(
        dimensions=dimensions,
        channels=draw(st.integers(1, 4), label="channels"),
        momentum=draw(st.sampled_from([None, 0.0, 0.1, 0.7, 1.0]), label="momentum"),
        normalization=draw(st.sampled_from(["renorm", "running"]), label="normalization"),
        mean_over_std=draw(st.sampled_from(sorted(TOLERANCE)), label="mean/std"),
        std=draw(st.sampled_from([1e-3, 1.0, 1e3]), label="std"),
        windows=tuple(draw(st.lists(window, min_size=1, max_size=3), label="windows")),
        seed=draw(st.integers(0, 2**32 - 1), label="seed"),
    )


def count_values(window: Window) -> int:
    return sum(math.prod(shape) for micro_batches in window for shape in micro_batches)


def make_global_batch(case: Case, window_index: int) -> Tensor:
    """(n, C) columns of exactly this mean and standard deviation: chance would make small batches much worse."""
    count = count_values(case.windows[window_index])
    if count == 0:
        return torch.empty(0, case.channels, dtype=torch.float64)
    generator = torch.Generator().manual_seed(case.seed + window_index)
    x = torch.randn(count, case.channels, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    return (x + case.mean_over_std) * case.std


def split_global_batch(x: Tensor, window: Window) -> list[list[Tensor]]:
    """The micro-batches of each rank, shaped as the case wants them."""
    shapes = [shape for micro_batches in window for shape in micro_batches]
    pieces = iter(x.split([math.prod(shape) for shape in shapes])) if shapes else iter(())
    return [
        [next(pieces).reshape(*shape, x.shape[1]).movedim(-1, 1) for shape in micro_batches] for micro_batches in window
    ]


def commit_case(rank: Rank, case: Case) -> list[Tensor]:
    layer_class = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[case.dimensions]
    plain = layer_class(case.channels, momentum=case.momentum, dtype=torch.float64)
    layer = convert_sync_accum(plain, normalization=case.normalization)
    for index, window in enumerate(case.windows):
        for micro_batch in split_global_batch(make_global_batch(case, index), window)[rank.index]:
            layer(micro_batch)
        report = commit(layer)
        assert report.ranks == rank.size
        assert list(report.values.values()) == [count_values(window)]
    return list(layer.buffers())


def apply_batch_norm(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    reference = nn.BatchNorm1d(case.channels, momentum=case.momentum, dtype=torch.float64)
    for index, window in enumerate(case.windows):
        if count_values(window) > 0:
            reference(make_global_batch(case, index))
    return reference.running_mean, reference.running_var, reference.num_batches_tracked


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_split_gives_the_statistics_of_the_global_batch(size: int) -> None:
    with open_ranks(size) as ranks:
        # Examples share the processes, which is what this health check warns of, and no state.
        @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(cases(size))
        def check(case: Case) -> None:
            first, *others = ranks.run(commit_case, case)
            mean, variance, batches = apply_batch_norm(case)
            tolerance = TOLERANCE[case.mean_over_std]
            # A mean near zero has no relative error to speak of: a standard deviation is added.
            mean_error = (first[0] - mean).abs() / (mean.abs() + variance.sqrt())
            assert mean_error.max() <= tolerance
            assert ((first[1] - variance).abs() / variance).max() <= tolerance
            assert torch.equal(first[2], batches)
            for other in others:
                assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))

        check()


@on_ranks(2)
def test_values_count_alike_whatever_their_images_size(rank: Rank) -> None:
    """Weights by N, as detectron2's NaiveSyncBatchNorm has them, would give rank 0 half the say, not 1/17."""
    layer = SyncAccumBatchNorm(1, momentum=1.0, dtype=torch.float64)
    side = (1, 4)[rank.index]
    layer(torch.full((2, 1, side, side), float(rank.index), dtype=torch.float64))
    commit(layer)
    torch.testing.assert_close(layer.running_mean, torch.tensor([16 / 17], dtype=torch.float64))


@on_ranks(2)
def test_running_variance_is_unbiased_over_all_ranks(rank: Rank) -> None:
    """Of 0 and 2, one on each rank, it is 2; torchgpipe's and detectron2's would be 1."""
    layer = SyncAccumBatchNorm(1, momentum=1.0)
    layer(torch.tensor([[2.0 * rank.index]]))
    commit(layer)
    assert layer.running_var.item() == 2.0


@on_ranks(2)
def test_momentum_none_averages_over_commits_not_over_micro_batches(rank: Rank) -> None:
    """fairscale breaks on momentum None; counting micro-batches would weigh the second commit 3/4, not 1/2."""
    layer = SyncAccumBatchNorm(1, momentum=None)
    for values, micro_batches in ((1.0, 1), (5.0, 3)):
        for _ in range(micro_batches):
            layer(torch.full((2, 1), values + rank.index))
        commit(layer)
    assert layer.running_mean.item() == 3.5
    assert layer.num_batches_tracked.item() == 2


@on_ranks(2)
def test_statistics_stay_still_between_commits(rank: Rank) -> None:
    """CBN's rolling statistics move in every micro-batch."""
    layer = SyncAccumBatchNorm(2)
    layer(torch.randn(4, 2) + rank.index)
    commit(layer)
    committed = [buffer.clone() for buffer in layer.buffers()]
    for _ in range(3):
        layer(torch.randn(4, 2))
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), committed, strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@on_ranks(2)
def test_float32_far_from_zero_keeps_its_variance(rank: Rank, memory_format: torch.memory_format) -> None:
    """At mean/std 1e4 torchgpipe's float32 sums gave a variance of -8."""
    layer = SyncAccumBatchNorm(3, momentum=1.0)
    x = (torch.randn(8, 3, 9, 9) + 1e4 * (1 + rank.index / 1e4)).contiguous(memory_format=memory_format)
    layer(x)
    commit(layer)
    expected = gather_global_batch([x]).var(0)
    # 1e-5 is what the package promises here; float32 keeps 7 digits of the result.
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-5, atol=0)


@on_ranks(3)
def test_many_layers_are_committed_together_and_bit_identically(rank: Rank) -> None:
    """Widths, momenta and dtypes differ, and rank 2 has no data for the second layer."""
    layers = nn.ModuleList(
        [
            SyncAccumBatchNorm(5, momentum=None, dtype=torch.float64),
            SyncAccumBatchNorm(1, momentum=0.3, dtype=torch.float32),
            SyncAccumBatchNorm(7, momentum=1.0, dtype=torch.float64),
        ]
    )
    references = [make_reference(layer) for layer in layers]
    layer: Any
    for step in range(3):
        torch.manual_seed(10 * step + rank.index)
        for index, (layer, reference) in enumerate(zip(layers, references, strict=True)):
            micro_batch_size = 0 if (index, rank.index) == (1, 2) else 4 + rank.index
            x = torch.randn(micro_batch_size, layer.num_features, dtype=layer.running_mean.dtype)
            layer(x)
            reference(gather_global_batch([x]))
        commit(layers)
    assert_same_on_all_ranks(list(layers.buffers()))
    for layer, reference in zip(layers, references, strict=True):
        # Default tolerances of the layer's own dtype: that is what it can hold.
        expected = reference.running_var.to(layer.running_var.dtype)
        torch.testing.assert_close(layer.running_var, expected)
        torch.testing.assert_close(layer.running_mean, reference.running_mean.to(layer.running_mean.dtype))


@pytest.mark.skipif(not native.which().startswith("compiled"), reason=f"CPU passes here: {native.which()}")
@on_ranks(2)
def test_ranks_with_and_without_compiled_passes_commit_the_same_bits(rank: Rank) -> None:
    layers = nn.ModuleList(SyncAccumBatchNorm(width, dtype=torch.float64) for width in (1, 40, 300))
    layer: Any
    library = native._library if rank.index == 0 else None
    with unittest.mock.patch.object(native, "_library", library):
        for _ in range(3):
            for layer in layers:
                layer(torch.randn(5 + rank.index, layer.num_features, dtype=torch.float64) * 3 + 7)
            commit(layers)
    assert_same_on_all_ranks(list(layers.buffers()))


@on_ranks(2)
def test_update_stats_commits_one_layer_over_all_ranks(rank: Rank) -> None:
    layer = SyncAccumBatchNorm(3, dtype=torch.float64)
    other = SyncAccumBatchNorm(3, dtype=torch.float64)
    reference = make_reference(layer)
    x = torch.randn(4 + rank.index, 3, dtype=torch.float64) + rank.index
    layer(x)
    other(x)
    layer.update_stats()
    reference(gather_global_batch([x]))
    torch.testing.assert_close(dict(layer.named_buffers()), dict(reference.named_buffers()))
    assert other.window.count == x.shape[0]


@on_ranks(2)
def test_model_committed_alone_and_later_in_a_group_is_committed_in_both(rank: Rank) -> None:
    """The group is resolved at commit time, so a layer built before torch.distributed started takes part."""
    dist.destroy_process_group()
    layer = SyncAccumBatchNorm(1, momentum=1.0)
    layer(torch.tensor([[1.0], [3.0]]))
    assert commit(layer).ranks == 1
    dist.init_process_group("gloo", init_method=f"file://{rank.folder}/again", rank=rank.index, world_size=rank.size)
    layer(torch.full((1, 1), float(rank.index)))
    assert commit(layer).ranks == 2
    assert layer.running_mean.item() == 0.5


def test_columns_of_the_oracle_keep_channels_apart() -> None:
    x = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    assert torch.equal(as_columns(x)[:, 1], torch.cat([x[0, 1], x[1, 1]]).double())
