"""Hugging Face's Trainer with a network of its library: commits are its steps, statistics those of whole windows."""

from __future__ import annotations

import gc
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from transformers import (
    MobileViTConfig,
    MobileViTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    TrainingArguments,
)
from transformers import Trainer as PlainTrainer

from syncaccum import NoLayersError, SyncAccumBatchNorm, commit, convert_sync_accum, lookahead
from syncaccum.integrations.transformers import SyncAccumTrainer, SyncAccumTrainerCallback
from tests.oracle import as_columns, assert_same_statistics, gather_global_batch, make_reference
from tests.ranks import Rank, on_ranks

WINDOW, MICRO_BATCHES, SIZE = 4, 10, 3


def make_model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "embedding_size": 4,
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "layer_type": "basic",
        "num_labels": 3,
    }
    model: Any = ResNetForImageClassification(ResNetConfig(num_channels=1, **sizes)).double()
    # Its forward takes num_items_in_batch and makes no use of it, which the Trainer does not expect.
    model.accepts_loss_kwargs = False
    return model


def make_images(ranks: int = 1, side: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ranks * MICRO_BATCHES * SIZE, 1, side, side, generator=generator, dtype=torch.float64) + 1
    labels = torch.randint(3, (len(images),), generator=generator)
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]


def make_trainer(model: Any, folder: Path, *, kind: type = PlainTrainer, ranks: int = 1, **settings: Any) -> Any:
    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": WINDOW, "save_strategy": "no", **settings}
    callbacks = settings.pop("callbacks", [])
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=settings.pop("size", SIZE), use_cpu=True, report_to="none",
        optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=0, disable_tqdm=True,
        train_sampling_strategy="sequential", dataloader_pin_memory=False, logging_strategy="no", **settings,
    )  # fmt: skip
    return kind(model, arguments, train_dataset=make_images(ranks), callbacks=callbacks)


@pytest.fixture(autouse=True)
def _no_state() -> Iterator[None]:
    yield
    forget_state()


def forget_state() -> None:
    """Accelerate keeps its settings in classes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def launched(rank: Rank) -> Iterator[None]:
    """What a launcher tells accelerate; the group is there already."""
    told = {"RANK": rank.index, "LOCAL_RANK": rank.index, "WORLD_SIZE": rank.size, "LOCAL_WORLD_SIZE": rank.size}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        for name, value in {**told, "OMP_NUM_THREADS": 1}.items():
            patch.setenv(name, str(value))
        try:
            yield
        finally:
            forget_state()
            gc.collect()  # DDP's reference cycles keep gloo busy after the group is gone


class Watch(TrainerCallback):
    """Checks every commit when it was made, and keeps how many micro-batches were in it. Collective."""

    def __init__(self) -> None:
        self.windows: list[int] = []
        self.layers: list[SyncAccumBatchNorm] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.layers:
            self.layers = [layer for layer in kwargs["model"].modules() if isinstance(layer, SyncAccumBatchNorm)]
            for index, layer in enumerate(self.layers):
                layer.register_forward_pre_hook(lambda layer, inputs, i=index: self.see(layer, i, inputs[0]))
        self.references = [make_reference(layer) for layer in self.layers]
        self.seen: list[list[Tensor]] = [[] for _ in self.layers]

    def see(self, layer: nn.Module, index: int, x: Tensor) -> None:
        if layer.training:
            self.seen[index].append(as_columns(x))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.windows.append(len(self.seen[0]))
        for layer, expected, seen in zip(self.layers, self.references, self.seen, strict=True):
            expected(gather_global_batch(seen))
            assert_same_statistics(layer, expected)
            seen.clear()


def check_training(ranks: int, folder: Path) -> None:
    watch = Watch()
    callback = SyncAccumTrainerCallback()
    trainer = make_trainer(make_model(), folder, ranks=ranks, callbacks=[callback, watch])
    assert callback.report is None
    trainer.train()
    assert callback.report is not None
    assert callback.report.ranks == ranks
    assert callback.report.as_dict("")["max_values"] == ranks * 2 * SIZE * 64  # the short window's; images of 8 by 8
    assert watch.windows == [4, 4, 2] * 2
    assert trainer.state.global_step == len(watch.windows)


def test_each_step_commits_its_window(tmp_path: Path) -> None:
    check_training(1, tmp_path)


@on_ranks(2)
def test_each_step_commits_the_window_of_two_ranks(rank: Rank) -> None:
    with launched(rank):
        check_training(rank.size, rank.folder)


def test_a_compiled_model_trains_as_it_does_uncompiled(tmp_path: Path) -> None:
    models = [make_model(), make_model()]
    compiled: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    for model, settings in zip(models, [compiled, {}], strict=True):
        callback = SyncAccumTrainerCallback()
        make_trainer(model, tmp_path, callbacks=[callback], num_train_epochs=1, **settings).train()
        assert callback.report is not None
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


def make_mobilevit() -> Any:
    """Its checkpoints are around blocks with BatchNorm."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [4, 4, 4, 8, 8, 8, 16]}
    sizes |= {"num_channels": 1, "image_size": 64, "num_attention_heads": 2, "num_labels": 3}
    config = MobileViTConfig(**sizes)
    config.hidden_dropout_prob = config.classifier_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model: Any = MobileViTForImageClassification(config).double()
    model.accepts_loss_kwargs = False
    return model


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.*:FutureWarning")  # its name before transformers 5
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_checkpoints_repeat_counts_once(reentrant: bool, tmp_path: Path) -> None:
    models = [make_mobilevit(), make_mobilevit()]
    checkpointed: dict[str, Any] = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    watch, forwards = Watch(), Counter[int]()
    for index, (model, settings) in enumerate(zip(models, [checkpointed, {}], strict=True)):
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_pre_hook(lambda *_, index=index: forwards.update([index]))
        callbacks = [SyncAccumTrainerCallback(), *([] if settings else [watch])]
        trainer = make_trainer(model, tmp_path, callbacks=callbacks, num_train_epochs=1, **settings)
        trainer.train_dataset = make_images(side=64)
        trainer.train()
    assert watch.windows == [4, 4, 2]
    assert forwards[0] > forwards[1]  # so checkpoints did repeat some
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


