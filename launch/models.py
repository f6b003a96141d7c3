"""The two networks: a ResNet with 17 BatchNorm2d layers, and a perceptron with 3 BatchNorm1d layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
_STAGES = ((16, 3, 1), (32, 3, 2), (64, 2, 2))  # width, blocks, stride of the first: 8x8, 4x4 and 2x2 images
_HIDDEN = (128, 128, 128)
_PIXELS = 64


def build_model(name: str) -> nn.Module:
    """``"resnet"`` or ``"mlp"``; takes images of shape ``(N, 1, 8, 8)``."""
    return ResNet() if name == "resnet" else _build_mlp()


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, width - width_in
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        x = x if self.stride == 1 else F.avg_pool2d(x, self.stride)
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


class ResNet(nn.Module):
    """A stem and eight basic blocks."""

    def __init__(self) -> None:
        super().__init__()
        width = _STAGES[0][0]
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = []
        for width_out, count, stride in _STAGES:
            for index in range(count):
                blocks.append(BasicBlock(width, width_out, stride if index == 0 else 1))
                width = width_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.stem(x))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def _build_mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    width = _PIXELS
    for hidden in _HIDDEN:
        layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))
