"""fastai: GradientAccumulation with BatchNorm statistics of the whole window, by one callback.

    python with_fastai.py

Needs `pip install syncaccum[fastai] scikit-learn`.
"""

import argparse

import torch
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from syncaccum.integrations.fastai import SyncAccumCallback

GLOBAL_BATCH, MICRO_BATCH, TEST_IMAGES = 64, 4, 360


def main(epochs: int) -> None:
    set_seed(0)
    images, classes = (torch.tensor(values) for values in load_digits(return_X_y=True))
    data = TensorDataset(images.float().view(-1, 1, 8, 8) / 8 - 1, classes)
    training, testing = torch.utils.data.random_split(data, [len(data) - TEST_IMAGES, TEST_IMAGES])

    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
    learner = Learner(
        DataLoaders.from_dsets(training, testing, bs=MICRO_BATCH, device="cpu"), model, metrics=accuracy,
        loss_func=CrossEntropyLossFlat(), cbs=[GradientAccumulation(GLOBAL_BATCH), SyncAccumCallback()],
    )  # fmt: skip
    with learner.no_bar(), learner.no_logging():
        learner.fit(epochs, lr=0.005)
        _, score = learner.validate()
    print(f"test accuracy {score:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
