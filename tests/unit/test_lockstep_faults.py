"""lockstep where something goes wrong beside it: other threads, interrupts, forwards that go elsewhere, other state."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm

from syncaccum import LockstepError, SyncAccumBatchNorm, convert_sync_accum, lockstep
from tests.unit.interrupts import Interrupt, Line, arrived, interrupt_at, traced_lines
from tests.unit.test_lockstep import assert_same_gradients

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def small(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), *between, nn.Linear(4, 4), nn.BatchNorm1d(4)).double()


def parts_of(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in sizes]


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A converted model and an unconverted one with the same state."""
    torch.manual_seed(0)
    reference, model = make().double(), make().double()
    model.load_state_dict(reference.state_dict())
    return convert_sync_accum(model), reference


# --- process-wide settings ------------------------------------------------------------------------------------


def overlap(begin: list[int], end: list[int], forwards: dict[int, Callable[[Any], Any]], model: Any) -> dict[int, Any]:
    """Locksteps in threads that begin and end in these orders; what they return or raise."""
    inside = {i: threading.Event() for i in begin}
    may_end = {i: threading.Event() for i in begin}
    outcomes: dict[int, Any] = {}

    def work(i: int) -> None:
        def forward(x: Tensor) -> Any:
            y = forwards[i](x)
            inside[i].set()
            may_end[i].wait(20)
            return y

        try:
            outcomes[i] = lockstep(model(i), forward, parts_of(3, 4, seed=i))
        except LockstepError as error:
            outcomes[i] = error
            inside[i].set()

    threads = {i: threading.Thread(target=work, args=(i,)) for i in begin}
    for i in begin:
        threads[i].start()
        assert inside[i].wait(20)
    for i in end:
        may_end[i].set()
        threads[i].join()
    return outcomes


ORDERS = [([0, 1], [0, 1]), ([0, 1], [1, 0]), ([0, 1, 2], [1, 0, 2])]


@pytest.mark.parametrize(("begin", "end"), ORDERS)
def test_overlapping_locksteps_leave_compile_as_it_was(begin: list[int], end: list[int]) -> None:
    models = {i: pair(small) for i in begin}
    outcomes = overlap(begin, end, {i: m for i, (m, _) in models.items()}, lambda i: models[i][0])
    for i, (_, reference) in models.items():
        torch.testing.assert_close(torch.cat(outcomes[i]), reference(torch.cat(parts_of(3, 4, seed=i))))
    assert eval_frame._stance.stance == "default"
    graphs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    assert graphs == [1]


def test_a_stance_of_the_users_own_comes_back() -> None:
    model, _ = pair(small)
    with torch.compiler.set_stance("eager_on_recompile"):
        overlap([0, 1], [0, 1], {0: model, 1: model}, lambda i: model)
        assert eval_frame._stance.stance == "eager_on_recompile"
    assert eval_frame._stance.stance == "default"


def test_overlapping_locksteps_of_one_model_are_both_exact() -> None:
    model, reference = pair(lambda: small(parametrizations.orthogonal(nn.Linear(4, 4))))
    outcomes = overlap([0, 1], [0, 1], {0: model, 1: model}, lambda i: model)
    for i in range(2):
        torch.testing.assert_close(torch.cat(outcomes[i]), reference(torch.cat(parts_of(3, 4, seed=i))))
    assert model[1].window.count == 14
    assert "forward" not in vars(model[2].parametrizations.weight)


@pytest.mark.parametrize("synchronise", [True, False])
def test_one_wrapper_in_two_overlapping_locksteps_is_refused_and_its_flags_come_back(
    group: None, synchronise: bool
) -> None:
    ddp = DistributedDataParallel(pair(small)[0])
    ddp.require_backward_grad_sync = synchronise
    outcomes = overlap([0, 1], [0, 1], {0: ddp, 1: ddp}, lambda i: ddp)
    assert len(outcomes[0]) == 2
    assert isinstance(outcomes[1], LockstepError)
    assert "one backward at a time" in str(outcomes[1])
    assert ddp.require_forward_param_sync
    assert ddp.require_backward_grad_sync is synchronise
    lockstep(ddp, ddp, parts_of(2, 2))


