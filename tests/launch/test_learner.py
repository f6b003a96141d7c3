"""Any number of ranks and any micro-batch make the step that the whole global batch would make."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from launch.arguments import Arguments
from launch.learner import DivergedError, Learner
from launch.placement import Placement
from launch.progress import Sums
from tests.ranks import Rank, on_ranks, run_on_ranks

State = dict[str, torch.Tensor]


def make_learner(rank: Rank, arguments: Arguments) -> Learner:
    placement = Placement(rank.index, rank.size, rank.index, rank.size, launched=True)
    return Learner(arguments, placement, torch.device("cpu"))


def train_one_epoch(rank: Rank, arguments: Arguments) -> tuple[State, list[Sums]]:
    learner = make_learner(rank, arguments)
    sums = [learner.step(batch) for batch in learner.batches(0)]
    return learner.state_dict()["model"], [*sums, learner.test()]


@pytest.mark.parametrize("model", ["resnet", "mlp"])
def test_running_policy_makes_the_same_steps_whatever_the_split(model: str) -> None:
    # Under "running" no image sees another before the commit, so only rounding tells splits apart: float64, whose
    # 1e-16 the layers amplify to 1e-12 at most. 16 + 16 + 2 images: three ranks get unequal shares, and one of
    # them none of the last global batch. A small step, because this policy is not for training from scratch.
    arguments = Arguments(model=model, normalization="running", dtype="float64", lr=1e-3, window=16, train_images=34)
    whole, whole_sums = run_on_ranks(train_one_epoch, 1, replace(arguments, micro_batch=16))[0]
    for state, sums in run_on_ranks(train_one_epoch, 3, replace(arguments, micro_batch=3)):
        assert_states_close(state, whole, rtol=1e-9)
        for ours, theirs in zip(sums, whole_sums, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-9)
            assert (ours.correct, ours.images) == (theirs.correct, theirs.images)


@pytest.mark.parametrize("normalization", ["renorm", "batch", "running"])
def test_first_commit_is_the_same_where_micro_batches_are(normalization: str) -> None:
    # 8 images on each of two ranks, 4 at a time, are the micro-batches that one rank makes of all 16. Forwards are
    # then the same to the bit, and the float64 sums differ in the order of addition only: the float32 they are
    # rounded to at the end may differ by one unit in the last place.
    arguments = Arguments(normalization=normalization, window=16, train_images=16)
    one = run_on_ranks(train_one_epoch, 1, arguments)[0][0]
    for state, _ in run_on_ranks(train_one_epoch, 2, arguments):
        statistics = {name: value for name, value in state.items() if "running" in name}
        assert len(statistics) == 2 * 17
        assert_states_close(statistics, one, rtol=torch.finfo(torch.float32).eps)


def test_batch_policy_with_one_micro_batch_to_a_window_is_plain_batchnorm() -> None:
    # Steps amplify rounding, so the tolerance is that of the other float64 comparison above.
    arguments = Arguments(dtype="float64", window=16, micro_batch=16, train_images=32)
    ours = run_on_ranks(train_one_epoch, 1, replace(arguments, normalization="batch"))[0][0]
    plain = run_on_ranks(train_one_epoch, 1, replace(arguments, normalization="none"))[0][0]
    assert ours["stem.1.num_batches_tracked"] == 2
    assert_states_close(ours, plain, rtol=1e-9)


@pytest.mark.parametrize("normalization", ["window", "renorm", "none"])
@on_ranks(3)
def test_a_learner_that_loads_a_state_goes_on_bit_for_bit(rank: Rank, normalization: str) -> None:
    # Three ranks: for two, a sum has only one order.
    arguments = Arguments(normalization=normalization, window=16, train_images=64)
    uninterrupted = make_learner(rank, arguments)
    for batch in uninterrupted.batches(0)[:2]:
        uninterrupted.step(batch)
    resumed = make_learner(rank, arguments)
    resumed.load_state_dict(deepcopy(uninterrupted.state_dict()))  # an optimizer takes tensors as its own
    for batch in uninterrupted.batches(0)[2:]:
        assert resumed.step(batch) == uninterrupted.step(batch)
        assert_states_close(resumed.state_dict()["model"], uninterrupted.state_dict()["model"], rtol=0)
    assert resumed.test() == uninterrupted.test()


@on_ranks(2)
def test_ranks_test_on_the_same_statistics_with_plain_batchnorm_too(rank: Rank) -> None:
    learner = make_learner(rank, Arguments(normalization="none", window=16, train_images=32))
    for batch in learner.batches(0):
        learner.step(batch)
    before = learner.test()
    assert before.images == 360
    statistics = learner.state_dict()["model"]["stem.1.running_mean"]
    theirs = statistics.clone()
    torch.distributed.broadcast(theirs, src=0)
    assert torch.equal(statistics, theirs)


@on_ranks(2)
def test_all_ranks_say_that_training_diverged(rank: Rank) -> None:
    learner = make_learner(rank, Arguments(model="mlp", lr=1e30, window=16, train_images=256))
    with pytest.raises(DivergedError):
        [learner.step(batch) for batch in learner.batches(0)]


def assert_states_close(actual: State, expected: State, rtol: float) -> None:
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=_floor(expected[name], rtol), msg=name)


def _floor(value: torch.Tensor, rtol: float) -> Any:
    """Cancellation leaves some elements with the rounding error of the largest."""
    return rtol * value.abs().max().item()
