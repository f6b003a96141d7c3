"""Ray Train: BatchNorm statistics of the global batch, over the micro-batches of all workers.

    python ray_train.py --workers 2

Needs `pip install syncaccum ray[train] scikit-learn`.
"""

import argparse
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from syncaccum import commit_on_step, convert_sync_accum

MICRO_BATCH, WINDOW, TEST_IMAGES = 4, 8, 360  # window: micro-batches of each worker


def train(settings: dict[str, Any]) -> float:
    torch.manual_seed(0)
    images, classes = (torch.tensor(values) for values in load_digits(return_X_y=True))
    data = TensorDataset(images.float().view(-1, 1, 8, 8) / 8 - 1, classes)
    training, testing = torch.utils.data.random_split(data, [len(data) - TEST_IMAGES, TEST_IMAGES])
    net = nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))

    model: Any = ray.train.torch.prepare_model(convert_sync_accum(net))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    handle = commit_on_step(model, optimizer)
    loader: Any = ray.train.torch.prepare_data_loader(DataLoader(training, MICRO_BATCH, shuffle=True, drop_last=True))

    accuracy = 0.0
    for _ in range(settings["epochs"]):
        for number, (x, y) in enumerate(loader, 1):
            (F.cross_entropy(model(x), y) / WINDOW).backward()
            if number % WINDOW == 0 or number == len(loader):
                optimizer.step()  # commits the BatchNorm statistics, too
                optimizer.zero_grad()
        model.eval()
        x, y = next(iter(DataLoader(testing, TEST_IMAGES)))
        accuracy = (model(x).argmax(1) == y).double().mean().item()
        model.train()
        ray.train.report({"accuracy": accuracy, **(handle.report.as_dict() if handle.report else {})})
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    trainer = ray.train.torch.TorchTrainer(
        train, train_loop_config={"epochs": arguments.epochs}, torch_config=ray.train.torch.TorchConfig("gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=arguments.workers),
    )  # fmt: skip
    print(f"test accuracy {trainer.fit().return_value:.1%}")
