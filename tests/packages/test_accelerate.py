"""accelerate: sync_accum with what it prepared, its accumulation, its checkpoints, and the exact mode beside it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from syncaccum import LockstepError, discard, lockstep
from syncaccum.integrations.accelerate import sync_accum
from tests.oracle import Oracle, assert_same_statistics, gather_global_batch, make_reference
from tests.ranks import Rank, on_ranks

WINDOW = 3
# Micro-batches of each rank; the last window is a short one, which accelerate ends with the data loader.
MICRO_BATCHES = 2 * WINDOW + 2


@contextmanager
def accelerator(environment: dict[str, str], steps: int = WINDOW) -> Iterator[Any]:
    """An Accelerator that accumulates; nothing of it is left for the next one in this process."""
    from accelerate import Accelerator

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ACCELERATE_USE_CPU": "1", **environment}.items():
            patch.setenv(name, value)
        made = Accelerator(cpu=True, gradient_accumulation_steps=steps)
        try:
            yield made
        finally:
            made.free_memory()
            made.state._reset_state(reset_partial_state=True)
            made.gradient_state._reset_state()
            gc.collect()  # DDP's reference cycles keep gloo busy after the group is gone


def make_network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2)).double()


def check_training(accelerator: Any) -> tuple[nn.Module, list[int]]:
    """Train an epoch; every optimizer step commits what a BatchNorm would have made of its window on torch.cat.

    Returns the prepared model, and the micro-batches behind each commit.
    """
    torch.manual_seed(0)
    ranks = accelerator.num_processes
    examples = torch.randn(ranks * MICRO_BATCHES * 4, 3, dtype=torch.float64) * 2 + 1
    model = make_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader: Any = DataLoader(TensorDataset(examples), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    handle = sync_accum(accelerator, model, optimizer)
    assert handle.report is None
    oracle = Oracle(model)
    layer: Any = accelerator.unwrap_model(model)[1]
    windows: list[int] = []
    seen = 0
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(oracle.forward(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        seen += 1
        if layer.num_batches_tracked > len(windows):
            oracle.check_commit()
            assert handle.report is not None
            assert set(handle.report.values.values()) == {ranks * 4 * seen}
            windows.append(seen)
            seen = 0
            assert layer.window.count == 0
    return model, windows


def test_each_step_of_accelerate_commits_its_window() -> None:
    with accelerator({}) as alone:
        _, windows = check_training(alone)
    assert windows == [WINDOW, WINDOW, 2]


def launched(rank: Rank) -> dict[str, str]:
    """What accelerate's own launcher sets, and by what it knows that there are peers; the group is there already."""
    told = {"RANK": rank.index, "LOCAL_RANK": rank.index, "WORLD_SIZE": rank.size, "LOCAL_WORLD_SIZE": rank.size}
    # Else accelerate sets the last one, with a warning.
    return {name: str(value) for name, value in {**told, "OMP_NUM_THREADS": 1}.items()}


@on_ranks(2)
def test_each_step_of_accelerate_commits_the_window_of_two_ranks(rank: Rank) -> None:
    with accelerator(launched(rank)) as joint:
        assert joint.num_processes == rank.size
        model, windows = check_training(joint)
        assert isinstance(model, DistributedDataParallel)
        del model
    assert windows == [WINDOW, WINDOW, 2]


