"""mmengine: gradient accumulation with BatchNorm statistics of the whole window, by one hook.

    python with_mmengine.py

Needs `pip install syncaccum mmengine scikit-learn`.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from syncaccum import commit_on_step, convert_sync_accum, discard

GLOBAL_BATCH, MICRO_BATCH, TEST_IMAGES = 64, 4, 360


class SyncAccumHook(Hook):  # type: ignore[misc]
    def before_train(self, runner: Any) -> None:
        discard(convert_sync_accum(runner.model))
        commit_on_step(runner.model, runner.optim_wrapper)


class Network(BaseModel):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10)
        )

    def forward(self, x: Tensor, y: Tensor, mode: str) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(x), y)}


def main(epochs: int) -> None:
    images, classes = (torch.tensor(values) for values in load_digits(return_X_y=True))
    data = TensorDataset(images.float().view(-1, 1, 8, 8) / 8 - 1, classes)
    training, testing = torch.utils.data.random_split(data, [len(data) - TEST_IMAGES, TEST_IMAGES])
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrapper = OptimWrapper(optimizer, accumulative_counts=GLOBAL_BATCH // MICRO_BATCH)
    loop, loader = {"by_epoch": True, "max_epochs": epochs}, DataLoader(training, MICRO_BATCH, shuffle=True)
    Runner(model, "runs", loader, train_cfg=loop, optim_wrapper=wrapper, custom_hooks=[SyncAccumHook()]).train()
    x, y = next(iter(DataLoader(testing, TEST_IMAGES)))
    print(f"test accuracy {(model.eval().net(x).argmax(1) == y).double().mean():.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
