"""The networks have the layers their descriptions promise, and the images their split."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from launch.digits import load_split
from launch.models import build_model
from launch.schedule import TEST_IMAGES, TRAIN_IMAGES


@pytest.mark.parametrize(("name", "kind", "layers"), [("resnet", nn.BatchNorm2d, 17), ("mlp", nn.BatchNorm1d, 3)])
def test_batchnorm_layers(name: str, kind: type[nn.Module], layers: int) -> None:
    model = build_model(name)
    assert sum(isinstance(module, kind) for module in model.modules()) == layers
    for images in (3, 0):
        assert model.eval()(torch.zeros(images, 1, 8, 8)).shape == (images, 10)


def test_split_is_fixed_stratified_and_has_every_image_once() -> None:
    train, test = load_split(torch.device("cpu"), torch.float32)
    assert (len(train), len(test)) == (TRAIN_IMAGES, TEST_IMAGES)
    assert torch.equal(train.pixels, load_split(torch.device("cpu"), torch.float32)[0].pixels)
    shares = test.classes.bincount() / (train.classes.bincount() + test.classes.bincount())
    torch.testing.assert_close(shares, torch.full((10,), 0.2), atol=0.01, rtol=0)  # one image of 180 either way
    assert train.pixels.amin() == -1
    assert train.pixels.amax() == 1
