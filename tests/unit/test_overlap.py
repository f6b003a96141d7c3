"""commit_on_step(overlap=True) in one process, also as the only rank of a group: what happens before the step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

from syncaccum import (
    CommitError,
    commit,
    commit_on_step,
    convert_sync_accum,
    discard,
    load_window_state_dict,
    not_counted,
    window_state_dict,
)
from tests.oracle import assert_same_statistics, make_reference


def make_model(normalization: str = "renorm") -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2))
    return convert_sync_accum(network.double(), normalization=normalization)


def make_micro_batch(seed: int) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def begin(model: Any) -> tuple[SGD, Any]:
    """One step is done, and the next window was sent, with one micro-batch."""
    optimizer = SGD(model.parameters(), lr=0.0)
    handle = commit_on_step(model, optimizer, overlap=True)
    for seed in range(2):
        output = model(make_micro_batch(seed))
        handle.start_commit()
        output.square().mean().backward()
        if seed == 0:
            optimizer.step()
    return optimizer, handle


def test_without_a_group_it_commits_as_without_overlap() -> None:
    plain, model = make_model(), make_model()
    begin(model)[0].step()
    for seed in range(2):
        plain(make_micro_batch(seed))
        commit(plain)
    for one, other in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


def test_only_overlap_starts_a_commit() -> None:
    model = make_model()
    handle = commit_on_step(model, SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"commit_on_step\(\.\.\., overlap=True\)"):
        handle.start_commit()


@pytest.mark.parametrize("normalization", ["renorm", "window"])
def test_forwards_that_come_later_go_into_the_next_window(group: None, normalization: str) -> None:
    model = make_model(normalization)
    optimizer, _ = begin(model)
    reference = make_reference(model[1])
    with torch.no_grad():
        sent, later = (model[0](make_micro_batch(seed)) for seed in (1, 2))
        model(make_micro_batch(2))
        with pytest.warns(UserWarning, match="goes into the next window"):
            optimizer.step()
        reference(sent)
        # Sums in another order, some of them taken off again.
        assert_same_statistics(model[1], reference, rtol=1e-12, atol=1e-12)
        assert model[1].window.count == 5
        commit(model)
        reference(later)
        assert_same_statistics(model[1], reference, rtol=1e-12, atol=1e-12)
    assert model[1].window.count == 0


def test_what_came_too_late_is_said_once(group: None, recwarn: pytest.WarningsRecorder) -> None:
    model = make_model()
    optimizer, handle = begin(model)
    model(make_micro_batch(2))
    with pytest.warns(UserWarning, match="layer 1, the first such"):
        optimizer.step()
    handle.start_commit()
    model(make_micro_batch(3))
    optimizer.step()
    assert not recwarn


def test_forwards_that_do_not_count_come_when_they_like(group: None) -> None:
    model = make_model()
    optimizer, _ = begin(model)
    with not_counted(model):
        model(make_micro_batch(2))
    model.eval()(make_micro_batch(3))
    optimizer.step()
    assert model[1].window.count == 0


def drop(model: nn.Module) -> None:
    discard(model)


def reload(model: nn.Module) -> None:
    load_window_state_dict(model, window_state_dict(model))


@pytest.mark.parametrize(("replace", "left"), [(drop, 0), (reload, 5)])
def test_what_was_sent_is_committed_and_a_window_put_in_its_place_is_kept(
    group: None, replace: Callable[[nn.Module], None], left: int
) -> None:
    model, peer = make_model(), make_model()
    optimizer, _ = begin(model)
    begin(peer)[0].step()
    replace(model)
    with pytest.warns(UserWarning, match="dropped when it was on its way"):
        optimizer.step()
    for one, other in zip(model.buffers(), peer.buffers(), strict=True):
        assert torch.equal(one, other)
    assert model[1].window.count == left


def test_a_model_may_be_cast_meanwhile(group: None) -> None:
    model = make_model()
    optimizer, _ = begin(model)
    model.float()
    optimizer.step()
    assert model[1].num_batches_tracked == 2
    assert not model[1]._accumulation.window.any()


def test_a_part_that_is_committed_by_hand_is_not_committed_again(group: None) -> None:
    model = make_model()
    optimizer, _ = begin(model)
    model[1].update_stats()
    committed = model[1].running_mean.clone()
    optimizer.step()
    assert torch.equal(model[1].running_mean, committed)
    assert (model[1].num_batches_tracked, model[4].num_batches_tracked) == (2, 2)


def test_a_layer_that_is_gone_at_the_step_is_committed_as_it_was_sent(group: None) -> None:
    model = make_model()
    optimizer, handle = begin(model)
    gone = model[4]
    model[4] = nn.Identity()
    optimizer.step()
    assert (model[1].num_batches_tracked, gone.num_batches_tracked) == (2, 2)
    model(make_micro_batch(2))
    handle.start_commit()
    optimizer.step()
    assert (model[1].num_batches_tracked, gone.num_batches_tracked) == (3, 2)


def test_a_layer_that_is_pruned_meanwhile_is_refused(group: None) -> None:
    model = make_model()
    optimizer, _ = begin(model)
    discard(model)
    layer = model[4]
    layer.num_features = 1
    for name in ("running_mean", "running_var"):
        setattr(layer, name, getattr(layer, name)[:1].clone())
    before = model[1].running_mean.clone()
    with pytest.raises(CommitError, match="layer 4 were pruned or added when its window was on its way"):
        optimizer.step()
    assert torch.equal(model[1].running_mean, before)


def test_an_error_in_the_sending_is_raised_by_the_step(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    optimizer, handle = begin(model)

    def lose(*_: Any, **__: Any) -> Any:
        raise CommitError("lost")

    with monkeypatch.context() as patch:
        patch.setattr("syncaccum.window.overlap.Message", lose)
        handle.start_commit()
    with pytest.raises(CommitError, match="lost"):
        optimizer.step()
    assert model[1].window.count == 5
    handle.start_commit()
    optimizer.step()
    assert model[1].window.count == 0


def count_sent(handle: Any) -> int:
    return len(handle._overlap._messages)


def test_copies_of_a_wrapper_send_nothing(group: None) -> None:
    ddp = DistributedDataParallel(make_model())
    optimizer = SGD(ddp.parameters(), lr=0.1)
    handle = commit_on_step(ddp, optimizer, overlap=True)
    ddp(make_micro_batch(0)).mean().backward()
    optimizer.step()
    for other in (copy.deepcopy(ddp), AveragedModel(ddp).module):
        other(make_micro_batch(1)).mean().backward()
    hooks = pickle.loads(pickle.dumps(dict(ddp._forward_hooks)))
    assert len(hooks) == 1
    assert count_sent(handle) == 0
    ddp(make_micro_batch(1)).mean().backward()
    assert count_sent(handle) == 1


def test_a_wrapper_inside_of_the_model_is_found_and_eval_of_it_sends_nothing(group: None) -> None:
    model = nn.ModuleDict({"wrapped": DistributedDataParallel(make_model())})
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = commit_on_step(model, optimizer, overlap=True)
    model["wrapped"](make_micro_batch(0)).mean().backward()
    optimizer.step()
    with torch.no_grad():
        model["wrapped"](make_micro_batch(1))
    assert count_sent(handle) == 0
    model["wrapped"](make_micro_batch(1)).mean().backward()
    assert count_sent(handle) == 1


def test_a_second_walk_of_one_graph_sends_nothing_more(group: None) -> None:
    ddp = DistributedDataParallel(make_model())
    optimizer = SGD(ddp.parameters(), lr=0.1)
    handle = commit_on_step(ddp, optimizer, overlap=True)
    ddp(make_micro_batch(0)).mean().backward()
    optimizer.step()
    loss = ddp(make_micro_batch(1)).mean()
    loss.backward(retain_graph=True)
    first = dict(handle._overlap._messages)
    loss.backward()
    assert handle._overlap._messages == first
    assert first
