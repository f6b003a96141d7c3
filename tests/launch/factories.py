"""Models for the doctor's --model."""

from __future__ import annotations

import os

from torch import nn


def alike() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))


def wider_on_rank_1() -> nn.Module:
    width = 7 if os.environ.get("RANK") == "1" else 6
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, width, 1), nn.BatchNorm2d(width))


def failing_on_rank_1() -> nn.Module:
    if os.environ.get("RANK") == "1":
        raise FileNotFoundError("no weights here")
    return alike()
