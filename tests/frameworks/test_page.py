"""The Python in the page on frameworks runs as it is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification

from launch.digits import load_split
from tests.docs.blocks import ROOT, run_examples


class Digits(LightningModule):  # type: ignore[misc] # not installed where types are checked
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


class Classifier(nn.Module):
    """What the Trainer calls by keywords and fastai by position."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "embedding_size": 4,
            "hidden_sizes": [8, 8],
            "depths": [1, 1],
            "layer_type": "basic",
            "num_labels": 10,
        }
        self.net = ResNetForImageClassification(ResNetConfig(num_channels=1, **sizes))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        outputs = self.net(pixel_values, labels)
        return outputs.logits if labels is None else outputs


@pytest.mark.filterwarnings("ignore")  # advice of four frameworks on the page's small trainings
def test_the_pages_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    split, _ = load_split(torch.device("cpu"), torch.float32)
    data = TensorDataset(split.pixels[:64], split.classes[:64])
    names = {
        "lightning_module": Digits(make_net()),
        "loader": DataLoader(data, 4),
        "large_batch_loader": DataLoader(data, 16),
        "image_model": Classifier(),
        "images": [{"pixel_values": x, "labels": y} for x, y in zip(*data.tensors, strict=True)],
        "data_loaders": DataLoaders.from_dsets(data, data, bs=4, device="cpu"),
    }
    assert run_examples(ROOT / "docs/frameworks.md", 0, tmp_path, **names) == 9
