"""Lightning's Trainer with SyncAccumCallback: commits are its steps, and statistics those of whole windows."""

from __future__ import annotations

import csv
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from syncaccum import NoLayersError, SyncAccumBatchNorm, commit, commit_on_step, convert_sync_accum, lookahead
from syncaccum.integrations.lightning import SyncAccumCallback
from tests.oracle import as_columns, assert_same_statistics, gather_global_batch, make_reference
from tests.ranks import Rank, on_ranks

# Lightning's advice for large jobs, and what torch deprecated since.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

WINDOW, MICRO_BATCHES, SIZE = 4, 10, 3


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lr_find writes where it runs."""
    monkeypatch.chdir(tmp_path)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2))
    return net.double()


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x[:, 1:].sin()).square().mean()


def make_optimizer(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


class Network(LightningModule):  # type: ignore[misc] # not installed where types are checked
    """Trains, and keeps what its BatchNorm layers saw, and after which micro-batch there was a commit."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.layers: list[SyncAccumBatchNorm] = []
        self.seen: list[list[Tensor]] = []
        self.windows: list[int] = []
        self.open: list[list[Tensor]] = []
        self.references: list[nn.BatchNorm1d] = []

    def configure_optimizers(self) -> Any:
        return make_optimizer(self)

    def on_train_start(self) -> None:
        if not self.layers:
            self.layers = [layer for layer in self.modules() if isinstance(layer, SyncAccumBatchNorm)]
            for layer in self.layers:
                layer.register_forward_pre_hook(lambda _, inputs: self.seen[-1].append(as_columns(inputs[0])))
        self.references = [make_reference(layer) for layer in self.layers]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append([])
        return loss_of(self.net, batch[0])

    def on_train_batch_end(self, *_: Any) -> None:
        """Every commit is checked when it was made. Collective."""
        self.open.append(self.seen.pop())
        if self.layers[0].num_batches_tracked == self.references[0].num_batches_tracked:
            return
        for layer, expected, *inputs in zip(self.layers, self.references, *self.open, strict=True):
            expected(gather_global_batch(inputs))
            assert_same_statistics(layer, expected)
            assert layer.window.count == 0
        self.windows.append(len(self.open))
        self.open = []


def make_data(ranks: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ranks * MICRO_BATCHES * SIZE, 3, generator=generator, dtype=torch.float64) * 2 + 1


def make_loader(ranks: int = 1, *, size: int = SIZE) -> Any:
    """In order: the ranks' batches are next to each other in the data."""
    data = TensorDataset(make_data(ranks))
    return DataLoader(data, size, sampler=DistributedSampler(data, shuffle=False) if ranks > 1 else None)


