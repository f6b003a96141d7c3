"""Several optimizers: each layer is committed after the steps of the optimizer that has its weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from syncaccum import NoLayersError, convert_sync_accum
from syncaccum.integrations.parts import commit_parts_on_steps


def make_part(**settings: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, **settings))


def make_model(**settings: Any) -> Any:
    """Two networks in one model."""
    return convert_sync_accum(nn.ModuleDict({"first": make_part(**settings), "second": make_part(**settings)}))


def make_optimizer(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def feed(model: Any) -> None:
    for part in model.values():
        part(torch.randn(4, 2)).square().mean().backward()


def counts(model: Any) -> list[int]:
    return [int(part[1].num_batches_tracked) for part in model.values()]


@pytest.mark.parametrize("affine", [True, False])
def test_each_network_is_committed_with_its_own_optimizer(affine: bool) -> None:
    model = make_model(affine=affine)
    first, second = (make_optimizer(*part.parameters()) for part in model.values())
    commit_parts_on_steps(model, [first, second])
    feed(model)
    first.step()
    assert counts(model) == [1, 0]
    second.step()
    assert counts(model) == [1, 1]


def test_an_optimizer_of_matrices_alone_commits_nothing() -> None:
    model = make_model()
    matrices = make_optimizer(*(p for p in model.parameters() if p.dim() > 1))
    vectors = make_optimizer(*(p for p in model.parameters() if p.dim() == 1))
    commit_parts_on_steps(model, [matrices, vectors])
    feed(model)
    matrices.step()
    assert counts(model) == [0, 0]
    vectors.step()
    assert counts(model) == [1, 1]


def test_a_layer_between_optimizers_is_committed_when_all_of_them_have_stepped() -> None:
    model = make_model(affine=False)
    weights = make_optimizer(*(part[0].weight for part in model.values()))
    biases = make_optimizer(*(part[0].bias for part in model.values()))
    commit_parts_on_steps(model, [weights, biases])
    feed(model)
    biases.step()
    assert counts(model) == [0, 0]
    weights.step()
    assert counts(model) == [1, 1]


def test_a_model_that_no_optimizer_has_waits_for_all() -> None:
    model = make_model()
    others = [make_optimizer(nn.Parameter(torch.ones(1), requires_grad=True)) for _ in range(2)]
    commit_parts_on_steps(model, others)
    feed(model)
    others[0].step()
    assert counts(model) == [0, 0]
    others[1].step()
    assert counts(model) == [1, 1]


def test_a_single_optimizer_commits_frozen_layers_too() -> None:
    model = make_model()
    optimizer = make_optimizer(*model["first"].parameters())
    commit_parts_on_steps(model, [optimizer])
    feed(model)
    optimizer.step()
    assert counts(model) == [1, 1]


def test_a_layer_without_statistics_is_left_out() -> None:
    model = make_model(track_running_stats=False)
    optimizers = [make_optimizer(*part.parameters()) for part in model.values()]
    with pytest.raises(NoLayersError):
        commit_parts_on_steps(model, optimizers)
    model["third"] = convert_sync_accum(make_part())
    commit_parts_on_steps(model, optimizers)


def test_a_layer_whose_statistics_are_switched_off_for_a_while_is_committed() -> None:
    """Some wrappers switch the flag off around forwards that are not to count."""
    model = make_model()
    optimizers = [make_optimizer(*part.parameters()) for part in model.values()]
    for part in model.values():
        part[1].track_running_stats = False
    commit_parts_on_steps(model, optimizers)
    for part in model.values():
        part[1].track_running_stats = True
    feed(model)
    for optimizer in optimizers:
        optimizer.step()
    assert counts(model) == [1, 1]


def test_a_layer_whose_statistics_were_taken_away_is_left_out() -> None:
    """TENT's recipe keeps the flag on."""
    model = make_model()
    layer = model["first"][1]
    layer.running_mean = layer.running_var = None
    optimizers = [make_optimizer(*part.parameters()) for part in model.values()]
    commit_parts_on_steps(model, optimizers)
    feed(model)
    for optimizer in optimizers:
        optimizer.step()
    assert counts(model)[1] == 1


def test_errors_name_layers_as_the_model_does() -> None:
    model = make_model()
    optimizers = [make_optimizer(*part.parameters()) for part in model.values()]
    commit_parts_on_steps(model, optimizers)
    model["second"](torch.full((2, 2), torch.nan))
    with pytest.raises(Exception, match=r"second\.1"):
        optimizers[1].step()
