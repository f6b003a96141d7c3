"""Lightning: gradient accumulation with BatchNorm statistics of the global batch, by one callback.

    python with_lightning.py --devices 2

Needs `pip install syncaccum[lightning] scikit-learn`.
"""

import argparse

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from syncaccum.integrations.lightning import SyncAccumCallback

GLOBAL_BATCH, MICRO_BATCH, TEST_IMAGES = 64, 4, 360


class Digits(LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10)
        self.net = nn.Sequential(*layers)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor]) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).double().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(epochs: int, devices: int) -> None:
    torch.manual_seed(0)
    images, classes = (torch.tensor(values) for values in load_digits(return_X_y=True))
    data = TensorDataset(images.float().view(-1, 1, 8, 8) / 8 - 1, classes)
    training, testing = torch.utils.data.random_split(data, [len(data) - TEST_IMAGES, TEST_IMAGES])

    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=devices, logger=False, enable_checkpointing=False,
        accumulate_grad_batches=GLOBAL_BATCH // MICRO_BATCH // devices, callbacks=[SyncAccumCallback()],
    )  # fmt: skip
    model = Digits()
    trainer.fit(model, DataLoader(training, MICRO_BATCH, shuffle=True))
    (scores,) = trainer.test(model, DataLoader(testing, TEST_IMAGES), verbose=False)
    if trainer.is_global_zero:
        print(f"test accuracy {scores['accuracy']:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1)
    main(**vars(parser.parse_args()))