def test_after_a_lockstep_the_process_is_in_no_wrappers_forward(group: None) -> None:
    model, _ = pair(small)
    ddp = DistributedDataParallel(model)
    lockstep(ddp, ddp, parts_of(2, 2, 2))
    assert DistributedDataParallel._active_ddp_module is None
    # Else a wrapper that was not passed would be taken for one around.
    with pytest.raises(LockstepError, match="pass that as lockstep's model"):
        lockstep(model, ddp, parts_of(2, 2))
    assert DistributedDataParallel._active_ddp_module is None


# --- forwards that go elsewhere -------------------------------------------------------------------------------


def as_generator(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    yield model(x)


async def as_coroutine(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


async def as_async_generator(model: nn.Module, x: Tensor) -> AsyncIterator[Tensor]:
    yield model(x)


def half_lazy(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    y = model[:3](x)
    return map(model[3:], [y])


@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        (as_generator, "generator"),
        (as_coroutine, "coroutine"),
        (as_async_generator, "async_generator"),
        (half_lazy, "map"),
    ],
)
def test_a_forward_that_only_begins_is_refused(forward: Callable[[nn.Module, Tensor], Any], kind: str) -> None:
    model, _ = pair(small)
    begun = []

    def begin(x: Tensor) -> Any:
        begun.append(forward(model, x))
        return begun[-1]

    with pytest.raises(LockstepError, match=f"returned a {kind}.*return what comes out in the end"):
        lockstep(model, begin, parts_of(2, 3))
    assert model[1].window.count == 0
    for one in begun:
        if asyncio.iscoroutine(one):
            one.close()


def test_results_that_are_no_more_than_containers_are_taken() -> None:
    model, reference = pair(small)
    results = lockstep(model, lambda x: {"y": (model(x), None)}, parts_of(2, 3))
    torch.testing.assert_close(torch.cat([r["y"][0] for r in results]), reference(torch.cat(parts_of(2, 3))))


@pytest.mark.parametrize("own_training", [True, False], ids=["in training", "others in training"])
def test_another_model_is_refused(own_training: bool) -> None:
    model, other = pair(small)
    model[1].train(own_training)
    with pytest.raises(LockstepError, match=r"no micro-batch came to a layer.*calls another model"):
        lockstep(model, other, parts_of(2, 3))


def test_another_model_without_running_statistics_is_refused() -> None:
    model, other = pair(lambda: nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(LockstepError, match="no micro-batch came to a layer"):
        lockstep(model.eval(), other, parts_of(2, 3))


@pytest.mark.parametrize("in_pool", [slice(0, 5), slice(3, 5)], ids=["all of it", "its second half"])
def test_a_model_that_runs_in_another_thread_is_refused(in_pool: slice) -> None:
    model, _ = pair(small)
    with ThreadPoolExecutor(1) as pool:

        def forward(x: Tensor) -> Tensor:
            x = model[: in_pool.start](x)
            return pool.submit(model[in_pool], x).result()

        message = "no micro-batch came" if in_pool.start == 0 else "layer 3 ran in another thread meanwhile"
        with pytest.raises(LockstepError, match=message):
            lockstep(model, forward, parts_of(2, 3))


class Frozen(nn.BatchNorm1d):
    """Normalises with its running statistics, also in training."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


@pytest.mark.parametrize("kind", ["eval", "frozen class", "no layer on the way, in eval"])
def test_forwards_that_rightly_meet_nobody_are_taken(kind: str) -> None:
    model, reference = pair(
        lambda: nn.Sequential(nn.Linear(4, 4), (Frozen if kind == "frozen class" else nn.BatchNorm1d)(4))
    )
    if kind != "frozen class":
        model.eval()
        reference.eval()
    stop = 1 if kind.startswith("no layer") else 2
    outputs = lockstep(model, model[:stop], parts_of(2, 3))
    torch.testing.assert_close(torch.cat(outputs), reference[:stop](torch.cat(parts_of(2, 3))))
    assert model[1].window.count == 0
    assert not model[1]._forward_pre_hooks


# --- interrupts -----------------------------------------------------------------------------------------------


def interrupt(thread: int) -> None:
    """Send a signal to the main thread, and let it do what it does then, also on a busy machine."""
    arrived.clear()
    signal.pthread_kill(thread, signal.SIGUSR1)
    assert arrived.wait(20)
    time.sleep(0.1)


def names_of_lockstep_threads() -> list[str]:
    """Of those still alive; other tests leave threads of torch's compiler."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("syncaccum-lockstep")]


@pytest.mark.parametrize("interrupting", [0, 1, 2])
@pytest.mark.parametrize("times", [1, 3])
def test_nothing_runs_on_behind_an_interrupted_caller(
    group: None, interruptible: None, interrupting: int, times: int
) -> None:
    ddp = DistributedDataParallel(pair(small)[0])
    main = threading.get_ident()
    tails = []

    def forward(index: int) -> Tensor:
        y: Tensor = ddp(parts_of(3)[0])
        if index == interrupting:
            for _ in range(times):
                interrupt(main)  # which is in its join, or here
        tails.append(index)
        return y

    with pytest.raises(Interrupt):
        lockstep(ddp, forward, range(4))
    ran = list(tails)
    assert names_of_lockstep_threads() == []
    # The one that ran goes on to its end; those that waited do not.
    assert ran == list(range(interrupting + (interrupting > 0)))
    assert ddp.require_backward_grad_sync
    assert ddp.require_forward_param_sync
    assert ddp.module[1].window.count == 0
    time.sleep(0.05)
    assert tails == ran
    lockstep(ddp, ddp, parts_of(2, 2))


def test_an_interrupt_while_another_micro_batch_has_its_turn(interruptible: None) -> None:
    model, _ = pair(small)
    main = threading.get_ident()
    seen = []

    def forward(index: int) -> Tensor:
        y: Tensor = model[:2](parts_of(3)[0])
        if index == 1:  # the main thread waits at its gate
            interrupt(main)
        seen.append(index)
        return model[2:](y)

    with pytest.raises(Interrupt):
        lockstep(model, forward, range(3))
    assert seen == [0, 1]
    assert names_of_lockstep_threads() == []
    assert model[1].window.count == 0


def assert_nothing_is_left(model: nn.Module, values: int) -> int:
    """All windows with this lockstep, or none; settings as they were. Returns what is in the windows."""
    counts = [int(layer.window.count) for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]
    assert counts in ([0] * len(counts), [values] * len(counts))
    assert not [thread for thread in threading.enumerate() if "lockstep" in thread.name]
    assert eval_frame._stance.stance == "default"
    assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, parametrize.ParametrizationList))
    for layer in model.modules():
        if isinstance(layer, SyncAccumBatchNorm):
            layer.discard()
    return counts[0]