def make_trainer(callback: Any, ranks: int = 1, **settings: Any) -> Trainer:
    settings = {"max_epochs": 2, "accumulate_grad_batches": WINDOW, "logger": False, **settings}
    if ranks > 1:
        # The ranks are there, and their group is.
        settings = {
            "strategy": "ddp",
            "plugins": [LightningEnvironment()],
            "use_distributed_sampler": False,
            **settings,
        }
    callbacks = callback if isinstance(callback, list) else [callback]
    return Trainer(
        accelerator="cpu", devices=ranks, callbacks=callbacks, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip


@contextmanager
def launched(rank: Rank) -> Iterator[None]:
    """What a launcher tells Lightning."""
    told = {"LOCAL_RANK": rank.index, "NODE_RANK": 0, "WORLD_SIZE": rank.size}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice: see pytestmark
        for name, value in told.items():
            patch.setenv(name, str(value))
        yield
        gc.collect()  # DDP's reference cycles keep gloo busy after the group is gone


def check_fit(ranks: int) -> None:
    network = Network()
    callback = SyncAccumCallback()
    trainer = make_trainer(callback, ranks)
    assert callback.report is None
    trainer.fit(network, make_loader(ranks))
    assert network.windows == [4, 4, 2] * 2
    assert trainer.global_step == len(network.windows)
    assert callback.report is not None
    assert callback.report.ranks == ranks
    assert callback.report.values["net.1"] == ranks * 2 * SIZE  # of the short window at the end


def test_each_step_commits_its_window() -> None:
    check_fit(1)


@on_ranks(2)
def test_each_step_commits_the_window_of_two_ranks(rank: Rank) -> None:
    with launched(rank):
        check_fit(rank.size)


class Overflowing(Network):
    """Its second window's gradients are too large for float16, once."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if 4 <= batch_idx < 8 else loss


def test_a_step_that_gradient_scaling_skips_leaves_its_window_to_the_next() -> None:
    network = Overflowing()
    callback = SyncAccumCallback()
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1.0))
    make_trainer(callback, max_epochs=1, plugins=[precision]).fit(network, make_loader())
    assert network.windows == [4, 6]
    assert callback.report is not None
    assert callback.report.values["net.1"] == 6 * SIZE


class StoppedError(Exception):
    """Ends a fit."""


class SavedInMidWindow(Network):
    """Saves a checkpoint after six micro-batches, two of a window, and fails."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_batch_end(self, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        if len(self.windows) == 1 and len(self.open) == 2:
            self.trainer.save_checkpoint(self.path)
            raise StoppedError


def check_resume(ranks: int, path: Path) -> None:
    first = SavedInMidWindow(path)
    with pytest.raises(StoppedError):
        make_trainer(SyncAccumCallback(), ranks).fit(first, make_loader(ranks))
    resumed = Network()
    # What the checkpoint's window has seen belongs to the next commit.
    resumed.open = first.open
    make_trainer(SyncAccumCallback(), ranks).fit(resumed, make_loader(ranks), ckpt_path=path)
    assert resumed.windows == [4, 2, 4, 4, 2]
    assert all(layer.num_batches_tracked == 6 for layer in resumed.layers)


def test_a_fit_resumes_in_the_middle_of_a_window(tmp_path: Path) -> None:
    check_resume(1, tmp_path / "saved.ckpt")


@on_ranks(2)
def test_two_ranks_resume_in_the_middle_of_a_window(rank: Rank) -> None:
    with launched(rank):
        check_resume(rank.size, rank.folder / "saved.ckpt")


def test_a_fit_after_an_exception_starts_with_empty_windows(tmp_path: Path) -> None:
    network = SavedInMidWindow(tmp_path / "saved.ckpt")
    callback = SyncAccumCallback()
    with pytest.raises(StoppedError):
        make_trainer(callback).fit(network, make_loader())
    assert network.layers[0].window.count == 2 * SIZE
    network.open, network.windows = [], [0, 0]
    make_trainer(callback, max_epochs=1).fit(network, make_loader())
    assert network.windows[2:] == [4, 4, 2]


@on_ranks(2)
def test_sync_batchnorm_is_named_as_a_conflict(rank: Rank) -> None:
    with launched(rank), pytest.raises(ValueError, match=r"sync_batchnorm=True.*leave it out"):
        make_trainer(SyncAccumCallback(), rank.size, sync_batchnorm=True).fit(Network(), make_loader(rank.size))


class Plain(LightningModule):  # type: ignore[misc] # not installed where types are checked
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        return make_optimizer(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": loss_of(self.net, batch[0]), "examples": len(batch[0])}

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        assert sum(outputs["examples"]) in (WINDOW * SIZE, 2 * SIZE)
        self.losses.append(float(outputs["loss"]))


def train_large_batch(ranks: int) -> tuple[nn.Module, list[float]]:
    """Two epochs of what ``check_exact`` trains, with the whole global batch in each step."""
    net, losses = make_net(), []
    optimizer = make_optimizer(net)
    for _ in range(2):
        for x in make_data(ranks).split(ranks * WINDOW * SIZE):
            loss = loss_of(net, x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return net, losses


def check_exact(ranks: int) -> None:
    model = Plain()
    # Five do not divide twelve: micro-batches are uneven.
    callback = SyncAccumCallback(mode="exact", micro_batch=5)
    make_trainer(callback, ranks, accumulate_grad_batches=1).fit(model, make_loader(ranks, size=WINDOW * SIZE))
    net, losses = train_large_batch(ranks)
    # Float64's 1e-16, through two layers and six steps.
    torch.testing.assert_close(model.net.state_dict(), net.state_dict(), rtol=1e-12, atol=1e-12)
    if ranks == 1:
        assert model.losses == pytest.approx(losses, rel=1e-12)


def test_the_exact_mode_trains_as_the_large_batch() -> None:
    check_exact(1)


@on_ranks(2)
def test_the_exact_mode_trains_two_ranks_as_the_large_batch(rank: Rank) -> None:
    with launched(rank):
        check_exact(rank.size)


def check_lookahead(ranks: int) -> None:
    """One epoch, against lookahead by hand: with each loss a share of the mean."""
    model = Plain()
    callback = SyncAccumCallback(mode="lookahead", micro_batch=5)
    make_trainer(callback, ranks, accumulate_grad_batches=1, max_epochs=1).fit(
        model, make_loader(ranks, size=WINDOW * SIZE)
    )
    net = convert_sync_accum(make_net())
    parallel = nn.parallel.DistributedDataParallel(net) if ranks > 1 else net
    optimizer = make_optimizer(net)
    first = dist.get_rank() if ranks > 1 else 0
    for x in make_data(ranks)[first::ranks].split(WINDOW * SIZE):
        parts = [(part, len(part) / len(x)) for part in x.split(5)]
        for loss in lookahead(parallel, lambda part: loss_of(parallel, part[0]) * part[1], parts):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        commit(net)
    # The same sums, maybe in another order.
    torch.testing.assert_close(model.net.state_dict(), net.state_dict(), rtol=1e-12, atol=1e-12)


def test_lookahead_sees_each_batch_as_a_window() -> None:
    check_lookahead(1)


@on_ranks(2)
def test_lookahead_sees_each_batch_of_two_ranks_as_a_window(rank: Rank) -> None:
    with launched(rank):
        check_lookahead(rank.size)


def test_the_loss_of_a_lookahead_is_that_of_the_large_batch() -> None:
    model = Plain()
    callback = SyncAccumCallback(mode="lookahead", micro_batch=5)
    make_trainer(callback, accumulate_grad_batches=1, max_steps=1).fit(model, make_loader(size=WINDOW * SIZE))
    assert model.losses == pytest.approx(train_large_batch(1)[1][:1], rel=1e-12)


@pytest.mark.parametrize("mode", ["exact", "lookahead"])
def test_a_whole_window_in_parts_of_lightnings_own_is_refused(mode: Any) -> None:
    callback = SyncAccumCallback(mode=mode, micro_batch=5)
    with pytest.raises(ValueError, match="leave accumulate_grad_batches at 1"):
        make_trainer(callback).fit(Plain(), make_loader())


def test_a_mode_needs_its_micro_batch() -> None:
    with pytest.raises(ValueError, match="need the size of a micro-batch"):
        SyncAccumCallback(mode="exact")
    with pytest.raises(ValueError, match="'accumulate' has none"):
        SyncAccumCallback(micro_batch=3)
    with pytest.raises(ValueError, match="mode must be"):
        SyncAccumCallback(mode="both", micro_batch=3)  # type: ignore[arg-type]


def test_a_strategy_has_its_own_step_again_after_a_fit() -> None:
    trainer = make_trainer(SyncAccumCallback(mode="exact", micro_batch=5), accumulate_grad_batches=1, max_epochs=1)
    trainer.fit(Plain(), make_loader(size=WINDOW * SIZE))
    assert not {"training_step", "backward"} & vars(trainer.strategy).keys()


class Averaged(Plain):
    """Keeps what its first BatchNorm saw in the last epoch."""

    def on_train_start(self) -> None:
        self.net[1].register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0].detach()))

    def on_train_epoch_start(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("mode", ["accumulate", "exact", "lookahead"])
def test_averaged_weights_get_the_statistics_of_a_whole_epoch(mode: Any) -> None:
    model = Averaged()
    callback = SyncAccumCallback(mode=mode, micro_batch=None if mode == "accumulate" else 2)
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    make_trainer([callback, averaging], accumulate_grad_batches=1).fit(model, make_loader())
    layer, epoch = model.net[1], torch.cat(model.seen)
    assert len(epoch) == MICRO_BATCHES * SIZE
    expected = nn.BatchNorm1d(4, momentum=None, dtype=torch.float64)
    expected(epoch)
    assert_same_statistics(layer, expected)


@pytest.mark.parametrize("mode", ["accumulate", "exact", "lookahead"])
def test_a_step_in_bfloat16_commits_its_window(mode: Any) -> None:
    model = Averaged().float()
    callback = SyncAccumCallback(mode=mode, micro_batch=None if mode == "accumulate" else 2)
    settings = {"accumulate_grad_batches": WINDOW, "max_steps": 1} if mode == "accumulate" else {"max_steps": 1}
    settings = {"accumulate_grad_batches": 1, **settings}
    size = SIZE if mode == "accumulate" else WINDOW * SIZE
    data = TensorDataset(make_data().float())
    make_trainer(callback, precision="bf16-mixed", **settings).fit(model, DataLoader(data, size))
    seen = model.seen[-WINDOW if mode == "accumulate" else -6 :]
    assert {x.dtype for x in seen} == {torch.bfloat16}
    assert sum(len(x) for x in seen) == WINDOW * SIZE
    expected = nn.BatchNorm1d(4, dtype=torch.float64)
    expected(torch.cat(seen).double())
    assert_same_statistics(model.net[1], expected, rtol=2e-6, atol=1e-6)  # kept in float32


class Adversaries(LightningModule):  # type: ignore[misc] # not installed where types are checked
    """Two networks with an optimizer each; one steps after every micro-batch, the other after every third."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.critic = make_net(), nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()

    def configure_optimizers(self) -> Any:
        return [make_optimizer(self.maker), make_optimizer(self.critic)], []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        maker, critic = self.optimizers()
        made = self.maker(batch[0])
        self.manual_backward(self.critic(made.detach()).square().mean())
        critic.step()
        critic.zero_grad()
        self.manual_backward(made.square().mean())
        if batch_idx % 3 == 2:
            maker.step()
            maker.zero_grad()


def test_two_optimizers_commit_each_its_own_network() -> None:
    model = Adversaries()
    make_trainer(SyncAccumCallback(), accumulate_grad_batches=1, max_epochs=1).fit(model, make_loader())
    assert model.critic[1].num_batches_tracked == MICRO_BATCHES
    assert model.maker[1].num_batches_tracked == model.maker[4].num_batches_tracked == MICRO_BATCHES // 3
    assert model.maker[1].window.count == SIZE  # one micro-batch without its step


class BuiltLate(Network):
    """Has no layer before ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        self.net = make_net()


def test_a_model_that_is_built_late_is_converted() -> None:
    network = BuiltLate()
    make_trainer(SyncAccumCallback(), max_epochs=1).fit(network, make_loader())
    assert network.windows == [4, 4, 2]


def test_a_model_without_batch_norm_is_refused() -> None:
    network = Network()
    network.net = nn.Sequential(nn.Linear(3, 2)).double()
    with pytest.raises(NoLayersError):
        make_trainer(SyncAccumCallback()).fit(network, make_loader())


class WithTestStep(Network):
    def test_step(self, batch: Any) -> None:
        self.log("loss", loss_of(self.net, batch[0]))


def test_a_model_that_was_only_tested_is_saved_as_it_is() -> None:
    network = WithTestStep()
    trainer = make_trainer(SyncAccumCallback())
    trainer.test(network, make_loader(), verbose=False)
    trainer.save_checkpoint("tested.ckpt")
    assert type(network.net[1]) is nn.BatchNorm1d
    assert "syncaccum_windows" not in torch.load("tested.ckpt", weights_only=False)


def test_what_lr_find_has_seen_is_dropped() -> None:
    network = Network()
    network.lr = 0.05
    trainer = make_trainer(SyncAccumCallback(), max_epochs=1)
    Tuner(trainer).lr_find(network, make_loader(), num_training=5, attr_name="lr", update_attr=False)
    assert network.layers[0].window.count == 0
    network.open, network.windows = [], []
    trainer.fit(network, make_loader())
    assert network.windows == [4, 4, 2]


class Logging(LightningModule):  # type: ignore[misc] # not installed where types are checked
    """Converts by itself, and logs each commit."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convert_sync_accum(make_net())

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self)
        self.handle = commit_on_step(self, optimizer)
        return optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch[0])

    def on_train_batch_end(self, *_: Any) -> None:
        if self.handle.report is not None:
            self.log_dict(self.handle.report.as_dict())


def test_a_report_is_logged_by_log_dict(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    make_trainer([], max_epochs=1, logger=logger, log_every_n_steps=1).fit(Logging(), make_loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = [(float(row["syncaccum/layers"]), float(row["syncaccum/max_values"])) for row in rows]
    # Ten micro-batches: two whole windows, and what is left.
    assert sorted(set(logged)) == [(2, 2 * SIZE), (2, WINDOW * SIZE)]
    assert all(float(row["syncaccum/seconds"]) > 0 for row in rows)
