"""What is learnt: data, network, loss and score of each task of the experiment."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.equivalence.denoising import NOISE, build_denoiser, load_patches
from benchmarks.equivalence.mnist import build_convnet, load_mnist
from benchmarks.equivalence.segmentation import Segmenter, load_mosaics, measure_overlap
from benchmarks.resnet18 import build_resnet18
from launch.digits import load_split
from launch.models import build_model
from launch.schedule import global_batches

_CPU = torch.device("cpu")
_PRETRAINING_EPOCHS, _PRETRAINING_WINDOW = 3, 64
_FIRST_NEW_CLASS = 5  # fine-tuning goes from the digits 0-4 to 5-9

Samples = tuple[Tensor, Tensor]
"""Inputs and targets."""


@dataclass(frozen=True)
class Task:
    """``loss`` sums over samples; ``score`` is of the whole test set; more is better."""

    train: Samples
    test: Samples
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]


def load_task(name: str, seed: int, dtype: torch.dtype, window: int, rest: int = 0) -> Task:
    """A task with its data in ``dtype``; training samples fill whole windows and one of ``rest`` samples."""
    if name == "denoise":
        train, test = load_patches(dtype)
        return Task(_cut(train, window, rest), test, build_denoiser, _noise_energy, _decibels)
    if name == "segment":
        train, test = load_mosaics(dtype)
        return Task(_cut(train, window, rest), test, Segmenter, _pixel_cross_entropy, measure_overlap)
    if name == "mnist":
        train, test = load_mnist(dtype)
        return Task(_cut(train, window, rest), test, build_convnet, _cross_entropy, _accuracy)
    train, test = _load_digits(dtype)
    build = functools.partial(build_model, "mlp" if name == "mlp" else "resnet")
    if name == "resnet18":
        build = functools.partial(build_resnet18)
    if name == "finetune":
        train, test = (_choose(samples, samples[1] >= _FIRST_NEW_CLASS) for samples in (train, test))
        build = functools.partial(_build_pretrained, seed)
    return Task(_cut(train, window, rest), test, build, _cross_entropy, _accuracy)


def _load_digits(dtype: torch.dtype) -> tuple[Samples, Samples]:
    train, test = load_split(_CPU, dtype)
    return (train.pixels, train.classes), (test.pixels, test.classes)


def _choose(samples: Samples, which: Tensor | slice) -> Samples:
    return samples[0][which], samples[1][which]


def _cut(samples: Samples, window: int, rest: int = 0) -> Samples:
    return _choose(samples, slice((len(samples[1]) - rest) // window * window + rest))


def _cross_entropy(outputs: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(outputs, classes, reduction="sum")


def _accuracy(outputs: Tensor, classes: Tensor) -> float:
    return (outputs.argmax(1) == classes).double().mean().item()


def _pixel_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels of each image."""
    return F.cross_entropy(outputs, labels, reduction="none").mean((1, 2)).sum()


def _noise_energy(outputs: Tensor, noise: Tensor) -> Tensor:
    """Mean square error of each patch as a share of the noise's variance: 1 for a network that does nothing."""
    return (outputs - noise).square().mean((1, 2, 3)).sum()


def _decibels(outputs: Tensor, noise: Tensor) -> float:
    """Peak signal to noise ratio of the denoised patches, whose pixels are from 0 to 1."""
    return -20 * math.log10(NOISE) - 10 * math.log10((outputs - noise).double().square().mean().item())


def _build_pretrained(seed: int) -> nn.Module:
    return copy.deepcopy(_pretrain(seed))


@functools.lru_cache(maxsize=4)
def _pretrain(seed: int) -> nn.Module:
    """The ResNet after a few epochs on the first classes, in float32, with BatchNorm on whole windows."""
    samples, _ = _load_digits(torch.float32)
    images, classes = _cut(_choose(samples, samples[1] < _FIRST_NEW_CLASS), _PRETRAINING_WINDOW)
    torch.manual_seed(seed)
    model = build_model("resnet")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(_PRETRAINING_EPOCHS):
        for batch in global_batches(len(classes), _PRETRAINING_WINDOW, seed, epoch):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(images[batch]), classes[batch]))
            optimizer.step()
    return model
