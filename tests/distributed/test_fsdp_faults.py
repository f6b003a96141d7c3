"""lockstep and lookahead over fully_shard: what is refused, what is left after an error, and that no peer waits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from syncaccum import LockstepError, SyncAccumBatchNorm, commit, lockstep, lookahead
from tests.distributed.test_fsdp import EVEN, SIZES, build, check_lockstep, images, shard, walk, window
from tests.distributed.test_lockstep import loss_of
from tests.ranks import Rank, on_ranks


def windows_of(model: nn.Module) -> set[float]:
    return {float(layer.window.count) for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)}


needs_reset = pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"), reason="this torch cannot undo a forward that failed"
)


@needs_reset
@on_ranks(2)
def test_a_forward_that_failed_leaves_a_model_that_works(rank: Rank) -> None:
    model, reference = build()
    shard(model, "blocks")
    _, parts = window(0, SIZES[2], rank)

    with pytest.raises(ZeroDivisionError):
        lockstep(model, lambda x: 1 / 0 * model(x), parts)
    with pytest.raises(ZeroDivisionError):
        lockstep(model, lambda x: model(x) * (1 / 0), parts)
    assert windows_of(model) == {0.0}
    check_lockstep(model, reference, rank)


@on_ranks(1)
def test_micro_batches_that_come_to_different_modules_are_an_error_that_names_both(rank: Rank) -> None:
    model, _ = build()
    shard(model, "blocks")
    xs = [images(0, 2), images(1, 2)]

    def skip(x: Tensor) -> Any:
        return model(x) if x is xs[0] else model[0](x)

    with pytest.raises(
        LockstepError,
        match="micro-batch 1 meets the beginning of module 0, which is under fully_shard, but the others wait for it "
        "at the beginning of the model, which is under fully_shard",
    ):
        lockstep(model, skip, xs)

    def without(x: Tensor) -> Any:
        with torch.set_grad_enabled(x is xs[0]):
            return model(x)

    with pytest.raises(LockstepError, match=r"beginning of the model, which is under .* with and without gradients"):
        lockstep(model, without, xs)


@on_ranks(1)
def test_a_sharded_module_around_the_model_must_be_the_model(rank: Rank) -> None:
    model, _ = build()
    root = nn.Sequential(model)
    shard(root, "root")
    with pytest.raises(LockstepError, match=r"layer 0\.1 runs inside of FSDPSequential.*pass that as lockstep's model"):
        lockstep(model, root, [images(0, 2), images(1, 2)])
    with pytest.raises(LockstepError, match="pass that as lookahead's model"):
        next(lookahead(model, root, [images(0, 2), images(1, 2)]))


@on_ranks(1)
def test_two_locksteps_in_two_threads_do_not_go_through_one_sharded_model(rank: Rank) -> None:
    model, _ = build()
    shard(model, "root")
    errors: list[Exception] = []

    def other() -> None:
        try:
            lockstep(model, model, [images(0, 2)])
        except LockstepError as error:
            errors.append(error)

    def forward(x: Tensor) -> Tensor:
        if not errors:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return loss_of(model(x))

    (loss,) = lockstep(model, forward, [images(0, 2)])
    loss.backward()
    assert "two locksteps in two threads go through the model, which is under fully_shard" in str(errors[0])
    lockstep(model, model, [images(0, 2)])


@on_ranks(1)
def test_lookahead_inside_of_a_sharded_forward_is_refused(rank: Rank) -> None:
    class Step(nn.Sequential):
        def forward(self, parts: Sequence[Tensor]) -> None:
            next(lookahead(self[0], lambda x: loss_of(self[0](x)), parts))

    model = Step(build()[0])
    shard(model, "root")
    with pytest.raises(LockstepError, match="call lookahead outside, with that module as its model"):
        model([images(0, 2)])


@on_ranks(2)
def test_lookahead_refuses_unequal_numbers_on_all_ranks(rank: Rank) -> None:
    model, _ = build()
    shard(model, "blocks")
    parts = list(images(0, 6).split([2, 3][rank.index]))
    with pytest.raises(LockstepError, match=r"rank 0 has 3, rank 1 has 2: give ranks with fewer .* empty \(N = 0\)"):
        list(walk(model, parts))
    assert windows_of(model) == {0.0}
    list(walk(model, [*parts, images(0, 0)] if rank.index == 1 else parts))
    assert commit(model).ranks == 2


@on_ranks(2)
def test_a_peer_that_gives_up_lookahead_is_named_at_once(rank: Rank) -> None:
    """Its message meets none of FSDP's."""
    model, _ = build()
    shard(model, "blocks")
    parts = window(0, EVEN, rank)[1]

    def run() -> None:
        for index, loss in enumerate(lookahead(model, lambda x: loss_of(model(x)), parts)):
            loss.backward()
            if rank.index == 1 and index == 1:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError if rank.index == 1 else LockstepError) as caught:
        run()
    assert rank.index == 1 or "rank 1 given up" in str(caught.value)
    assert windows_of(model) == {0.0}
    model.zero_grad()
    sum(walk(model, parts))
    assert commit(model).ranks == 2


@needs_reset
@on_ranks(1)
def test_a_second_pass_that_failed_leaves_a_model_that_works(rank: Rank) -> None:
    model, _ = build()
    shard(model, "blocks")
    calls = iter([False, False, True, False])  # two in the first pass

    def fail(module: nn.Module, args: Any) -> None:
        if next(calls):
            raise ZeroDivisionError

    handle = model[2].long[0].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        sum(walk(model, list(images(0, 4).split(2))))
    handle.remove()
    assert windows_of(model) == {0.0}
    assert all(isinstance(p, DTensor) for p in model.parameters())
    sum(walk(model, list(images(0, 4).split(2))))
    assert windows_of(model) != {0.0}
