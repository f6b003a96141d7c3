"""commit_on_step in one process: which steps it sees, and what it does after each."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import syncaccum.window.step_hook as step_hook
from syncaccum import (
    NonFiniteStatisticsError,
    SyncAccumBatchNorm,
    commit_on_step,
    convert_sync_accum,
    discard,
)
from syncaccum.errors import NoLayersError, TooFewValuesError
from syncaccum.window.commit import commit_layers
from tests.oracle import assert_same_statistics, reference
from tests.unit.wrappers import (
    SAM,
    Alternating,
    Bare,
    Calling,
    Container,
    EverySecond,
    Holder,
    Lookahead,
    Own,
    Several,
    Stepless,
    Subclass,
)


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The layers of each commit that a step made, also of those that found no data: on ranks each is an all-reduce."""
    made: list[list[str]] = []

    def record(layers: Any, *args: Any) -> Any:
        made.append([name for name, _ in layers])
        return commit_layers(layers, *args)

    monkeypatch.setattr(step_hook, "commit_layers", record)
    return made


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return convert_sync_accum(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double())


def make_micro_batch(seed: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backward(model: nn.Module, seed: int = 0) -> None:
    model(make_micro_batch(seed)).square().mean().backward()


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1)


def test_each_step_commits_its_window_once_until_removed(commits: list[list[str]]) -> None:
    model = make_model()
    optimizer = sgd(model)
    handle = commit_on_step(model, optimizer)
    seen: list[list[Tensor]] = []
    model[1].register_forward_pre_hook(lambda _, inputs: seen[-1].append(inputs[0].detach()))
    for step in range(3):
        seen.append([])
        for index in range(1 + step):
            backward(model, 10 * step + index)
        optimizer.step()
        optimizer.zero_grad()
    # Sums of float64 values in another order.
    assert_same_statistics(model[1], reference(seen, 3), rtol=1e-12, atol=1e-12)
    handle.remove()
    seen.append([])
    backward(model)
    optimizer.step()
    assert commits == [["1"]] * 3
    assert model[1].window.count == 4


def test_the_handle_is_a_context(commits: list[list[str]]) -> None:
    model = make_model()
    optimizer = sgd(model)
    backward(model)
    with commit_on_step(model, optimizer):
        optimizer.step()
    optimizer.step()
    assert len(commits) == 1


def test_the_handle_keeps_the_last_commits_report() -> None:
    model = make_model()
    optimizer = sgd(model)
    handle = commit_on_step(model, optimizer)
    reports: list[Any] = [handle.report]
    for micro_batches in (2, 1):
        for _ in range(micro_batches):
            backward(model)
        optimizer.step()
        reports.append(handle.report)
    assert reports[0] is None
    assert [report.values for report in reports[1:]] == [{"1": 8}, {"1": 4}]


# --- which steps are seen ---------------------------------------------------------------------------------------


def _two_calls(optimizer: Any) -> None:
    optimizer.first_step()
    optimizer.second_step()


