"""PyTorch's own tools for several ranks on converted models, with nn.BatchNorm as the oracle; see docs/pytorch.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh, checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from syncaccum import (
    SyncAccumBatchNorm,
    commit,
    convert_sync_accum,
    gather_window_state_dict,
    load_window_state_dict,
    revert_sync_accum,
)
from tests.oracle import (
    Oracle,
    assert_same_on_all_ranks,
    assert_same_statistics,
    gather_global_batch,
    make_reference,
)
from tests.ranks import Rank, on_ranks

every_policy = pytest.mark.parametrize("policy", ["running", "renorm", "window"])
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def make_model(policy: str, process_group: Any = None) -> nn.Sequential:
    torch.manual_seed(0)
    return convert_sync_accum(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        process_group,
        policy,
    )


def draw(rank: Rank, index: int) -> Tensor:
    """Uneven over ranks."""
    generator = torch.Generator().manual_seed(10 * index + rank.index)
    return torch.randn(2 + rank.index, 3, 6, 6, generator=generator) + rank.index


def shard(model: nn.Sequential, parts: str) -> nn.Sequential:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    if parts == "layers":
        for child in model:
            if list(child.parameters()):
                fully_shard(child, mesh=mesh, mp_policy=BFLOAT16)
    fully_shard(model, mesh=mesh, mp_policy=BFLOAT16)
    return model


@every_policy
@pytest.mark.parametrize("parts", ["root", "layers"])
@on_ranks(2)
def test_fully_shard_in_bfloat16_keeps_statistics_of_the_global_batch(rank: Rank, parts: str, policy: str) -> None:
    model = shard(make_model(policy), parts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    oracle = Oracle(model)
    for step in range(3):
        for index in range(2 + step):
            y = oracle.forward(draw(rank, 10 * step + index))
            assert y.dtype == torch.bfloat16
            y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert commit(model).layers == ("1", "4")
        oracle.check_commit()
        assert all(b.dtype == torch.float32 for b in model.buffers() if b.is_floating_point())
    assert_same_on_all_ranks(list(model.buffers()))


@every_policy
@on_ranks(2)
def test_a_sharded_model_resumes_in_mid_window_from_a_distributed_checkpoint(rank: Rank, policy: str) -> None:
    model = shard(make_model(policy), "root")
    model(draw(rank, 0)).float().square().mean().backward()
    commit(model)
    model(draw(rank, 1)).float().square().mean().backward()
    model.zero_grad()  # no checkpoint of torch's holds gradients
    folder = rank.folder / "dcp"
    checkpoint.save(
        {"model": get_model_state_dict(model), "windows": gather_window_state_dict(model)}, checkpoint_id=folder
    )

    resumed = shard(make_model(policy), "root")
    state: dict[str, Any] = {"model": get_model_state_dict(resumed), "windows": gather_window_state_dict(resumed)}
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(resumed, state["model"])
    load_window_state_dict(resumed, state["windows"])

    seen, plain = [draw(rank, 1), draw(rank, 2)], make_reference(resumed[1])
    for m in (model, resumed):
        m(seen[1]).float().square().mean().backward()
        assert commit(m).values["1"] == sum(2 * (2 + index) * 16 for index in range(2))
    # Its input: weights and data are rounded to bfloat16 first.
    first = make_model(policy)[0].bfloat16()
    plain(gather_global_batch([first(x.bfloat16()) for x in seen]))
    assert_same_statistics(resumed[1], plain)


@every_policy
@on_ranks(4)
def test_a_dimension_of_a_device_mesh_is_a_process_group(rank: Rank, policy: str) -> None:
    mesh: DeviceMesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layer = convert_sync_accum(nn.BatchNorm2d(3), mesh["dp"], policy)
    assert layer.process_group is mesh.get_group("dp")
    plain = nn.BatchNorm1d(3).double()
    for step in range(2):
        window = [draw(rank, 10 * step + index) for index in range(2)]
        for x in window:
            layer(x)
        commit(layer)
        plain(gather_global_batch(window, mesh.get_group("dp")))
        torch.testing.assert_close(layer.running_mean.double(), plain.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), plain.running_var, rtol=1e-6, atol=1e-6)


@on_ranks(4)
def test_a_device_mesh_of_two_dimensions_is_an_error_that_names_them(rank: Rank) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match=r'2 dimensions: pass the one .* mesh\["dp"\]; it has \'dp\', \'tp\''):
        convert_sync_accum(nn.BatchNorm2d(3), mesh)


@on_ranks(2)
def test_a_layer_that_fully_shard_took_goes_back_beneath_it(rank: Rank) -> None:
    model = make_model("batch")
    plain = revert_sync_accum(make_model("batch"))
    fully_shard(model[1])
    revert_sync_accum(model)
    assert isinstance(model[1], FSDPModule)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert not isinstance(model[1], SyncAccumBatchNorm)
    x = draw(rank, 0)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model[1].running_var, plain[1].running_var)
