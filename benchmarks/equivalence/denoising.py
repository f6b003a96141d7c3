"""Denoising of small patches from scikit-learn's two photographs, with BatchNorm as DnCNN has it.

Source: Zhang et al. 2017, Beyond a Gaussian Denoiser (arXiv 1608.03981): the network predicts the noise.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

NOISE = 0.1  # standard deviation; pixels are from 0 to 1
_CONTRAST = 0.25  # of pixels, about; inputs and targets of unit scale suit the learning rates of the other tasks
_PATCH, _STRIDE = 16, 20
_WIDTH, _HIDDEN_LAYERS = 16, 3


def load_patches(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Noisy patches ``(N, 1, 16, 16)`` and their noise in units of NOISE, to train and to test with.

    The same ones in every run. Those to test with come from the right quarter of each photograph.
    """
    random = np.random.default_rng(0)
    train, test = [], []
    for photograph in load_sample_images().images:
        grey = photograph.mean(2) / 255
        border = grey.shape[1] * 3 // 4
        train += _cut_patches(grey[:, :border])
        test += _cut_patches(grey[:, border:])
    order = random.permutation(len(train))
    return _add_noise([train[i] for i in order], random, dtype), _add_noise(test, random, dtype)


def _cut_patches(grey: np.ndarray) -> list[np.ndarray]:
    rows, columns = (range(0, size - _PATCH + 1, _STRIDE) for size in grey.shape)
    return [grey[row : row + _PATCH, column : column + _PATCH] for row in rows for column in columns]


def _add_noise(patches: list[np.ndarray], random: np.random.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    clean = np.stack(patches)[:, None]
    noise = random.normal(0, 1, clean.shape)
    inputs = (clean + NOISE * noise - 0.5) / _CONTRAST
    return torch.as_tensor(inputs, dtype=dtype), torch.as_tensor(noise, dtype=dtype)


def build_denoiser() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, _WIDTH, 3, padding=1), nn.ReLU()]
    for _ in range(_HIDDEN_LAYERS):
        layers += [nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(_WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(_WIDTH, 1, 3, padding=1))