def test_an_interrupt_at_any_moment_leaves_all_or_nothing(interruptible: None) -> None:
    model, _ = pair(lambda: small(parametrizations.orthogonal(nn.Linear(4, 4)), nn.BatchNorm1d(4)))
    parts = parts_of(3, 3, 4)
    lockstep(model, model, parts)
    assert_nothing_is_left(model, 10)
    start = time.perf_counter()
    lockstep(model, model, parts)
    duration = time.perf_counter() - start
    assert_nothing_is_left(model, 10)
    delays = random.Random(0)
    main, interrupted = threading.get_ident(), 0
    with ThreadPoolExecutor(1) as elsewhere:

        def interrupt_after(seconds: float) -> None:
            time.sleep(seconds)
            signal.pthread_kill(main, signal.SIGUSR1)

        for _ in range(300):
            sent = elsewhere.submit(interrupt_after, delays.uniform(0, 1.2 * duration))
            try:
                lockstep(model, model, parts)
                sent.result()
                time.sleep(0)
            except Interrupt:
                interrupted += 1
            assert_nothing_is_left(model, 10)
    assert interrupted == 300


def test_an_interrupt_before_any_line_leaves_all_or_nothing(group: None) -> None:
    model, _ = pair(lambda: small(parametrizations.orthogonal(nn.Linear(4, 4))))
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    parts = parts_of(3, 3)

    def traced(arrive: Callable[[Line], None]) -> None:
        with traced_lines(arrive):
            lockstep(ddp, ddp, parts)

    lines: list[Line] = []
    traced(lines.append)
    assert_nothing_is_left(model, 6)

    kept: list[int] = []
    # A wait for threads to end asks again and again, the busier the machine the more often.
    for line in (line for line in lines if line.runs < 30):
        try:
            traced(interrupt_at(line))
        except Interrupt:
            kept.append(assert_nothing_is_left(model, 6))
        else:
            # This time, a wait had fewer rounds.
            assert assert_nothing_is_left(model, 6) == 6, line
        assert (ddp.require_forward_param_sync, ddp.require_backward_grad_sync) == (True, True)
    # Before some line nothing is kept, after it all.
    assert set(kept) == {0, 6}
    assert kept == sorted(kept)


