"""Segmentation: which photograph does each pixel of a mosaic come from? Photographs inside scikit-image.

An image joins crops of two photographs along a random line; its labels are known because it was made so, as in Brodatz
mosaics, the usual benchmark of texture segmentation. Nothing is downloaded: the files are inside scikit-image's wheel.
"""

from __future__ import annotations

import importlib.resources
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

# Four that are textured all over: a crop of any place tells which it is.
PHOTOGRAPHS = ("brick.png", "grass.png", "hubble_deep_field.jpg", "ihc.png")
_SIZE = 32
_TRAIN, _TEST = 512, 192
_TRAIN_SHARE = 0.75  # of each photograph's columns, from the left; what is right of them is to test with
_WIDTHS = (12, 24, 32)


def load_mosaics(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images ``(N, 1, 32, 32)`` and labels ``(N, 32, 32)``, to train and to test with; the same ones in every run."""
    random = np.random.default_rng(0)
    photographs = [_load_grey(name) for name in PHOTOGRAPHS]
    borders = [int(grey.shape[1] * _TRAIN_SHARE) for grey in photographs]
    left = [grey[:, :border] for grey, border in zip(photographs, borders, strict=True)]
    right = [grey[:, border:] for grey, border in zip(photographs, borders, strict=True)]
    return _make_mosaics(left, _TRAIN, random, dtype), _make_mosaics(right, _TEST, random, dtype)


def _load_grey(name: str) -> np.ndarray:
    """Of mean 0 and deviation 1: brightness alone must not tell photographs apart."""
    with (importlib.resources.files("skimage") / "data" / name).open("rb") as file:
        grey = np.asarray(Image.open(file).convert("L"), dtype=np.float64)
    scaled: np.ndarray = (grey - grey.mean()) / grey.std()
    return scaled


def _make_mosaics(
    photographs: list[np.ndarray], number: int, random: np.random.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(_join_two(photographs, random) for _ in range(number)), strict=True)
    return torch.as_tensor(np.stack(images), dtype=dtype).unsqueeze(1), torch.as_tensor(np.stack(labels))


def _join_two(photographs: list[np.ndarray], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    first, second = random.choice(len(photographs), 2, replace=False)
    angle, shift = random.uniform(0, math.tau), random.uniform(-_SIZE / 4, _SIZE / 4)
    rows, columns = np.mgrid[:_SIZE, :_SIZE] - (_SIZE - 1) / 2
    side = rows * math.sin(angle) + columns * math.cos(angle) > shift
    image = np.where(side, _cut(photographs[first], random), _cut(photographs[second], random))
    return image, np.where(side, first, second)


def _cut(grey: np.ndarray, random: np.random.Generator) -> np.ndarray:
    row, column = (random.integers(0, size - _SIZE + 1) for size in grey.shape)
    return grey[row : row + _SIZE, column : column + _SIZE]


class Segmenter(nn.Module):
    """Three resolutions down, three up again with the way down added: 8 BatchNorm layers."""

    def __init__(self) -> None:
        super().__init__()
        high, middle, low = _WIDTHS
        self.enter = _build_block(1, high, 1)
        self.down1, self.same1 = _build_block(high, middle, 2), _build_block(middle, middle, 1)
        self.down2, self.same2 = _build_block(middle, low, 2), _build_block(low, low, 1)
        self.narrow1, self.narrow2 = _build_block(low, middle, 1), _build_block(middle, high, 1)
        self.leave = _build_block(high, high, 1)
        self.head = nn.Conv2d(high, len(PHOTOGRAPHS), 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.enter(x)
        middle = self.same1(self.down1(high))
        low = self.same2(self.down2(middle))
        middle = middle + F.interpolate(self.narrow1(low), scale_factor=2.0)
        high = high + F.interpolate(self.narrow2(middle), scale_factor=2.0)
        logits: Tensor = self.head(self.leave(high))
        return logits


def _build_block(width_in: int, width: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def measure_overlap(logits: Tensor, labels: Tensor) -> float:
    """Intersection over union of each class, over all pixels; their mean."""
    classes = logits.shape[1]
    pairs = labels.flatten() * classes + logits.argmax(1).flatten()
    table = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
    met = table.diagonal()
    return (met / (table.sum(0) + table.sum(1) - met)).mean().item()