@pytest.mark.parametrize(
    ("make", "step"),
    [
        pytest.param(sgd, None, id="plain"),
        pytest.param(lambda m: Adam(m.parameters(), fused=True), None, id="fused"),
        pytest.param(lambda m: Calling(m.parameters(), lr=0.1), None, id="calls its parent's step"),
        pytest.param(lambda m: Bare(m.parameters()), None, id="no Optimizer.__init__"),
        pytest.param(lambda m: Lookahead(sgd(m)), None, id="timm's Lookahead"),
        pytest.param(lambda m: Lookahead(Calling(m.parameters(), lr=0.1)), None, id="Lookahead of a subclass"),
        pytest.param(lambda m: SAM(m.parameters(), lr=0.1), _two_calls, id="SAM"),
        pytest.param(lambda m: Holder("opt", sgd(m)), None, id="fastai's OptimWrapper"),
        pytest.param(lambda m: Holder("optim", sgd(m)), None, id="apex's LARC"),
        pytest.param(lambda m: Subclass("optimizer", sgd(m)), None, id="accelerate's"),
        pytest.param(lambda m: Subclass("_base_optimizer", sgd(m)), None, id="_base_optimizer"),
        pytest.param(lambda m: Subclass("_Mine__inner", sgd(m)), None, id="a name of its own"),
        pytest.param(lambda m: Subclass("optimizer", Holder("optim", sgd(m))), None, id="accelerate's of apex's"),
        pytest.param(lambda m: Holder("opt", Holder("base", Lookahead(sgd(m)))), None, id="three deep"),
        pytest.param(lambda m: Several(SGD(m[0].parameters()), SGD(m[1].parameters())), None, id="several in one"),
        pytest.param(lambda m: Container(SGD(m[0].parameters()), SGD(m[1].parameters())), None, id="torchtitan's"),
        pytest.param(lambda m: Alternating(sgd(m), Adam(m.parameters())), None, id="one of two at a time"),
    ],
)
def test_one_commit_for_each_real_step(
    commits: list[list[str]], make: Callable[[nn.Module], Any], step: Callable[[Any], None] | None
) -> None:
    model = make_model()
    optimizer = make(model)
    handle = commit_on_step(model, optimizer)
    for index in range(3):
        backward(model, index)
        before = [p.detach().clone() for p in model.parameters()]
        step(optimizer) if step else optimizer.step()
        assert not all(torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))
    assert commits == [["1"]] * 3
    assert model[1].num_batches_tracked == 3
    handle.remove()
    step(optimizer) if step else optimizer.step()
    assert len(commits) == 3


def test_a_wrapper_that_leaves_out_steps_commits_in_the_others(commits: list[list[str]]) -> None:
    model = make_model()
    optimizer = EverySecond("optimizer", sgd(model))
    commit_on_step(model, optimizer)
    for _ in range(4):
        backward(model)
        optimizer.step()
    assert len(commits) == 2


def test_an_optimizer_of_other_parameters_in_an_attribute_is_not_taken_for_the_one_inside(
    commits: list[list[str]],
) -> None:
    model = make_model()
    optimizer = sgd(model)
    optimizer.other = SGD([nn.Parameter(torch.ones(1))])  # type: ignore[attr-defined]
    optimizer.itself = optimizer  # type: ignore[attr-defined]
    commit_on_step(model, optimizer)
    backward(model)
    optimizer.step()
    assert len(commits) == 1


@pytest.mark.parametrize("calls_original", [True, False])
@pytest.mark.parametrize("bound", [True, False])
def test_a_step_that_was_replaced_on_the_instance_is_seen(
    commits: list[list[str]], calls_original: bool, bound: bool
) -> None:
    model = make_model()
    optimizer = sgd(model)
    original, taken = optimizer.step, []

    def replaced(*args: Any, closure: Any = None) -> str:
        taken.append(closure)
        if calls_original:
            original()
        return "result"

    optimizer.step = types.MethodType(replaced, optimizer) if bound else replaced  # type: ignore[method-assign]
    commit_on_step(model, optimizer)
    commit_on_step(model, optimizer)
    backward(model)
    assert optimizer.step(closure=None) == "result"
    assert len(taken) == len(commits) == 1


