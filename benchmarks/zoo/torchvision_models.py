"""torchvision: classification, segmentation, detection, video, optical flow, and what quantization prepares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchvision import models

from benchmarks.zoo.families import Built, Model, list_small, with_images

_FEW = {f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")}
"""Proposals that go through a detector's head."""


def list_models() -> Iterator[Model]:
    return list_small(models.list_models(), lambda name: _name_family(name).rpartition(".")[2], _make)


def _name_family(name: str) -> str:
    return str(models.get_model_builder(name).__module__)


def _make(name: str) -> Any:
    family = _name_family(name)
    # What has a backbone would download its weights.
    settings: dict[str, Any] = {"weights_backbone": None} if "detection" in family or "segmentation" in family else {}
    if "detection" in family:
        settings |= _FEW if "rcnn" in name else {"topk_candidates": 20}
        settings |= {} if "ssd" in name else {"min_size": 96, "max_size": 96}
    return models.get_model(name, weights=None, **settings)


def build(name: str) -> Built:
    model, family = _make(name), _name_family(name)
    if "detection" in family:
        return model, lambda size: _detect(model, size)
    if "optical_flow" in family:
        return model, lambda size: model(torch.randn(size, 3, 128, 128), torch.randn(size, 3, 128, 128))
    if "video" in family:
        side = 224 if name == "s3d" else 112
        return model, lambda size: model(torch.randn(size, 3, 16, side, side))
    # In training, heads in the middle want more than eval does.
    sides = [224] if "maxvit" in name or "googlenet" in name else [299] if "inception" in name else [64, 128]
    return with_images(model, lambda size, side: torch.randn(size, 3, side, side), sides)


def _detect(model: nn.Module, size: int) -> Any:
    """Images with one object each: a box, a mask of all of it, and its corners."""
    images = list(torch.rand(size, 3, 96, 96))
    box = torch.tensor([[10.0, 20.0, 60.0, 70.0]])
    corners = torch.tensor([[[10.0, 20.0, 1.0]] * 17])
    target = {"boxes": box, "labels": torch.tensor([1]), "masks": torch.ones(1, 96, 96), "keypoints": corners}
    return model(images, [target] * size)
