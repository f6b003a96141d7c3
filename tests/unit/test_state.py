"""An open window follows the data, counts what it should, and belongs to its statistics."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import syncaccum
from syncaccum import SyncAccumBatchNorm, commit, convert_sync_accum, not_counted, recalibrate


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 2


def make_model(**arguments: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return convert_sync_accum(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), **arguments)


def set_momentum(model: nn.Sequential, momentum: float | None) -> None:
    layer = model[1]
    assert isinstance(layer, nn.BatchNorm1d)
    layer.momentum = momentum


# --- where the window is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.float(), lambda m: m.to(torch.float32)])
def test_a_move_under_inference_mode_leaves_a_layer_that_trains(move: Callable[[nn.Module], nn.Module]) -> None:
    model = make_model()
    model(draw(8, 3)).sum().backward()
    before = model[1].window.pack()
    with torch.inference_mode():
        move(model).eval()
    assert torch.equal(model[1].window.pack(), before)
    model.train()(draw(8, 3)).sum()
    assert commit(model).values == {"1": 16}


def test_a_layer_made_under_inference_mode_accumulates() -> None:
    with torch.inference_mode():
        layer = SyncAccumBatchNorm(3, affine=False)
    layer.running_mean, layer.running_var = layer.running_mean.clone(), layer.running_var.clone()
    layer.num_batches_tracked = layer.num_batches_tracked.clone()
    layer(draw(8, 3))
    assert commit(layer).values == {"SyncAccumBatchNorm": 8}


@pytest.mark.parametrize("by", ["assign", "set_attributes"])
def test_a_layer_that_leaves_meta_buffer_by_buffer_loses_nothing(by: str) -> None:
    with torch.device("meta"):
        model = make_model()
    state = make_model().state_dict()
    if by == "assign":
        model.load_state_dict(state, assign=True)
    else:  # as accelerate's set_module_tensor_to_device
        for name, tensor in state.items():
            owner = model.get_submodule(name.rpartition(".")[0])
            own = name.rpartition(".")[2]
            if own in dict(owner.named_parameters()):
                setattr(owner, own, nn.Parameter(tensor))
            else:
                setattr(owner, own, tensor)
    plain = nn.BatchNorm1d(4)
    inputs = []
    model[1].register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    for seed in range(2):
        model(draw(8, 3, seed=seed))
    assert commit(model).values == {"1": 16}
    plain(torch.cat(inputs))
    torch.testing.assert_close(model[1].running_var, plain.running_var)


# --- what counts -----------------------------------------------------------------------------------------------


def test_forwards_inside_not_counted_train_and_are_not_counted() -> None:
    model = make_model()
    model(draw(8, 3))
    before = model[1].window.pack()
    with not_counted(model), not_counted(model[1]):
        expected = copy.deepcopy(model)(draw(4, 3, seed=1))
        y = model(draw(4, 3, seed=1))
    y.sum().backward()
    assert torch.equal(y, expected)
    assert model[0].weight.grad is not None
    assert torch.equal(model[1].window.pack(), before)
    model(draw(8, 3))
    assert commit(model).values == {"1": 16}


def test_not_counted_may_overlap_in_threads_and_ends_with_an_exception() -> None:
    model = make_model()
    first, second = not_counted(model), not_counted(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    model(draw(8, 3))
    assert model[1].window.count == 0
    second.__exit__(None, None, None)
    with pytest.raises(KeyError), not_counted(model):
        raise KeyError
    model(draw(8, 3))
    assert model[1].window.count == 8


def test_not_counted_needs_a_converted_model() -> None:
    with pytest.raises(syncaccum.NoLayersError), not_counted(nn.BatchNorm1d(3)):
        pass


def test_a_compiled_forward_heeds_not_counted_and_momentum() -> None:
    model = make_model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        compiled(draw(8, 3))
        with not_counted(model):
            compiled(draw(8, 3))
        set_momentum(model, 0.0)
        compiled(draw(8, 3))
        set_momentum(model, 0.1)
    assert commit(model).values == {"1": 16}


@pytest.mark.parametrize("at_commit", [0.0, 0.1])
def test_a_second_forward_under_momentum_0_counts_nothing(at_commit: float) -> None:
    """SAM's recipe: davda54/sam disables the running statistics so for its second pass, and steps meanwhile."""
    model, plain = make_model(), make_model()
    revert = syncaccum.revert_sync_accum(plain)
    x, adversarial = draw(8, 3), draw(8, 3, seed=1)
    for m in (model, revert):
        m(x)
        set_momentum(m, 0.0)
        m(adversarial)
        set_momentum(m, at_commit)
    commit(model)
    torch.testing.assert_close(model[1].running_mean, revert[1].running_mean)
    torch.testing.assert_close(model[1].running_var, revert[1].running_var)


