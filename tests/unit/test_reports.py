"""What people have reported of BatchNorm elsewhere, tried here: the same program with nn.BatchNorm is the oracle."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from syncaccum import CommitError, commit, commit_on_step, convert_sync_accum, discard, lockstep, revert_sync_accum
from tests.oracle import assert_same_statistics


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 2


def make_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2))


def batch_norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]


def assert_as_plain(model: Any, plain: Any) -> None:
    """The same statistics. float32 rounding, of which nn.BatchNorm has more.

    Only for forwards: steps of a training multiply rounding, so a program with steps is compared in float64.
    """
    for ours, theirs in zip(batch_norms(model), batch_norms(plain), strict=True):
        assert_same_statistics(ours, theirs.double(), rtol=1e-5, atol=1e-6)


# --- switches that are read in a forward, and not at a commit --------------------------------------------------


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    for layer in batch_norms(model):
        layer.track_running_stats = False
    yield
    for layer in batch_norms(model):
        layer.track_running_stats = True


def test_tracking_that_is_off_at_the_step_does_not_lose_what_counted() -> None:
    """lyakaap/VAT-pytorch#8, pytorch/pytorch#20967: a second, adversarial forward and the step with tracking off."""
    model, plain = convert_sync_accum(make_model(), normalization="batch").double(), make_model().double()
    for m in (model, plain):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        if m is model:
            commit_on_step(m, optimizer)
        for seed in range(3):
            m(draw(8, 3, seed=seed).double()).square().sum().backward()
            with untracked(m):
                m(draw(8, 3, seed=seed).double() * 5).square().sum().backward()
                optimizer.step()
            optimizer.zero_grad()
    assert_as_plain(model, plain)


def test_one_layer_whose_tracking_is_off_at_a_commit_is_committed_with_the_others() -> None:
    """pytorch/pytorch#37823: the flag of a layer that has statistics is switched."""
    model, plain = convert_sync_accum(make_model(), normalization="batch"), make_model()
    for m in (model, plain):
        m(draw(8, 3))
        m[1].track_running_stats = False
        m(draw(8, 3, seed=1))
    report = commit(model)
    assert report.values == {"1": 8, "4": 16}
    assert_same_statistics(model[1], plain[1].double(), rtol=1e-5)


@pytest.mark.parametrize("policy", ["batch", "renorm", "running"])
def test_a_checkpoint_that_switches_tracking_off_for_the_first_forward_is_an_error_that_says_so(policy: str) -> None:
    """facebookresearch/fairscale#1035: hooks that track only where gradients are recorded, which is in backward."""
    model = convert_sync_accum(make_model(), normalization=policy)

    def switch_off(layer: Any, _: Any) -> None:
        layer.track_running_stats = torch.is_grad_enabled()

    def switch_on(layer: Any, *_: Any) -> None:
        layer.track_running_stats = True

    for layer in batch_norms(model):
        layer.register_forward_pre_hook(switch_off)
        layer.register_forward_hook(switch_on)
    loss = checkpoint(model, draw(8, 3).requires_grad_(), use_reentrant=True).square().sum()
    with pytest.raises(RuntimeError, match=r"layer 1 again.*track_running_stats=False, so nothing was counted.*use"):
        loss.backward()


def test_an_untracked_forward_does_not_disturb_a_checkpoint_of_tracked_ones() -> None:
    """lyakaap/VAT-pytorch#8 together with checkpointing."""
    model, plain = convert_sync_accum(make_model(), normalization="batch"), make_model()
    for seed in range(2):
        with untracked(model):
            model(draw(8, 3, seed=seed) * 5)
        checkpoint(model, draw(8, 3, seed=seed), use_reentrant=False).square().sum().backward()
        commit(model)
        plain(draw(8, 3, seed=seed))
    assert_as_plain(model, plain)


# --- what tools put on an instance -----------------------------------------------------------------------------


def hook_forward(layer: Any) -> None:
    """As accelerate does: the class's forward, bound, behind one on the instance."""
    layer._old_forward = layer.forward

    def new_forward(module: Any, *args: Any) -> Any:
        return module._old_forward(*args)

    layer.forward = functools.update_wrapper(functools.partial(new_forward, layer), layer._old_forward)


def unhook_forward(layer: Any) -> None:
    layer.forward = layer._old_forward
    del layer._old_forward


