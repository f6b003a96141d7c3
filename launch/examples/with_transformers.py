"""Hugging Face's Trainer: gradient accumulation with BatchNorm statistics of the global batch, by one callback.

    python with_transformers.py
    torchrun --standalone --nproc-per-node 2 with_transformers.py

Needs `pip install syncaccum[transformers] scikit-learn`. SyncAccumTrainer in the place of Trainer trains as the large
batch does.
"""

import argparse
import os
from typing import Any

import torch
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from syncaccum.integrations.transformers import SyncAccumTrainerCallback

GLOBAL_BATCH, MICRO_BATCH, TEST_IMAGES = 64, 4, 360


def score(seen: Any) -> dict[str, float]:
    return {"accuracy": (seen.predictions.argmax(1) == seen.label_ids).mean()}


def main(epochs: int) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    set_seed(0)
    images, classes = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images = torch.nn.functional.interpolate(images.float().view(-1, 1, 8, 8) / 8 - 1, scale_factor=4)
    data: Any = [{"pixel_values": image, "labels": label} for image, label in zip(images, classes, strict=True)]
    training, testing = torch.utils.data.random_split(data, [len(data) - TEST_IMAGES, TEST_IMAGES])

    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10  # type: ignore[call-arg]
    )  # fmt: skip
    model: Any = ResNetForImageClassification(config)
    model.accepts_loss_kwargs = False  # it takes num_items_in_batch and ignores it; then Trainer forgets to average
    arguments = TrainingArguments(
        "digits", num_train_epochs=epochs, learning_rate=0.01, optim="adamw_torch", lr_scheduler_type="cosine",
        per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=GLOBAL_BATCH // MICRO_BATCH // ranks,
        per_device_eval_batch_size=TEST_IMAGES, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=training, eval_dataset=testing,
        callbacks=[SyncAccumTrainerCallback()],
        compute_metrics=score,
    )  # fmt: skip
    trainer.train()
    scores = trainer.evaluate()
    if trainer.is_world_process_zero():
        print(f"test accuracy {scores['eval_accuracy']:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