def prepare(accelerator: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = make_network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return model, optimizer


def step(accelerator: Any, model: Any, optimizer: Any, x: torch.Tensor) -> None:
    with accelerator.accumulate(model):
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def test_a_step_that_gradient_scaling_skips_leaves_its_window_to_the_next() -> None:
    with accelerator({}, steps=1) as alone:
        # Of float16, for which accelerate wants a GPU.
        alone.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        model, optimizer = prepare(alone)
        handle = sync_accum(alone, model, optimizer)
        for factor in (float("inf"), 1.0):
            alone.backward(model(torch.randn(4, 3, dtype=torch.float64)).square().mean() * factor)
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.step_was_skipped is (factor != 1.0)
            assert (handle.report is None) is (factor != 1.0)
        assert handle.report.values == {"1": 8, "4": 8}


def check_checkpoint(accelerator: Any, folder: Path) -> None:
    """A window of three of which two were before the checkpoint."""
    model, optimizer = prepare(accelerator)
    handle = sync_accum(accelerator, model, optimizer)
    layer = accelerator.unwrap_model(model)[4]
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    micro_batches = [torch.randn(n, 3, dtype=torch.float64) for n in (3, 5, 4)]
    for x in micro_batches[:2]:
        step(accelerator, model, optimizer, x)
    accelerator.save_state(str(folder))
    # Another window, of other data, which the checkpoint takes back.
    step(accelerator, model, optimizer, micro_batches[0] + 9)
    assert layer.num_batches_tracked == 1
    accelerator.load_state(str(folder))
    assert layer.num_batches_tracked == 0
    del seen[2:]
    expected = make_reference(layer)
    step(accelerator, model, optimizer, micro_batches[2])
    expected(gather_global_batch(seen))
    assert_same_statistics(layer, expected)
    handle.remove()


def test_a_checkpoint_holds_the_open_window(tmp_path: Path) -> None:
    with accelerator({}) as alone:
        check_checkpoint(alone, tmp_path)


@on_ranks(2)
def test_a_checkpoint_holds_the_open_windows_of_two_ranks(rank: Rank) -> None:
    torch.manual_seed(rank.index)
    with accelerator(launched(rank)) as joint:
        check_checkpoint(joint, rank.folder / "saved")


def test_a_checkpoint_from_before_is_loaded_first(tmp_path: Path) -> None:
    with accelerator({}) as alone:
        model, optimizer = prepare(alone)
        alone.save_state(str(tmp_path))
        alone.load_state(str(tmp_path))
        sync_accum(alone, model, optimizer)
        with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
            alone.load_state(str(tmp_path))


def test_a_training_function_that_runs_again_starts_with_empty_windows(tmp_path: Path) -> None:
    with accelerator({}) as alone:
        model, optimizer = prepare(alone)
        for _ in range(2):
            sync_accum(alone, model, optimizer)
            assert model[1].window.count == 0
            step(alone, model, optimizer, torch.randn(4, 3, dtype=torch.float64))
        alone.free_memory()
        model, optimizer = prepare(alone)
        sync_accum(alone, model, optimizer)
        alone.save_state(str(tmp_path))
    # A process that was started anew has made one model.
    with accelerator({}) as alone:
        model, optimizer = prepare(alone)
        sync_accum(alone, model, optimizer)
        alone.load_state(str(tmp_path))


def test_after_remove_steps_commit_nothing_and_checkpoints_hold_no_windows(tmp_path: Path) -> None:
    with accelerator({}, steps=1) as alone:
        model, optimizer = prepare(alone)
        sync_accum(alone, model, optimizer).remove()
        step(alone, model, optimizer, torch.randn(4, 3, dtype=torch.float64))
        assert model[1].num_batches_tracked == 0
        alone.save_state(str(tmp_path))
        assert not list(tmp_path.glob("custom*"))


def test_the_windows_of_two_models_come_back_to_each(tmp_path: Path) -> None:
    with accelerator({}) as alone:
        both = [prepare(alone) for _ in range(2)]
        for n, (model, optimizer) in zip((3, 5), both, strict=True):
            sync_accum(alone, model, optimizer)
            model(torch.randn(n, 3, dtype=torch.float64))
        alone.save_state(str(tmp_path))
        for model, _ in both:
            discard(model)
        alone.load_state(str(tmp_path))
        assert [model[1].window.count for model, _ in both] == [3, 5]


def test_a_model_that_was_not_prepared_is_refused() -> None:
    with accelerator({}) as alone:
        model = make_network()
        with pytest.raises(ValueError, match=r"after prepare\(model\)"):
            sync_accum(alone, model, torch.optim.SGD(model.parameters()))


def test_the_exact_mode_is_refused_where_accelerate_accumulates() -> None:
    with accelerator({}) as alone:
        model, optimizer = prepare(alone)
        sync_accum(alone, model, optimizer)
        with pytest.raises(LockstepError, match="leave gradient_accumulation_steps at 1"):
            lockstep(model, model, [torch.randn(4, 3, dtype=torch.float64)])


def check_exact(accelerator: Any) -> None:
    """A window as one batch of the loader, in micro-batches of three: the large batch's training."""
    ranks, rank = accelerator.num_processes, accelerator.process_index
    data = torch.randn(ranks * 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model, optimizer = prepare(accelerator)
    sync_accum(accelerator, model, optimizer)
    expected = make_network()
    expected.load_state_dict(accelerator.unwrap_model(model).state_dict())
    plain = torch.optim.SGD(expected.parameters(), lr=0.1)
    for whole in data.split(ranks * 10):
        parts = whole[rank::ranks].split(3)
        losses = lockstep(model, lambda x: (model(x) - x[:, :2]).square().sum() / 10, parts)
        accelerator.backward(torch.stack(losses).sum())
        (expected(whole) - whole[:, :2]).square().sum().div(ranks * 10).backward()
        for one in (optimizer, plain):
            one.step()
            one.zero_grad()
    # Float64's 1e-16, through two layers and two steps.
    state = accelerator.unwrap_model(model).state_dict()
    torch.testing.assert_close(state, expected.state_dict(), rtol=1e-12, atol=1e-12)


def test_the_exact_mode_trains_as_the_large_batch() -> None:
    with accelerator({}, steps=1) as alone:
        check_exact(alone)


@on_ranks(2)
def test_the_exact_mode_trains_two_ranks_as_the_large_batch(rank: Rank) -> None:
    with accelerator(launched(rank), steps=1) as joint:
        check_exact(joint)
