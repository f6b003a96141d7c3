"""Ignite: gradient accumulation with BatchNorm statistics of the whole window, by two lines.

    python with_ignite.py

Needs `pip install syncaccum pytorch-ignite scikit-learn`.
"""

import argparse

import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Accuracy
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from syncaccum import commit_on_step, convert_sync_accum

GLOBAL_BATCH, MICRO_BATCH, TEST_IMAGES = 64, 4, 360


def main(epochs: int) -> None:
    torch.manual_seed(0)
    images, classes = (torch.tensor(values) for values in load_digits(return_X_y=True))
    data = TensorDataset(images.float().view(-1, 1, 8, 8) / 8 - 1, classes)
    training, testing = torch.utils.data.random_split(data, [len(data) - TEST_IMAGES, TEST_IMAGES])

    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    convert_sync_accum(model)
    commit_on_step(model, optimizer)

    trainer = create_supervised_trainer(
        model, optimizer, nn.CrossEntropyLoss(), gradient_accumulation_steps=GLOBAL_BATCH // MICRO_BATCH
    )
    evaluator = create_supervised_evaluator(model, {"accuracy": Accuracy()})
    trainer.add_event_handler(Events.COMPLETED, lambda _: evaluator.run(DataLoader(testing, TEST_IMAGES)))
    trainer.run(DataLoader(training, MICRO_BATCH, shuffle=True), max_epochs=epochs)
    print(f"test accuracy {evaluator.state.metrics['accuracy']:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