def test_a_commit_folds_with_the_momentum_of_its_forwards() -> None:
    model, plain = make_model(), syncaccum.revert_sync_accum(make_model())
    for momentum in (0.5, None):
        for m in (model, plain):
            set_momentum(m, momentum)
            m(draw(8, 3))
        for m in (model, plain):
            set_momentum(m, 0.01)
        commit(model)
        torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_block_counts_it_once(backend: str | None, reentrant: bool) -> None:
    model = make_model()
    block = model if backend is None else torch.compile(model, backend=backend)
    x = draw(8, 3).requires_grad_()
    for _ in range(2):
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert model[1].window.count == 16


# Forward-mode AD of torch.linalg and batch_norm scripts its formulas, with torch's own warning about that.
SCRIPTED = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("change", [commit, lambda m: m.load_state_dict(dict(m.named_buffers()), strict=False)])
@pytest.mark.parametrize("policy", ["renorm", "batch", "running"])
def test_a_recomputed_forward_has_the_first_ones_statistics_or_says_so(
    policy: str, change: Callable[[nn.Module], Any], reentrant: bool
) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = make_model(normalization=policy)
        model(draw(8, 3))
        commit(model)
        x = draw(8, 3, seed=1).requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        with torch.no_grad():
            change(model)
        if checkpointed and policy != "batch":
            with pytest.raises(RuntimeError, match=r"layer 1 again, but its running statistics .* before commit"):
                y.square().sum().backward()
            return
        y.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", ["renorm", "running", "window"])
def test_a_recomputed_forward_from_before_a_commit_says_so_after_other_forwards(
    policy: str, reentrant: bool, frozen: bool
) -> None:
    """The layer has normalised with the new statistics since, so they are in use."""
    model = make_model(normalization=policy)
    model(draw(8, 3))
    commit(model)
    if frozen:  # the first layer leaves no node in a graph, and changes what the last one sees
        model[:2].requires_grad_(False)
    x = draw(8, 3, seed=1).requires_grad_(reentrant or not frozen)
    y = checkpoint(model, x, use_reentrant=reentrant)
    commit(model)
    later = checkpoint(model, draw(8, 3, seed=2).requires_grad_(), use_reentrant=reentrant)
    match = "layer 1 again, but (its running statistics were committed|there was no such forward)"
    if policy == "window" and not (reentrant or frozen):
        # Its graph holds what it used: see test_so_far.
        y.square().sum().backward()
    else:
        with pytest.raises(RuntimeError, match=match):
            y.square().sum().backward()
    # Those of the open window run again.
    later.square().sum().backward()
    assert model[1].window.count == 8


# Each two of them in all combinations: to compile all takes long.
@pytest.mark.parametrize(
    ("policy", "reentrant", "between"),
    [
        ("renorm", False, True),
        ("renorm", True, False),
        ("running", False, False),
        ("running", True, True),
        ("window", False, True),
        ("window", True, False),
    ],
)
def test_a_compiled_forward_that_runs_again_after_a_commit_says_so(policy: str, reentrant: bool, between: bool) -> None:
    torch._dynamo.reset()
    model = make_model(normalization=policy)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(draw(8, 3))
    commit(model)
    y = checkpoint(compiled, draw(8, 3, seed=1).requires_grad_(), use_reentrant=reentrant)
    commit(model)
    if between:
        later = checkpoint(compiled, draw(8, 3, seed=2).requires_grad_(), use_reentrant=reentrant)
    match = "again, but (its running statistics were committed|there was no such forward)"
    if policy == "window" and not between:
        # What it used is kept until the next window begins.
        y.square().sum().backward()
        return
    with pytest.raises(RuntimeError, match=match):
        y.square().sum().backward()
    if between:
        later.square().sum().backward()
        assert model[1].window.count == 8


@pytest.mark.parametrize("policy", ["renorm", "running"])
def test_graphs_from_before_a_commit_that_were_walked_do_no_harm(policy: str) -> None:
    """Losses that are kept hold the graphs of their windows."""
    kept, gradients = [], []
    for checkpointed in (True, False):
        model = make_model(normalization=policy)
        for step in range(3):
            x = draw(8, 3, seed=step).requires_grad_()
            y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
            y.square().sum().backward()
            kept.append(y)
            gradients.append(x.grad)
            commit(model)
    torch.testing.assert_close(gradients[:3], gradients[3:])