# --- other state ----------------------------------------------------------------------------------------------


def assert_equals_the_whole_batch(
    make: Callable[[], nn.Module], forward: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """Three steps, each against one on torch.cat: outputs, gradients, and buffers that the forward changes."""
    model, reference = pair(make)
    for step in range(3):
        parts = parts_of(3, 1, 4, seed=step)
        model.zero_grad()
        reference.zero_grad()
        outputs = lockstep(model, lambda x: forward(model, x), parts)
        expected = forward(reference, torch.cat(parts))
        torch.testing.assert_close(torch.cat(outputs), expected)
        torch.cat(outputs).square().sum().backward()
        expected.square().sum().backward()
        assert_same_gradients(model, reference)
        for (name, b), c in zip(model.named_buffers(), reference.buffers(), strict=True):
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                torch.testing.assert_close(b, c)


class Counting(nn.Module):
    """A parametrization that counts its evaluations, and depends on how many there were."""

    evaluations: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("evaluations", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        self.evaluations += 1
        return weight * (1 + self.evaluations.clone())


def make_spectral() -> nn.Module:
    return small(parametrizations.spectral_norm(nn.Linear(4, 4)))


def make_counting() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Counting())
    parametrize.register_parametrization(layer, "bias", Counting())
    return small(layer)


@pytest.mark.parametrize("make", [make_spectral, make_counting])
def test_parametrizations_run_once_for_all_micro_batches(make: Callable[[], nn.Module]) -> None:
    assert_equals_the_whole_batch(make, lambda model, x: model(x))


@pytest.mark.parametrize("make", [make_spectral, make_counting])
def test_parametrizations_run_once_for_each_pass_of_a_forward(make: Callable[[], nn.Module]) -> None:
    assert_equals_the_whole_batch(make, lambda model, x: model(x) - model(x.flip(1)).exp())


@pytest.mark.parametrize("make", [make_spectral, make_counting])
def test_a_pass_without_gradients_before_does_not_take_them_from_the_next(make: Callable[[], nn.Module]) -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = model(x + 1)
        return model(x) - target

    assert_equals_the_whole_batch(make, forward)


def test_parametrizations_are_the_users_own_again_afterwards() -> None:
    model, reference = pair(make_counting)
    lockstep(model, model, parts_of(2, 3))
    reference(torch.cat(parts_of(2, 3)))
    for _ in range(2):
        torch.testing.assert_close(model[2].weight, reference[2].weight)
    assert model[2].parametrizations.weight[0].evaluations == reference[2].parametrizations.weight[0].evaluations


def test_micro_batches_that_compute_a_weight_with_and_without_gradients() -> None:
    model, _ = pair(make_spectral)

    def forward(index: int) -> Tensor:
        with torch.set_grad_enabled(index == 0):
            weight = model[2].weight
        return model[:2](parts_of(3)[0]) @ weight

    with pytest.raises(LockstepError, match=r"the weight 2\.parametrizations\.weight with and without gradients"):
        lockstep(model, forward, range(2))


class Codebook(nn.Module):
    """Assigns a new tensor to its buffer, as vector quantisers do."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        return x - self.mean


class Offset(nn.Module):
    """Has a buffer, and leaves it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


class OwnCounter(nn.BatchNorm1d):
    """Counts its calls, beside what nn.BatchNorm counts."""

    calls: Tensor

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


OTHERS: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: old_spectral_norm(nn.Linear(4, 4)), r"2 \(Linear\)"),
    (lambda: Codebook(), r"2 \(Codebook\)"),
    (lambda: nn.Sequential(nn.ReLU(), Codebook()), r"2\.1 \(Codebook\)"),
    (lambda: OwnCounter(4), r"2 \(.*OwnCounter\)"),
]