@pytest.mark.parametrize("hooked", ["before", "before, and unhooked after", "after"])
def test_a_forward_that_a_tool_put_on_the_instance_accumulates(hooked: str) -> None:
    """huggingface/accelerate#1971: such a forward hides that of the converted class."""
    model, plain = make_model(), make_model()
    if hooked != "after":
        for layer in batch_norms(model):
            hook_forward(layer)
    convert_sync_accum(model, normalization="batch")
    for layer in batch_norms(model):
        if hooked == "after":
            hook_forward(layer)
        elif hooked != "before":
            unhook_forward(layer)
    for seed in range(3):
        torch.testing.assert_close(model(draw(8, 3, seed=seed)), plain(draw(8, 3, seed=seed)))
        assert commit(model).values == {"1": 8, "4": 8}
    assert_as_plain(model, plain)
    torch.testing.assert_close(model.eval()(draw(5, 3)), plain.float().eval()(draw(5, 3)))


def test_a_forward_on_the_instance_meets_others_is_compiled_and_goes_back() -> None:
    """huggingface/accelerate#1971, in the exact mode, under torch.compile and after reverting."""
    model, plain = make_model().double(), make_model().double()
    for layer in batch_norms(model):
        hook_forward(layer)
    micro_batches = [draw(n, 3, seed=n).double() for n in (4, 2, 5)]
    convert_sync_accum(model)
    output = torch.cat(lockstep(model, model, micro_batches))
    torch.testing.assert_close(output, plain(torch.cat(micro_batches)))
    assert commit(model).values == {"1": 11, "4": 11}
    torch.compile(model, backend="eager", fullgraph=True)(micro_batches[0])
    assert model[1].window.count == 4
    discard(model)
    revert_sync_accum(model)(micro_batches[0])
    plain(micro_batches[0])
    assert_as_plain(model, plain)


class Locked(nn.BatchNorm1d):
    """Has something that cannot be pickled, and says what can."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_class_that_says_what_a_pickle_of_it_holds_is_heeded(copied: Callable[[Any], Any]) -> None:
    """vacancy/Synchronized-BatchNorm-PyTorch#9: cannot pickle '_thread.lock', for an EMA copy or a checkpoint."""
    layer: Any = convert_sync_accum(Locked(3))
    layer(draw(8, 3))
    twin = copied(layer)
    assert twin.lock is not layer.lock
    commit(layer)
    commit(twin)
    assert torch.equal(twin.running_mean, layer.running_mean)


# --- layers whose width changes --------------------------------------------------------------------------------


def keep_channels(model: Any, kept: list[int]) -> None:
    """As pruners do it, in place: the first BatchNorm and the layers around it."""
    before, layer, after = model[0], model[1], model[3]
    layer.num_features = len(kept)
    for name in ("running_mean", "running_var"):
        setattr(layer, name, getattr(layer, name)[kept])
    for module in (before, layer):
        module.weight, module.bias = (nn.Parameter(p.data[kept]) for p in (module.weight, module.bias))
    after.weight = nn.Parameter(after.weight.data[:, kept])


@pytest.mark.parametrize("kept", [[0, 2], [0, 1, 2, 3, 3]])
@pytest.mark.parametrize("empty_commit", [False, True])
def test_a_layer_that_is_pruned_or_grown_between_windows_goes_on(kept: list[int], empty_commit: bool) -> None:
    """VainF/Torch-Pruning#466: a pruner cuts parameters and running statistics of the layer in place."""
    model, plain = convert_sync_accum(make_model(), normalization="batch"), make_model()
    for seed in range(2):
        for m in (model, plain):
            m(draw(8, 3, seed=seed))
        commit(model)
        for m in (model, plain):
            keep_channels(m, kept if seed == 0 else [0])
        if empty_commit:
            assert commit(model).layers == ()
    for m in (model, plain):
        m(draw(8, 3, seed=2))
    commit(model)
    assert_as_plain(model, plain)


def test_a_layer_that_is_pruned_in_an_open_window_says_what_to_do() -> None:
    """VainF/Torch-Pruning#466, in the middle of a window: its sums are of channels that are gone."""
    model = convert_sync_accum(make_model())
    model(draw(8, 3))
    keep_channels(model, [0, 2])
    for use in (lambda: model(draw(8, 3)), lambda: commit(model)):
        with pytest.raises(
            CommitError, match=r"layer 1 has 2 channels now.*commit\(model\) or discard\(model\) before"
        ):
            use()


