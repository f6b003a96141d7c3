"""ResNet-18 for small images: 20 BatchNorm2d layers, 11 million parameters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from launch.models import CLASSES

_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # width and stride; 8x8 images end as 1x1


class ProjectionBlock(nn.Module):
    """Two 3x3 convolutions, and a 1x1 one in the shortcut where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if (width_in, 1) != (width, stride):
            projection = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def build_resnet18() -> nn.Module:
    """The usual widths and blocks behind a 3x3 stem without pooling; takes images of shape ``(N, 1, 8, 8)``."""
    width = _STAGES[0][0]
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for width_out, stride in _STAGES:
        layers += [ProjectionBlock(width, width_out, stride), ProjectionBlock(width_out, width_out, 1)]
        width = width_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))