@pytest.mark.parametrize(("make", "name"), OTHERS)
def test_other_modules_whose_buffers_change_are_named_once(make: Callable[[], nn.Module], name: str) -> None:
    model, _ = pair(lambda: small(make()))
    with pytest.warns(UserWarning, match=f"but {name} normalise by micro-batch, or have buffers"):
        lockstep(model, model, parts_of(3, 3, 2))
    lockstep(model, model, parts_of(3, 3))  # warnings are errors here


@pytest.mark.parametrize("tracks", [True, False])
def test_a_batch_norm_that_was_not_converted_is_named(tracks: bool) -> None:
    model, _ = pair(small)
    model.insert(2, nn.BatchNorm1d(4, track_running_stats=tracks).double())
    with pytest.warns(UserWarning, match=r"but 2 \(BatchNorm1d\) normalise by micro-batch"):
        lockstep(model, model, parts_of(3, 3))


@pytest.mark.parametrize("case", ["one micro-batch", "a buffer left alone", "parametrizations", "DDP broadcasts"])
def test_no_word_where_all_is_exact(case: str, group: None) -> None:
    layer = {"a buffer left alone": Offset, "DDP broadcasts": Offset, "parametrizations": make_spectral}.get(
        case, Codebook
    )
    model: Any = pair(lambda: small(layer()))[0]
    if case == "DDP broadcasts":
        model = DistributedDataParallel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lockstep(model, model, parts_of(*([6] if case == "one micro-batch" else [3, 3])))


# --- threads --------------------------------------------------------------------------------------------------

# In a process of its own, which gives up root: a process that OpenMP ends takes pytest with it.
# All are forked from one that has imported torch, and has run nothing yet.
UNDER_A_LIMIT = """
import os, resource, sys
import torch
from torch import nn
from syncaccum import LockstepError, convert_sync_accum, lockstep

def try_limit(count, team, limit):
    torch.set_num_threads(team)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))
    model = convert_sync_accum(net)
    parts = [torch.randn(4, 8, 16, 16) for _ in range(count)]
    expected = torch.cat(lockstep(model, model, parts))
    # Of a user that nobody else is: its threads are counted.
    os.setuid(54321)
    resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
    try:
        outputs = torch.cat(lockstep(model, model, parts))
        print("exact" if torch.allclose(outputs, expected, atol=1e-5) else "different", flush=True)
    except LockstepError as error:
        print(error, flush=True)

for limits in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try_limit(*map(int, limits.split(",")))
        os._exit(0)
    print(f"status {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
"""
# Micro-batches, OpenMP threads, the limit, and what comes of it.
LIMITS = [
    (12, 8, 60, "exact"),  # 84 threads in teams of their own
    (3, 4, 1000, "exact"),
    (12, 8, 25, r"12 micro-batches with 8 OpenMP threads .* need 18 more threads"),
    (24, 1, 20, r"24 micro-batches need 23 threads, and the system refuses"),
]


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid() != 0, reason="limits threads of another user")
def test_a_limit_of_threads_is_kept_or_named() -> None:
    arguments = [f"{count},{team},{limit}" for count, team, limit, _ in LIMITS]
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, *arguments], capture_output=True, text=True, timeout=200
    )
    *printed, rest = re.split(r"status 0\n", done.stdout)
    assert (done.returncode, rest) == (0, ""), done.stdout + done.stderr
    for (*limits, says), said in zip(LIMITS, printed, strict=True):
        assert re.search(says, said), f"{limits}: {said}"
