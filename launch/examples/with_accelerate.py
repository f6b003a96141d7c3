"""Accelerate: gradient accumulation with BatchNorm statistics of the global batch, by one line after prepare().

    python with_accelerate.py
    accelerate launch --cpu --num_processes 2 with_accelerate.py

Needs `pip install syncaccum[accelerate] scikit-learn`.
"""

import argparse
import os

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from syncaccum.integrations.accelerate import sync_accum

GLOBAL_BATCH, MICRO_BATCH, TEST_IMAGES = 64, 4, 360


def main(epochs: int) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=GLOBAL_BATCH // MICRO_BATCH // ranks)
    set_seed(0)
    images, classes = (torch.tensor(values) for values in load_digits(return_X_y=True))
    data = TensorDataset(images.float().view(-1, 1, 8, 8) / 8 - 1, classes)
    training, testing = torch.utils.data.random_split(data, [len(data) - TEST_IMAGES, TEST_IMAGES])

    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(training, MICRO_BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sync_accum(accelerator, model, optimizer)

    for epoch in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()  # commits the BatchNorm statistics, too, at the end of a window
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1} of {epochs}")

    model.eval()
    x, y = next(iter(DataLoader(testing, TEST_IMAGES)))
    accelerator.print(f"test accuracy {(model(x).argmax(1) == y).double().mean():.1%}")
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
