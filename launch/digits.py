"""scikit-learn's 1797 digit images, in one fixed stratified split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from launch.schedule import TEST_IMAGES, TRAIN_IMAGES

_BRIGHTEST = 16.0  # pixels are integers from 0 to 16


@dataclass(frozen=True)
class Images:
    """Images of shape ``(N, 1, 8, 8)`` with pixels in [-1, 1], and their classes of shape ``(N,)``."""

    pixels: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)


def load_split(device: torch.device, dtype: torch.dtype) -> tuple[Images, Images]:
    """Training and test images; the same ones in every run."""
    digits = load_digits()
    train, test, train_classes, test_classes = train_test_split(
        digits.images,
        digits.target,
        train_size=TRAIN_IMAGES,
        test_size=TEST_IMAGES,
        stratify=digits.target,
        random_state=0,
    )
    return (
        _as_images(train, train_classes, device, dtype),
        _as_images(test, test_classes, device, dtype),
    )


def _as_images(pixels: np.ndarray, classes: np.ndarray, device: torch.device, dtype: torch.dtype) -> Images:
    return Images(
        torch.as_tensor(pixels / (_BRIGHTEST / 2) - 1, dtype=dtype, device=device).unsqueeze(1),
        torch.as_tensor(classes, dtype=torch.int64, device=device),
    )