@pytest.mark.parametrize("policy", ["renorm", "window"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_discard_or_not_counted_does_not_change_what_a_recomputed_forward_uses(reentrant: bool, policy: str) -> None:
    model = make_model(normalization=policy)
    model(draw(8, 3))
    commit(model)
    model(draw(4, 3, seed=2))
    gradients = []
    for saves in (False, True):
        x = draw(8, 3, seed=1).requires_grad_()
        state = copy.deepcopy(model)
        with not_counted(state):
            y = checkpoint(state, x, use_reentrant=reentrant) if saves else state(x)
        syncaccum.discard(state)
        y.square().sum().backward()
        assert state[1].window.count == 0
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@SCRIPTED
@pytest.mark.parametrize("differentiate", [jacrev, jacfwd, grad])
def test_transforms_of_torch_func_agree_with_batch_norm_and_count_once(differentiate: Any) -> None:
    model = make_model(normalization="batch").double()
    plain = syncaccum.revert_sync_accum(copy.deepcopy(model))
    x = draw(5, 3).double()

    def forward(parameters: dict[str, Tensor]) -> Tensor:
        y = functional_call(model, parameters, (x,))
        return y.square().sum() if differentiate is grad else y

    ours = differentiate(forward)(dict(model.named_parameters()))["0.weight"]
    assert model[1].window.count == 5
    y = plain(x)
    y = y.square().sum() if differentiate is grad else y
    rows = [torch.autograd.grad(value, plain.get_parameter("0.weight"), retain_graph=True)[0] for value in y.flatten()]
    torch.testing.assert_close(ours, torch.stack(rows).view(ours.shape))


@SCRIPTED
def test_forward_mode_agrees_with_finite_differences() -> None:
    # Others take a part of the statistics for constants.
    model = make_model(normalization="batch").double()
    x, direction = draw(6, 3).double(), draw(6, 3, seed=1).double()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    again = jvp(model, (x,), (direction,))[1]
    # A central difference of step h is off by h^2 and by 1e-16 / h: some 1e-10 here.
    h = 1e-5
    difference = (model(x + h * direction) - model(x - h * direction)) / (2 * h)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(again, tangent)
    assert model[1].window.count == 4 * 6


# --- whose the window is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_loading_statistics_drops_the_window_that_belonged_to_others(assign: bool) -> None:
    model = make_model()
    model(draw(8, 3))
    commit(model)
    good = copy.deepcopy(model.state_dict())
    model(draw(8, 3) + 1e6)
    model.load_state_dict(copy.deepcopy(good), assign=assign)
    model(draw(8, 3, seed=1))
    assert commit(model).values == {"1": 8}
    assert model[1].running_mean.abs().max() < 100


def test_loading_something_else_keeps_the_window() -> None:
    model = make_model()
    model(draw(8, 3))
    model[0].load_state_dict(model[0].state_dict())
    model.load_state_dict({"0.weight": model[0].weight.detach()}, strict=False)
    assert model[1].window.count == 8


def test_a_saved_window_is_loaded_after_its_statistics() -> None:
    model = make_model()
    model(draw(8, 3))
    state, windows = copy.deepcopy(model.state_dict()), syncaccum.window_state_dict(model)
    other = make_model()
    other.load_state_dict(state)
    syncaccum.load_window_state_dict(other, windows)
    commit(model)
    commit(other)
    assert torch.equal(other.get_buffer("1.running_mean"), model.get_buffer("1.running_mean"))


@pytest.mark.parametrize("missing", ["running_mean", "both"])
def test_without_running_statistics_it_is_a_plain_batch_norm(missing: str) -> None:
    """TENT's recipe keeps track_running_stats on and takes the statistics away."""
    model, plain = make_model(), syncaccum.revert_sync_accum(make_model())
    for m in (model, plain):
        m[1].running_mean = None
        if missing == "both":
            m[1].running_var = None
    x = draw(8, 3)
    for mode in (True, False):
        if missing == "both":
            torch.testing.assert_close(model.train(mode)(x), plain.train(mode)(x))
            continue
        with pytest.raises((ValueError, RuntimeError)) as expected:
            plain.train(mode)(x)
        with pytest.raises(expected.type, match=re.escape(str(expected.value))):
            model.train(mode)(x)
    with pytest.raises(syncaccum.NoLayersError, match="tracks statistics"):
        commit(model)


# --- statistics that are needed before a commit ----------------------------------------------------------------


def test_an_eval_forward_before_the_first_commit_warns_once() -> None:
    model = convert_sync_accum(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
    model.eval()(draw(8, 3))
    model.train()(draw(8, 3))
    with pytest.warns(UserWarning, match=r"layer 0 was fed 1 micro-batches.*recalibrate\(model, batches\)") as record:
        model.eval()(draw(8, 3))
    model(draw(8, 3))
    assert len(record) == 1


def test_an_eval_forward_in_the_middle_of_a_later_window_does_not_warn() -> None:
    model = make_model()
    for _ in range(2):
        model.train()(draw(8, 3))
        commit(model)
    model(draw(8, 3))
    model.eval()(draw(8, 3))


@pytest.mark.parametrize("policy", ["renorm", "batch", "running"])
@pytest.mark.parametrize("sizes", [[24], [8, 8, 8], [2, 5, 17]])
def test_recalibrate_is_exact_over_any_split(policy: str, sizes: list[int]) -> None:
    data = draw(24, 3)
    model = convert_sync_accum(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3)), normalization=policy)
    for _ in range(3):
        model(data + 5)
        commit(model)
    model(data)
    model.eval()
    plain = nn.BatchNorm1d(4, momentum=None)
    plain(model[0](data))
    report = recalibrate(model, data.split(sizes))
    assert report.values == {"1": 24}
    torch.testing.assert_close(model[1].running_mean, plain.running_mean)
    torch.testing.assert_close(model[1].running_var, plain.running_var)
    assert (model[1].momentum, model[1].normalization, model[1].num_batches_tracked) == (0.3, policy, 1)
    assert model[1].window.count == 0
    assert not any(m.training for m in model.modules())
    assert model[0].weight.grad is None


def test_recalibrate_takes_what_loaders_give() -> None:
    data = draw(12, 3)
    model = make_model()
    recalibrate(model, [data])
    expected = model[1].running_var.clone()
    for batches, forward in (
        ([(data, "label")], None),
        ([{"input": data}], None),
        ([("label", data)], lambda batch: model(batch[1])),
    ):
        model[1].reset_running_stats()
        recalibrate(model, batches, forward)
        torch.testing.assert_close(model[1].running_var, expected)


def test_recalibrate_of_an_averaged_model() -> None:
    model = make_model()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    assert recalibrate(averaged, [draw(8, 3)]).layers == ("module.1",)
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("fault", ["loader", "nan", "one value", "no batches"])
def test_a_recalibration_that_fails_leaves_everything_as_it_was(fault: str) -> None:
    model = make_model()
    model(draw(8, 3))
    commit(model)
    model[0].eval()
    before = copy.deepcopy(model.state_dict())

    def batches() -> Any:
        if fault == "no batches":
            return
        yield draw(8, 3)
        if fault == "loader":
            raise OSError("disk gone")
        yield torch.full((8, 3), float("nan")) if fault == "nan" else draw(1, 3)

    if fault == "no batches":
        assert recalibrate(model, batches()).layers == ()
    else:
        errors = {"loader": OSError, "nan": syncaccum.NonFiniteStatisticsError, "one value": ValueError}
        with pytest.raises(errors[fault]):
            recalibrate(model, batches())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (model[1].momentum, model[1].normalization) == (0.1, make_model()[1].normalization)
    assert model.training
    assert not model[0].training
    model(draw(8, 3))
    model.eval()(draw(8, 3))  # it was committed before: no warning
    assert commit(model).values == {"1": 8}


@pytest.mark.parametrize("end", [commit, syncaccum.discard])
def test_a_new_window_knows_nothing_of_the_one_before(end: Callable[[nn.Module], Any]) -> None:
    model = make_model()
    layer: Any = model[1]
    model(draw(8, 3))
    layer.track_running_stats = False
    model(draw(8, 3))
    layer.track_running_stats = True
    fresh = make_model()[1]._accumulation
    end(model)
    for name in ("micro_batches", "is_open", "ran_untracked"):
        assert getattr(layer._accumulation, name) == getattr(fresh, name), name


# --- tools that know layers by their module --------------------------------------------------------------------


@pytest.mark.parametrize("made", ["converted", "direct", "subclass"])
def test_fx_traces_a_layer_as_a_leaf_and_the_traced_model_accumulates(made: str) -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(super().forward(x))

    layer = {"converted": nn.BatchNorm2d, "direct": SyncAccumBatchNorm, "subclass": Activated}[made](4)
    model = convert_sync_accum(nn.Sequential(nn.Conv2d(3, 4, 3), layer))
    traced = torch.fx.symbolic_trace(model).train()
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = draw(2, 3, 5, 5)
    # A second forward in a window may see another one: a copy has the first.
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(traced(x), expected)
    assert commit(traced).values == {"1": 18}
