"""timm, by the file that defines a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch

from benchmarks.zoo.families import Built, Model, list_small, with_images


def list_models() -> Iterator[Model]:
    return list_small(timm.list_models(), _name_family, timm.create_model)


def _name_family(name: str) -> str:
    module: Any = timm.models.model_entrypoint(name).__module__
    return str(module.rpartition(".")[2])


def build(name: str) -> Built:
    model = timm.create_model(name)
    channels, own, _ = model.pretrained_cfg["input_size"]
    sides = [own] if model.pretrained_cfg.get("fixed_input_size") else [64, 128, own]
    return with_images(model, lambda size, side: torch.randn(size, channels, side, side), sides)