def test_a_step_that_was_replaced_on_the_class_is_seen(commits: list[list[str]]) -> None:
    class Mine(SGD):
        pass

    model = make_model()
    optimizer = Mine(model.parameters(), lr=0.1)
    Mine.step = lambda self, closure=None: None  # type: ignore[method-assign]
    commit_on_step(model, optimizer)
    optimizer.step()
    assert len(commits) == 1


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_a_scheduler_and_the_hook_get_along(commits: list[list[str]], scheduler_first: bool) -> None:
    model = make_model()
    optimizer = sgd(model)
    if not scheduler_first:
        commit_on_step(model, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    if scheduler_first:
        commit_on_step(model, optimizer)
    for _ in range(2):
        backward(model)
        optimizer.step()
        scheduler.step()  # warns, which is an error here, if it believes that the step was replaced or left out
    assert len(commits) == 2


# torch's own, where its compiler first meets an optimizer.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_step_commits(commits: list[list[str]]) -> None:
    model = make_model()
    optimizer = sgd(model)
    commit_on_step(model, optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        backward(model)
        step()
    assert commits == [["1"]] * 3
    assert model[1].num_batches_tracked == 3


def test_a_closure_is_part_of_its_step() -> None:
    model = make_model()
    optimizer = Calling(model.parameters(), lr=0.1)
    commit_on_step(model, optimizer)

    def closure() -> Tensor:
        loss: Tensor = model(make_micro_batch(1)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert model[1].num_batches_tracked == 1
    assert model[1].window.count == 0


def test_a_step_that_fails_does_not_commit_and_the_next_one_does(commits: list[list[str]]) -> None:
    model = make_model()
    optimizer = Calling(model.parameters(), lr=0.1)
    commit_on_step(model, optimizer)
    backward(model)

    def fail() -> float:
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(fail)
    assert commits == []
    optimizer.step()
    assert len(commits) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_of_the_optimizer_does_not_carry_the_hook(
    commits: list[list[str]], copied: Callable[[Optimizer], Optimizer]
) -> None:
    model = make_model()
    optimizer = sgd(model)
    commit_on_step(model, optimizer)
    copied(optimizer).step()
    assert commits == []


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda m: Own(m.parameters()), lambda m: Holder("opt", Own(m.parameters())), lambda m: m, lambda m: None]
)
def test_what_torchs_hooks_cannot_see_is_refused_with_the_remedy(make: Callable[[nn.Module], Any]) -> None:
    model = make_model()
    for given in (make(model), [sgd(model), make(model)]):
        with pytest.raises(TypeError, match=r"call syncaccum\.commit\(model\) after each of its steps"):
            commit_on_step(model, given)


def test_an_optimizer_without_a_step_is_refused_with_the_remedy() -> None:
    model = make_model()
    with pytest.raises(TypeError, match=r"Stepless has no step .* call syncaccum\.commit\(model\)"):
        commit_on_step(model, Stepless(model.parameters()))


@pytest.mark.parametrize("nothing", [[], (), {}])
def test_no_optimizer_at_all_is_refused(nothing: Any) -> None:
    with pytest.raises(ValueError, match="no optimizer was given"):
        commit_on_step(make_model(), nothing)


def test_an_unconverted_model_is_refused_at_once() -> None:
    model = nn.BatchNorm1d(3)
    with pytest.raises(NoLayersError):
        commit_on_step(model, sgd(model))


def test_an_unknown_policy_is_refused_and_leaves_the_earlier_hook(commits: list[list[str]]) -> None:
    model = make_model()
    optimizer = sgd(model)
    commit_on_step(model, optimizer)
    with pytest.raises(ValueError, match="on_nonfinite must be one of 'raise', 'discard', got 'skip'"):
        commit_on_step(model, optimizer, on_nonfinite="skip")  # type: ignore[arg-type]
    optimizer.step()
    assert len(commits) == 1


# --- several optimizers -----------------------------------------------------------------------------------------


def halves(model: nn.Module) -> tuple[SGD, SGD]:
    return SGD(model[0].parameters(), lr=0.1), SGD(model[1].parameters(), lr=0.1)


@pytest.mark.parametrize("collect", [list, tuple, set, lambda pair: dict(zip("ab", pair, strict=True))])
def test_several_optimizers_commit_once_a_round_in_any_order(
    commits: list[list[str]], collect: Callable[[Any], Any]
) -> None:
    model = make_model()
    first, second = halves(model)
    handle = commit_on_step(model, collect((first, second)))
    for order in ((first, second), (second, first), (second, first)):
        backward(model)
        for index, optimizer in enumerate(order):
            assert model[1].window.count == 4
            optimizer.step()
            assert model[1].window.count == (4, 0)[index]
    assert commits == [["1"]] * 3
    handle.remove()
    first.step()
    second.step()
    assert len(commits) == 3


def test_uneven_steps_lose_no_micro_batch_and_commit_none_twice(commits: list[list[str]]) -> None:
    model = make_model()
    critic, generator = halves(model)
    commit_on_step(model, [critic, generator])
    seen: list[Tensor] = []
    model[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    expected = []
    for _ in range(2):
        seen.clear()
        for index, optimizer in enumerate((critic, critic, critic, generator)):
            backward(model, index)
            optimizer.step()
        expected.append(list(seen))
    assert len(commits) == 2
    # Sums of float64 values in another order.
    assert_same_statistics(model[1], reference(expected, 3), rtol=1e-12, atol=1e-12)


def test_a_round_waits_for_a_step_that_was_skipped(commits: list[list[str]]) -> None:
    model = make_model()
    first, second = halves(model)
    commit_on_step(model, [first, second])
    windows = []
    layer = model[1]
    assert isinstance(layer, SyncAccumBatchNorm)
    for skips in (True, False, False):
        backward(model)
        if not skips:
            first.step()
        second.step()
        windows.append(int(layer.window.count))
    # The step left out comes with the next micro-batches: from there the first one's step ends each round.
    assert windows == [4, 0, 0]
    assert len(commits) == 2


def test_one_optimizer_given_twice_is_one(commits: list[list[str]]) -> None:
    model = make_model()
    optimizer = sgd(model)
    commit_on_step(model, [optimizer, Holder("opt", optimizer), [optimizer]])
    optimizer.step()
    assert len(commits) == 1


def test_a_round_does_not_wait_for_an_optimizer_that_is_gone(commits: list[list[str]]) -> None:
    model = make_model()
    first, second = halves(model)
    commit_on_step(model, [first, second])
    del second
    gc.collect()
    first.step()
    assert len(commits) == 1


def test_a_round_that_never_ends_warns_once(commits: list[list[str]]) -> None:
    model = make_model()
    first, second = halves(model)
    commit_on_step(model, [first, second])
    for _ in range(199):
        first.step()
    with pytest.warns(UserWarning, match="for each submodule with its own optimizer"):
        first.step()
    for _ in range(200):
        first.step()  # a warning would be an error here
    assert commits == []


def test_a_gan_commits_each_network_after_its_own_optimizers_steps(commits: list[list[str]]) -> None:
    generator, critic = make_model(), make_model()
    steps = []
    for network in (generator, critic):
        optimizer = sgd(network)
        commit_on_step(network, optimizer)
        steps.append(optimizer.step)
    for _ in range(2):
        critic(generator(make_micro_batch(0)).detach()).square().mean().backward()
        steps[1]()
        critic(generator(make_micro_batch(1))).square().mean().backward()
        steps[0]()
    assert len(commits) == 4
    assert generator[1].num_batches_tracked == critic[1].num_batches_tracked == 2
    assert (generator[1].window.count, critic[1].window.count) == (0, 4)


# --- a second call ----------------------------------------------------------------------------------------------


def test_a_second_call_for_the_same_model_and_optimizer_replaces_the_first(commits: list[list[str]]) -> None:
    model = make_model()
    optimizer = sgd(model)
    first = commit_on_step(model, optimizer)
    second = commit_on_step(nn.Sequential(model), Holder("opt", optimizer))  # both wrapped anew, as in a retry
    optimizer.step()
    assert commits == [["0.1"]]
    first.remove()
    optimizer.step()
    assert len(commits) == 2
    second.remove()
    optimizer.step()
    assert len(commits) == 2


def test_a_call_with_more_layers_or_one_more_optimizer_replaces_the_first(commits: list[list[str]]) -> None:
    model, more = make_model(), make_model()
    optimizer, another = sgd(model), sgd(more)
    commit_on_step(model, optimizer)
    commit_on_step(nn.ModuleList([model, more]), [optimizer, another])
    optimizer.step()
    assert commits == []
    another.step()
    assert commits == [["0.1", "1.1"]]


def test_calls_for_other_optimizers_or_other_layers_stay(commits: list[list[str]]) -> None:
    model, other = make_model(), make_model()
    first, second = sgd(model), sgd(model)
    commit_on_step(model, first)
    commit_on_step(model, second)
    commit_on_step(other, first)
    second.step()
    assert len(commits) == 1
    first.step()
    assert len(commits) == 3


def test_nothing_keeps_a_model_alive_that_has_gone_with_its_optimizer() -> None:
    model: Any = make_model()
    model.optimizer = sgd(model)
    commit_on_step(model, model.optimizer)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- skipped steps, NaN and Inf -----------------------------------------------------------------------------------


def overflow(model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
    """A step whose forward and gradients are infinite."""
    scaler.scale(model(make_micro_batch(0) * torch.inf).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update(1.0)
    optimizer.zero_grad()


def test_a_step_that_grad_scaler_skips_keeps_the_window_for_the_next() -> None:
    layer = SyncAccumBatchNorm(3)
    optimizer = sgd(layer)
    commit_on_step(layer, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    scaler.scale(layer(torch.randn(4, 3)).square().sum() * 1e5).backward()
    scaler.step(optimizer)
    scaler.update(1.0)
    optimizer.zero_grad()
    assert layer.num_batches_tracked == 0
    assert layer.window.count == 4
    scaler.scale(layer(torch.randn(4, 3)).square().sum()).backward()
    scaler.step(optimizer)
    assert layer.num_batches_tracked == 1
    assert layer.window.count == 0


def test_a_fused_optimizers_skipped_step_commits() -> None:
    layer = SyncAccumBatchNorm(3)
    optimizer = SGD(layer.parameters(), lr=0.1, fused=True)
    commit_on_step(layer, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    scaler.scale(layer(torch.randn(4, 3)).square().sum() * 1e5).backward()
    scaler.step(optimizer)
    assert torch.equal(layer.weight, torch.ones(3))
    assert layer.num_batches_tracked == 1


def test_training_goes_on_after_an_overflow_that_grad_scaler_skips_under_discard() -> None:
    model = make_model()
    optimizer = sgd(model)
    commit_on_step(model, optimizer, on_nonfinite="discard")
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    before = [b.clone() for b in model.buffers()]
    overflow(model, optimizer, scaler)
    assert model[1].window.count == 4
    backward(model)
    with pytest.warns(UserWarning, match=r"NaN or Inf in the window \(rank 0: 1\): it was discarded") as caught:
        scaler.step(optimizer)
    assert len(caught) == 1
    assert model[1].window.count == 0
    assert all(torch.equal(b, now) for b, now in zip(before, model.buffers(), strict=True))
    scaler.update()
    optimizer.zero_grad()
    seen: list[Tensor] = []
    model[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    backward(model)
    scaler.step(optimizer)
    # Sums of float64 values in another order.
    assert_same_statistics(model[1], reference([seen], 3), rtol=1e-12, atol=1e-12)


def test_a_window_with_nan_raises_after_the_weights_have_moved_until_it_is_discarded() -> None:
    model = make_model()
    optimizer = sgd(model)
    commit_on_step(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    overflow(model, optimizer, scaler)
    for _ in range(2):
        backward(model)
        weight = model[0].weight.detach().clone()
        with pytest.raises(NonFiniteStatisticsError, match="window is kept"):
            optimizer.step()
        assert not torch.equal(model.get_parameter("0.weight"), weight)
    discard(model)
    backward(model)
    optimizer.step()
    assert model[1].num_batches_tracked == 1


def test_discard_drops_the_windows_of_all_layers_when_one_has_nan() -> None:
    model = nn.ModuleDict({"good": SyncAccumBatchNorm(3), "bad": SyncAccumBatchNorm(3)})
    optimizer = sgd(model)
    commit_on_step(model, optimizer, on_nonfinite="discard")
    model["good"](torch.ones(2, 3))
    model["bad"](torch.full((2, 3), torch.nan))
    with pytest.warns(UserWarning, match=r"\(rank 0: bad\)"):
        optimizer.step()
    for layer in model.values():
        assert layer.window.count == layer.num_batches_tracked == 0


def test_discard_raises_other_errors_and_keeps_their_window() -> None:
    layer = SyncAccumBatchNorm(3)
    optimizer = sgd(layer)
    commit_on_step(layer, optimizer, on_nonfinite="discard")
    layer(torch.ones(1, 3))
    with pytest.raises(TooFewValuesError):
        optimizer.step()
    assert layer.window.count == 1
