"""segmentation_models_pytorch: each decoder on one encoder, and each encoder under one decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import segmentation_models_pytorch as smp
import torch

from benchmarks.zoo.families import Built, Model, list_small, with_images

_DECODERS = (
    "unet",
    "unetplusplus",
    "manet",
    "linknet",
    "fpn",
    "pspnet",
    "deeplabv3",
    "deeplabv3plus",
    "pan",
    "upernet",
    "segformer",
)
_DPT = "dpt tu-vit_tiny_patch16_224"
"""DPT wants a transformer."""


def list_models() -> Iterator[Model]:
    yield from (Model("decoder", f"{decoder} resnet18") for decoder in _DECODERS)
    yield Model("decoder", _DPT)
    encoders = (f"unet {encoder}" for encoder in smp.encoders.get_encoder_names() if encoder != "resnet18")
    yield from list_small(encoders, lambda _: "encoder", _make)


def _make(name: str) -> Any:
    decoder, encoder = name.split()
    return smp.create_model(decoder, encoder, encoder_weights=None)


def build(name: str) -> Built:
    return with_images(_make(name), lambda size, side: torch.randn(size, 3, side, side), [64, 128, 224])
