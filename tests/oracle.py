"""The oracle of all tests: nn.BatchNorm on torch.cat of what all ranks saw, in float64; and what goes with it.

First what statistics must be, then one that watches a model, then layers to feed and states to compare.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncaccum import SyncAccumBatchNorm, commit
from tests.ranks import Rank

Snapshot = dict[str, Tensor]

BATCH_NORMS: dict[int, type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
"""By the input's number of dimensions."""


def as_columns(micro_batch: Tensor) -> Tensor:
    """(N, C, *) as (N * spatial, C) in float64, constants to autograd: BatchNorm sees no difference."""
    columns = micro_batch.detach().movedim(1, -1).reshape(-1, micro_batch.shape[1])
    return columns.to(torch.float64)


def concatenate(micro_batches: Iterable[Tensor]) -> Tensor:
    """torch.cat of micro-batches of any spatial sizes, as columns."""
    return torch.cat([as_columns(x) for x in micro_batches])


def gather_global_batch(micro_batches: Sequence[Tensor], group: Any = None) -> Tensor:
    """torch.cat of these micro-batches of all ranks of a process group or an mpi4py communicator. Collective.

    Without a group they are those of the default group, where there is one.
    """
    ours = concatenate(micro_batches)
    if group is None and not dist.is_initialized():
        return ours
    if not isinstance(group, dist.ProcessGroup | None):
        return torch.cat(group.allgather(ours))
    by_rank: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(by_rank, ours, group=group)
    return torch.cat(by_rank)


def reference(windows: Iterable[Iterable[Tensor]], channels: int, momentum: float | None = 0.1) -> nn.BatchNorm1d:
    """A plain BatchNorm after one training forward for each window."""
    layer = nn.BatchNorm1d(channels, momentum=momentum).double()
    for window in windows:
        layer(concatenate(window))
    return layer


def make_reference(layer: Any) -> nn.BatchNorm1d:
    """A plain BatchNorm with this layer's statistics, in training."""
    reference = nn.BatchNorm1d(layer.num_features, layer.eps, layer.momentum, affine=False, dtype=torch.float64)
    reference.load_state_dict(dict(layer.named_buffers()))
    return reference


def assert_same_statistics(
    layer: nn.Module, expected: nn.Module, rtol: float | None = None, atol: float | None = None
) -> None:
    """Both in float64; by default within torch's tolerance of that."""
    if rtol is not None and atol is None:
        atol = 0.0
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        actual, wanted = layer.get_buffer(name), expected.get_buffer(name)
        if wanted.is_floating_point():
            actual = actual.double()
        torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol, msg=f"{name}: {{}}".format)


def assert_close_to_largest(
    actual: Tensor, expected: Tensor, rtol: float, msg: Callable[[str], str] | None = None
) -> None:
    """Within ``rtol`` of the largest value, and of 1: sums may cancel."""
    atol = rtol * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=msg)


class Oracle:
    """Watches every layer of a model, and knows what its statistics must be after each commit."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._watching = False
        self._seen: dict[str, list[Tensor]] = defaultdict(list)
        self._layers = {n: m for n, m in model.named_modules() if isinstance(m, SyncAccumBatchNorm)}
        self._references = {name: make_reference(layer) for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._see(name, inputs[0]))

    def _see(self, name: str, micro_batch: Tensor) -> None:
        if self._watching:
            self._seen[name].append(as_columns(micro_batch))

    def forward(self, micro_batch: Tensor) -> Any:
        """The model's forward, watched; a forward that checkpointing repeats in backward is not."""
        self._watching = True
        try:
            return self._model(micro_batch)
        finally:
            self._watching = False

    def check_commit(self) -> None:
        """Statistics are those of one BatchNorm step on all that was seen since the last check. Collective."""
        assert self._layers
        for name, layer in self._layers.items():
            self._references[name](gather_global_batch(self._seen.pop(name)))
            assert_same_statistics(layer, self._references[name])


def assert_same_on_all_ranks(tensors: Sequence[Tensor]) -> None:
    """Bit for bit. Collective."""
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, list(tensors))
    for theirs in by_rank:
        assert all(torch.equal(a, b) for a, b in zip(tensors, theirs, strict=True))


def trained_layer(channels: int, normalization: str = "renorm", **kwargs: Any) -> SyncAccumBatchNorm:
    """A float64 layer with random parameters and statistics that one window was committed to."""
    layer = SyncAccumBatchNorm(channels, normalization=normalization, **kwargs).double()
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    layer(torch.randn(50, channels, dtype=torch.float64) * 2 + 1)
    layer.update_stats()
    return layer


def make_layers(**widths: int) -> nn.ModuleDict:
    """Layers side by side, not in a chain, so that a test can replace any of them."""
    return nn.ModuleDict({name: SyncAccumBatchNorm(width, dtype=torch.float64) for name, width in widths.items()})


def feed_layers(layers: nn.ModuleDict, rank: Rank, *, seed: int = 0) -> dict[str, list[Tensor]]:
    """Two micro-batches for each layer, other ones on every rank; returns them."""
    generator = torch.Generator().manual_seed(1000 * seed + rank.index)
    fed: dict[str, list[Tensor]] = defaultdict(list)
    for name, layer in layers.items():
        width: Any = layer.num_features
        for batch_size in (3 + rank.index, 2):
            x = torch.randn(batch_size, width, 5, generator=generator, dtype=torch.float64)
            layer(3 * x + 1)
            fed[name].append(3 * x + 1)
    return fed


def make_references(layers: nn.ModuleDict) -> dict[str, nn.BatchNorm1d]:
    return {name: make_reference(layer) for name, layer in layers.items()}


def assert_committed(
    layers: nn.ModuleDict, references: dict[str, nn.BatchNorm1d], fed: dict[str, list[Tensor]], group: Any = None
) -> None:
    """Each layer took up what all ranks fed it, and its window is empty. Collective."""
    for name, layer in layers.items():
        references[name](gather_global_batch(fed[name], group))
        assert_same_statistics(layer, references[name])
        assert layer.window.count == 0


def assert_committed_after(layers: nn.ModuleDict, references: dict[str, nn.BatchNorm1d], rank: Rank, seed: int) -> None:
    """Two micro-batches and a commit go as they should. Collective."""
    fed = feed_layers(layers, rank, seed=seed)
    commit(layers)
    assert_committed(layers, references, fed)


def as_bytes(tensor: Tensor) -> Tensor:
    """For a comparison in which NaN equals itself."""
    return tensor.reshape(-1).view(torch.uint8)


def take_snapshot(model: nn.Module) -> Snapshot:
    """Copies of the statistics and of the open windows."""
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, module in model.named_modules():
        if isinstance(module, SyncAccumBatchNorm):
            state[f"{name}.window"] = module.window.pack()
    return state


def assert_unchanged(model: nn.Module, before: Snapshot) -> None:
    """Statistics and windows are bit for bit what they were, NaN included."""
    after = take_snapshot(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(as_bytes(after[name]), as_bytes(value)), f"{name} changed"