class OutOfMemory(TrainerCallback):
    """Ends the first try in the middle of its first window."""

    def __init__(self) -> None:
        self.substeps = 0

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.substeps += 1
        if self.substeps == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("kind", [PlainTrainer, SyncAccumTrainer])
def test_a_retry_with_smaller_batches_starts_with_empty_windows(kind: type, tmp_path: Path) -> None:
    watch = Watch()
    callbacks = [SyncAccumTrainerCallback(), watch, OutOfMemory()]
    settings: dict[str, Any] = {"auto_find_batch_size": True, "num_train_epochs": 1, "size": 6}
    trainer = make_trainer(make_model(), tmp_path, kind=kind, callbacks=callbacks, **settings)
    trainer.train()
    # Of five examples in the place of six.
    assert trainer._train_batch_size == 5
    assert watch.windows == [4, 2]


def test_training_resumes_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole, resumed = make_model(), make_model()
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(whole, tmp_path / "whole", callbacks=[SyncAccumTrainerCallback()], **settings).train()
    trainer = make_trainer(resumed, tmp_path / "resumed", callbacks=[SyncAccumTrainerCallback()])
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert trainer.state.global_step == 6
    for name, expected in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected), name


def test_a_checkpoint_from_before_the_callback_resumes_and_is_saved_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(make_model(), tmp_path, **settings).train()
    trainer = make_trainer(make_model(), tmp_path, callbacks=[SyncAccumTrainerCallback()], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    written = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert written["stateful_callbacks"]["SyncAccumTrainerCallback"]["attributes"]["_windows"]


def test_another_training_of_the_same_trainer_starts_without_the_windows_of_the_first(tmp_path: Path) -> None:
    results = []
    for trainings in (2, 1):
        callback = SyncAccumTrainerCallback()
        for number in range(trainings):
            model = make_model()
            make_trainer(model, tmp_path / f"{trainings}{number}", callbacks=[callback], save_strategy="epoch").train()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], expected) for name, expected in results[1].items())


def test_a_model_without_batch_norm_is_refused(tmp_path: Path) -> None:
    model = make_model()
    for module in model.modules():
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    with pytest.raises(NoLayersError):
        make_trainer(model, tmp_path, callbacks=[SyncAccumTrainerCallback()]).train()


def train_large_batch(model: Any, ranks: int) -> None:
    """Two epochs of what the trainers train, with the whole global batch in each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images, size = make_images(ranks), ranks * WINDOW * SIZE
    for _ in range(2):
        for start in range(0, len(images), size):
            part = images[start : start + size]
            batch = {key: torch.stack([image[key] for image in part]) for key in part[0]}
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def check_exact(ranks: int, folder: Path) -> None:
    model, expected = make_model(), make_model().train()
    train_large_batch(expected, ranks)
    make_trainer(model, folder, kind=SyncAccumTrainer, ranks=ranks).train()
    # Float64's 1e-16, through six layers and six steps.
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-12, atol=1e-12)


def test_the_exact_mode_trains_as_the_large_batch(tmp_path: Path) -> None:
    check_exact(1, tmp_path)


@on_ranks(2)
def test_the_exact_mode_trains_two_ranks_as_the_large_batch(rank: Rank) -> None:
    with launched(rank):
        check_exact(rank.size, rank.folder)


class LookaheadTrainer(SyncAccumTrainer):
    sync_accum_mode = "lookahead"


def test_the_lookahead_mode_trains_as_lookahead_by_hand(tmp_path: Path) -> None:
    model, expected = make_model(), convert_sync_accum(make_model()).train()
    make_trainer(model, tmp_path, kind=LookaheadTrainer, num_train_epochs=1).train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    images = make_images()
    batches = [
        {key: torch.stack([image[key] for image in images[i : i + SIZE]]) for key in images[0]}
        for i in range(0, len(images), SIZE)
    ]
    for start in range(0, MICRO_BATCHES, WINDOW):
        window = [(batch, min(WINDOW, MICRO_BATCHES - start)) for batch in batches[start : start + WINDOW]]
        for loss in lookahead(expected, lambda one: expected(**one[0]).loss / one[1], window):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        commit(expected)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=f"{name}: {{}}".format)


def test_the_trainer_walks_backward_by_itself_again_after_a_step(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), tmp_path, kind=SyncAccumTrainer, num_train_epochs=1)
    trainer.train()
    assert "backward" not in vars(trainer.accelerator)
