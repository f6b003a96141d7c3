"""How often ranks communicate: once per commit and group, never elsewhere. Counted by torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncaccum import SyncAccumBatchNorm, commit, convert_sync_accum, gather_window_state_dict
from tests.oracle import feed_layers, make_layers
from tests.ranks import Rank, on_ranks

ONE = {"gloo:all_reduce": 1}
WITH_FINGERPRINT = {"gloo:all_reduce": 2}


def count_collectives(action: Callable[[], Any]) -> Counter[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    return Counter(event.name for event in profile.events() if event.name.startswith("gloo:"))


@on_ranks(2)
def test_a_commit_is_one_all_reduce_after_a_fingerprint_check_in_the_first(rank: Rank) -> None:
    layers = make_layers(a=3, b=4, c=5)
    counts = []
    for step in range(3):
        feed_layers(layers, rank, seed=step)
        counts.append(count_collectives(lambda: commit(layers)))
    assert counts == [WITH_FINGERPRINT, ONE, ONE]


@on_ranks(2)
def test_windows_are_gathered_in_one_all_reduce_and_their_books_in_another(rank: Rank) -> None:
    layers: Any = make_layers(a=3, b=4)
    for policy, expected in (("renorm", 1), ("window", 2)):
        for layer in layers.values():
            layer.normalization = policy
        feed_layers(layers, rank)
        commit(layers)
        counted = count_collectives(lambda: gather_window_state_dict(layers))
        assert counted == {"gloo:all_reduce": expected}, policy


@on_ranks(2)
def test_a_changed_layout_is_checked_once_more(rank: Rank) -> None:
    layers: Any = make_layers(a=3, b=4)
    commit(layers)
    layers["a"].momentum = 0.2
    layers["c"] = SyncAccumBatchNorm(2)
    counts = [count_collectives(lambda: commit(layers)) for _ in range(2)]
    assert counts == [WITH_FINGERPRINT, ONE]


@on_ranks(3)
def test_each_group_has_its_own_all_reduce(rank: Rank) -> None:
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    own = pair if rank.index < 2 else single
    layers = nn.ModuleDict(
        {
            "everyone": SyncAccumBatchNorm(2),
            "group": SyncAccumBatchNorm(2, process_group=own),
            "named_everyone": SyncAccumBatchNorm(3, process_group=dist.group.WORLD),
            "group_too": SyncAccumBatchNorm(3, process_group=own),
        }
    )
    commit(layers)
    assert count_collectives(lambda: commit(layers)) == {"gloo:all_reduce": 2}


@pytest.mark.parametrize("normalization", ["renorm", "batch", "running"])
@on_ranks(2)
def test_forward_backward_and_eval_are_silent(rank: Rank, normalization: str) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    model = convert_sync_accum(plain, normalization=normalization)
    commit(model)

    def train_and_evaluate() -> None:
        for _ in range(2):
            model(torch.randn(3, 3, 5, 5)).square().mean().backward()
        model.eval()
        model(torch.randn(3, 3, 5, 5))

    assert count_collectives(train_and_evaluate) == {}


@on_ranks(2)
def test_ddp_communicates_as_it_does_with_batch_norm(rank: Rank) -> None:
    """Its own buffer broadcast and gradient reduction, and not one collective more."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

    def train(model: nn.Module) -> None:
        for _ in range(3):
            model(torch.randn(3, 3, 5, 5)).square().mean().backward()

    models = [DistributedDataParallel(m) for m in (deepcopy(plain), convert_sync_accum(deepcopy(plain)))]
    theirs, ours = (count_collectives(partial(train, m)) for m in models)
    assert ours == theirs
    assert ours.total() > 0


@on_ranks(2)
def test_two_models_commit_in_turn_with_one_all_reduce_each(rank: Rank) -> None:
    """As a GAN's: neither makes the other compare layouts again."""
    generator, discriminator = make_layers(a=3, b=2), make_layers(a=7)
    counts = []
    for step in range(3):
        for model in (generator, discriminator, discriminator):
            feed_layers(model, rank, seed=step)
            counts.append(count_collectives(partial(commit, model)))
    assert counts == [WITH_FINGERPRINT, WITH_FINGERPRINT, *[ONE] * 7]