def test_a_layer_and_its_shallow_copy_are_one() -> None:
    """torch/nn#232, keras-team/keras#8794 in other frameworks: towers share running statistics; here by copy.copy."""

    def make_towers(layer: nn.Module) -> nn.ModuleList:
        return nn.ModuleList([layer, copy.copy(layer), nn.BatchNorm1d(3)])

    towers = convert_sync_accum(make_towers(convert_sync_accum(nn.BatchNorm1d(3))))
    plain = nn.BatchNorm1d(3)
    for seed in range(2):
        micro_batches = [draw(n, 3, seed=seed + n) for n in (4, 6)]
        for tower, x in zip(towers, micro_batches, strict=False):
            tower(x)
        assert commit(towers.double().float()).values == {"0": 10, "2": 0}
        plain(torch.cat(micro_batches))
    assert_same_statistics(towers[0], plain.double(), rtol=1e-5)
    assert torch.equal(towers.get_buffer("1.running_mean"), towers.get_buffer("0.running_mean"))


# --- compilers and tensors of other kinds ----------------------------------------------------------------------


def test_a_cumulative_average_compiles_into_one_graph() -> None:
    """pytorch/pytorch#194504: nn.BatchNorm with momentum=None does not, because it divides by its counter."""
    model, plain = convert_sync_accum(make_model(), normalization="batch"), make_model()
    for layer in (*batch_norms(model), *batch_norms(plain)):
        layer.momentum = None
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        compiled(draw(8, 3, seed=seed))
        commit(model)
        plain(draw(8, 3, seed=seed))
    assert_as_plain(model, plain)


def test_a_commit_does_not_ask_for_the_default_device() -> None:
    """facebookresearch/dinov2#477: what is made under ``torch.device("meta")`` has no values."""
    layer = convert_sync_accum(nn.BatchNorm1d(19))  # a width that no other test commits alone: the layout is kept
    plain = nn.BatchNorm1d(19)
    for _ in range(2):
        layer(draw(8, 19))
        with torch.device("meta"):
            commit(layer)
        plain(draw(8, 19))
    assert_same_statistics(layer, plain.double(), rtol=1e-5)


class Image(Tensor):
    """A kind of tensor of a user's own, as fastai's TensorImage."""


@pytest.mark.parametrize("policy", ["batch", "renorm", "running"])
def test_a_users_kind_of_tensor_comes_out_and_stays_out_of_the_state(policy: str) -> None:
    """fastai/fastai2#278: a subclass of Tensor goes through the model, and its kind must not spread."""
    model, plain = convert_sync_accum(make_model(), normalization=policy), make_model()
    x = draw(8, 3).as_subclass(Image)
    output = model(x)
    assert type(output) is type(plain(x)) is Image
    output.square().sum().backward()
    commit(model)
    state = [*model.buffers(), *(p.grad for p in model.parameters()), model[1].window.total]
    assert {type(t) for t in state} == {Tensor}
    assert_as_plain(convert_sync_accum(model[:2]), plain[:2])


def test_a_model_exported_in_training_mode_accumulates_in_the_model_it_came_from() -> None:
    """No report: quantisation and pipelines train a graph that torch.export made, which has no layers left."""
    model, plain = convert_sync_accum(make_model(), normalization="batch"), make_model()
    with pytest.warns(UserWarning, match="layer 1 is exported in training mode"):
        exported = torch.export.export(model, (draw(8, 3),)).module()
    for seed in range(3):
        torch.testing.assert_close(exported(draw(8, 3, seed=seed)), plain(draw(8, 3, seed=seed)))
        commit(model)
    assert_as_plain(model, plain)
    assert torch.equal(exported.get_buffer("1.running_mean"), model[1].running_mean)


@pytest.mark.parametrize("policy", ["renorm", "batch", "running"])
def test_a_forward_of_shapes_alone_works_and_counts_nothing(policy: str) -> None:
    """litgpt#173: tools estimate memory by a training step on meta or fake tensors."""
    make = lambda: convert_sync_accum(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), normalization=policy)  # noqa: E731
    with torch.device("meta"):
        model = make()
        model(torch.empty(2, 3, 5, 5)).sum().backward()
    with FakeTensorMode() as mode:
        fake = make()
        assert fake(mode.from_tensor(torch.empty(2, 3, 5, 5))).shape == (2, 4, 3, 3)
    real = make()
    real(torch.randn(2, 3, 5, 5))
    assert commit(real).values == {"1": 18}
